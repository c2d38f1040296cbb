"""jaxllm chat: a conversation in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any

from jaxllm.cli.settings import UsageError, read_settings
from jaxllm.outputs import CompletionOutput
from jaxllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from jaxllm.prompts import TokenizedPrompt
    from jaxllm.startup import RunningEngine

NOT_IN_CHAT = ("n", "best_of", "logprobs", "prompt_logprobs", "detokenize")
HELP = "/exit or Ctrl-D leaves, /reset forgets, Ctrl-C stops an answer"
ANSWER_TOKENS = 256  # room for an answer, at most a quarter of the context, before history goes
# A model's text must not move the cursor or set colours.
CONTROL = {code: None for code in (*range(32), *range(127, 160)) if code not in (9, 10)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What only this command has."""
    parser.add_argument("--system", metavar="TEXT", help="what the model is told at first")


def run(arguments: argparse.Namespace) -> int:
    """Talks until the user leaves."""
    settings = read_settings(arguments)
    for name in NOT_IN_CHAT:
        if name in settings.sampling:
            raise UsageError(f"{name} has no place in a chat; use jaxllm generate")
    if sys.stdin is None or sys.stdin.closed:
        raise UsageError("standard input is closed: nobody to talk with")
    from jaxllm.startup import start_engine

    assert settings.model is not None
    running = start_engine(settings.model, settings.engine_options(max_num_seqs=1))
    try:
        if running.tokenizer.chat_template is None:
            raise UsageError(f"{settings.model} has no chat template; use jaxllm generate")
        sampling = {"max_tokens": None, **running.default_sampling, **settings.sampling}
        _talk(Conversation(running, sampling, arguments.system), settings.model)
    finally:
        if not arguments.ends_process:  # else its end frees all, and does not wait for compilation
            running.close()
    return 0


def _talk(conversation: Conversation, model: str) -> None:
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):  # not everywhere; it gives input() its editing
            import readline  # noqa: F401
        notice(f"{model}: {HELP}")
    while True:
        try:
            line = _read_line(is_terminal).strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            if not is_terminal:
                raise
            print(file=sys.stderr)
            notice(HELP)
            continue
        if line == "/exit":
            break
        if line == "/reset":
            conversation.reset()
            notice("forgotten")
        elif re.fullmatch(r"/[a-z]+", line):
            notice(f"{line}: unknown; {HELP}")
        elif line:
            conversation.answer(line)


def _read_line(is_terminal: bool) -> str:
    if is_terminal:
        try:
            return input("> ")
        except EOFError:
            print()  # the shell's prompt comes on a line of its own
            raise
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line


def notice(text: str) -> None:
    """A line that is no part of the answer."""
    print(f"[{text}]", file=sys.stderr, flush=True)


class Interrupts:
    """Ctrl-C while an answer comes. The first is noted, and the answer ends between two steps: an
    exception in the midst of one would cost the engine its cache. The second ends the program."""

    def __init__(self) -> None:
        self.seen = False

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only the main thread may set a handler, and only it is interrupted
            return
        before = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True


class Conversation:
    """The messages so far, and an engine that adds to them."""

    def __init__(
        self, running: RunningEngine, sampling: Mapping[str, Any], system: str | None
    ) -> None:
        self._running = running
        self._engine = running.engine
        self._params = SamplingParams.from_dict(sampling)
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = []
        self._num_requests = 0

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages.clear()

    def answer(self, text: str) -> None:
        """Writes the model's answer as it comes and keeps it, also if it is cut short. A message
        that cannot be answered is not kept."""
        self.messages.append({"role": "user", "content": text})
        interrupts = Interrupts()
        with interrupts.caught():
            try:
                request_id = self._add(self._fitting_prompt())
            except ValueError as error:
                self.messages.pop()
                notice(f"not sent: {error}")
                return
            pieces: list[str] = []
            last = self._stream(request_id, pieces, interrupts)
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        sys.stdout.write("\n")
        sys.stdout.flush()
        self._explain(last)

    def _add(self, prompt: TokenizedPrompt) -> str:
        from jaxllm.prompts import params_of_kind

        params = params_of_kind(self._params, {}, RequestOutputKind.DELTA)
        request_id = str(self._num_requests)
        self._num_requests += 1
        self._engine.add_request(self._running.request(request_id, prompt, params))
        return request_id

    def _fitting_prompt(self) -> TokenizedPrompt:
        """The conversation without its oldest exchanges, if it would not fit otherwise."""
        from jaxllm.prompts import tokenize_chat

        longest = self._engine.config.max_model_len
        room = min(self._params.max_tokens or ANSWER_TOKENS, ANSWER_TOKENS, longest // 4)
        num_dropped = 0
        while True:
            prompt = tokenize_chat([*self._system, *self.messages], self._running.tokenizer)
            if len(prompt.token_ids) + room <= longest or len(self.messages) == 1:
                break
            del self.messages[:2]  # a question and its answer
            num_dropped += 1
        if num_dropped:
            notice(f"the context of {longest} tokens is full: forgot the oldest {num_dropped} "
                   f"exchange{'s' if num_dropped > 1 else ''}")  # fmt: skip
        return prompt

    def _stream(
        self, request_id: str, pieces: list[str], interrupts: Interrupts
    ) -> CompletionOutput:
        """Writes the pieces and collects them; the last output."""
        is_terminal = sys.stdout.isatty()
        was_aborted = False
        while True:
            if interrupts.seen and not was_aborted:
                was_aborted = True
                self._engine.abort(request_id)
            for output in self._engine.step():
                for completion in output.outputs:
                    pieces.append(completion.text)
                    shown = completion.text.translate(CONTROL) if is_terminal else completion.text
                    sys.stdout.write(shown)
                    sys.stdout.flush()
                if output.finished:
                    return output.outputs[-1]

    def _explain(self, last: CompletionOutput) -> None:
        """Why the answer ended, if not by itself."""
        if last.finish_reason == "abort":
            notice("stopped")
        elif last.finish_reason == "error":
            notice(f"the engine failed: {self._engine.last_error}")
        elif last.finish_reason == "length":
            notice("cut off: max_tokens or the context's end")
