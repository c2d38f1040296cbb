// The conversation. What a model or a user wrote only ever enters the page as text nodes.

import { call, events } from "./api.js";

function element(tag, className, text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

/** One answer while it streams: its text, its reasoning if there is any, and a line of figures. */
class Answer {
  constructor() {
    this.node = element("article", "message assistant running");
    this.body = this.node.appendChild(element("div", "body"));
    this.footer = this.node.appendChild(element("footer", "", "waiting for the first token …"));
    this.text = "";
    this.started = performance.now();
  }

  add(choice) {
    const { content, reasoning } = choice.delta ?? {};
    if ((content || reasoning) && !this.firstToken) {
      this.firstToken = performance.now();
      this.footer.textContent = this.waited();
    }
    if (reasoning) this.reasoning().append(reasoning);
    if (content) {
      this.text += content;
      this.body.append(content); // a string is appended as text, whatever is in it
    }
    this.finishReason = choice.finish_reason ?? this.finishReason;
  }

  waited() {
    return `first token after ${Math.round(this.firstToken - this.started)} ms`;
  }

  reasoning() {
    if (!this.thoughts) {
      const details = element("details", "reasoning");
      details.append(element("summary", "", "Reasoning"));
      this.thoughts = details.appendChild(element("div", "body"));
      this.node.prepend(details);
    }
    return this.thoughts;
  }

  finish(usage) {
    const ended = performance.now();
    const parts = [];
    if (this.firstToken) parts.push(this.waited());
    if (usage) {
      parts.unshift(`${usage.prompt_tokens} → ${usage.completion_tokens} tokens`);
      const seconds = (ended - this.firstToken) / 1000;
      if (usage.completion_tokens > 1 && seconds > 0) {
        parts.push(`${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s`);
      }
    }
    if (this.finishReason) parts.push(`ended by ${this.finishReason}`);
    this.end(parts.join(" · "));
  }

  stopped() {
    this.end("stopped");
  }

  failed(message) {
    this.node.classList.add("error");
    this.end(message);
  }

  end(note) {
    this.node.classList.remove("running");
    this.footer.textContent = note;
  }
}

export class Chat {
  /** page: the elements, and functions that read the model's name and the settings. */
  constructor(page) {
    this.page = page;
    this.history = []; // messages as the server takes them
    this.controller = null; // of the answer that streams now
    page.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.submit();
    });
    page.input.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.submit();
    });
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.stop());
    page.stop.addEventListener("click", () => this.stop());
    page.clear.addEventListener("click", () => this.clear());
  }

  stop() {
    this.controller?.abort();
  }

  clear() {
    this.stop();
    this.history = [];
    this.page.messages.replaceChildren();
    this.page.hint.hidden = false;
    this.page.input.focus();
  }

  async submit() {
    const text = this.page.input.value.trim();
    if (!text || this.controller || !this.areSettingsValid()) return;
    this.page.input.value = "";
    this.page.hint.hidden = true;
    this.show(element("article", "message user", text));
    const asked = [...this.history, { role: "user", content: text }];
    const answer = new Answer();
    this.show(answer.node);
    this.history = asked; // what clear() may replace while the answer streams
    this.setBusy(true);
    try {
      await this.stream(asked, answer);
    } finally {
      if (this.history === asked && answer.text) {
        this.history = [...asked, { role: "assistant", content: answer.text }];
      } else if (this.history === asked) {
        this.history = asked.slice(0, -1); // unanswered: asked again, it stands there once
      }
      this.setBusy(false);
    }
  }

  areSettingsValid() {
    const form = this.page.settingsForm;
    if (form.checkValidity()) return true;
    form.closest("details").open = true; // the browser points at nothing that is folded away
    form.reportValidity();
    return false;
  }

  async stream(messages, answer) {
    const { signal } = this.controller;
    try {
      const response = await this.request(messages, signal);
      let usage = null;
      for await (const chunk of events(response)) {
        const follow = this.isAtEnd();
        chunk.choices.forEach((choice) => answer.add(choice));
        usage = chunk.usage ?? usage;
        if (follow) this.scrollToEnd();
      }
      answer.finish(usage);
    } catch (error) {
      if (signal.aborted) answer.stopped();
      else answer.failed(error.message);
    }
    this.scrollToEnd();
  }

  request(messages, signal) {
    const { system, parameters } = this.page.settings();
    const all = system ? [{ role: "system", content: system }, ...messages] : messages;
    const body = {
      model: this.page.model(),
      messages: all,
      stream: true,
      stream_options: { include_usage: true },
      ...parameters,
    };
    const headers = { "Content-Type": "application/json" };
    const options = { method: "POST", headers, body: JSON.stringify(body), signal };
    return call("/v1/chat/completions", options);
  }

  setBusy(isBusy) {
    this.controller = isBusy ? new AbortController() : null;
    this.page.send.hidden = isBusy;
    this.page.stop.hidden = !isBusy;
  }

  show(node) {
    this.page.messages.append(node);
    this.scrollToEnd();
  }

  // a reader who has scrolled up is left there
  isAtEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.page.messages;
    return scrollHeight - scrollTop - clientHeight < 40;
  }

  scrollToEnd() {
    this.page.messages.scrollTop = this.page.messages.scrollHeight;
  }
}
