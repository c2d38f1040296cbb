// Puts the page together: model list, API key, chat and the engine's live view.

import { apiKey, call } from "./api.js";
import { Chat } from "./chat.js";
import { EngineView } from "./engine.js";

const byId = (id) => document.getElementById(id);

async function loadModels() {
  const { data } = await (await call("/v1/models")).json();
  const options = data.map(({ id }) => {
    const option = document.createElement("option");
    option.value = option.textContent = id;
    return option;
  });
  byId("model").replaceChildren(...options);
}

/** Sampling parameters that were filled in; the others are the model's to choose. */
function readSettings() {
  const parameters = {};
  let system = "";
  for (const { name, value } of byId("settings").elements) {
    if (name === "system") system = value.trim();
    else if (name && value !== "") parameters[name] = Number(value);
  }
  return { system, parameters };
}

function showStatus(text, isGood) {
  const status = byId("status");
  status.textContent = text;
  status.className = isGood ? "good" : "bad";
  if (isGood && !byId("model").options.length) loadModels().catch(() => {}); // tried again
}

new Chat({
  messages: byId("messages"),
  hint: byId("hint"),
  form: byId("composer"),
  input: byId("input"),
  send: byId("send"),
  stop: byId("stop"),
  clear: byId("clear"),
  settingsForm: byId("settings"),
  model: () => byId("model").value,
  settings: readSettings,
});

const view = new EngineView(byId, showStatus);
view.start();

byId("api-key").value = apiKey.get();
byId("api-key").addEventListener("input", (event) => {
  apiKey.set(event.target.value.trim());
  view.pollNow();
});
