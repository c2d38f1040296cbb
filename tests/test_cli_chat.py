"""jaxllm chat: history, commands, a full context, Ctrl-C."""

from __future__ import annotations

import io
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from held_command import Hold, hold

from jaxllm import LLM, SamplingParams
from jaxllm.cli import main

GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
GREEDY_FLAGS = ("--temperature", "0", "--max-tokens", "8", "--ignore-eos")
CUT = "[cut off: max_tokens or the context's end]\n"

Chat = Callable[..., tuple[int, str, str]]
Ask = Callable[[list[str]], str]


def flags_of(options: dict[str, Any]) -> list[str]:
    flags = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, str(value)]
    return flags


@pytest.fixture
def chat(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_llama_folder: Path,
    tiny_llm: dict[str, Any],
) -> Chat:
    """A conversation in this process; the user's lines come from a pipe."""

    def run(lines: list[str], *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
        code = main(["chat", str(tiny_llama_folder), *flags_of(tiny_llm), *GREEDY_FLAGS, *flags])
        out, err = capsys.readouterr()
        return code, out, err

    return run


@pytest.fixture(scope="module")
def llm(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[LLM]:
    with LLM(str(tiny_llama_folder), **tiny_llm) as llm:
        yield llm


@pytest.fixture(scope="module")
def ask(llm: LLM) -> Ask:
    """The answer to a conversation: the user's and the model's messages in turn."""

    def answer(texts: list[str], system: str | None = None) -> str:
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages += [
            {"role": "assistant" if i % 2 else "user", "content": text}
            for i, text in enumerate(texts)
        ]
        return llm.chat(messages, GREEDY, use_tqdm=False)[0].outputs[0].text

    return answer


def test_answers_know_what_was_said_before(chat: Chat, ask: Ask) -> None:
    first = ask(["The fox"])
    second = ask(["The fox", first, "Once"])
    assert second != ask(["Once"])  # else nothing is shown
    assert chat(["The fox", "", "Once"]) == (0, f"{first}\n{second}\n", CUT * 2)


def test_reset_forgets_and_exit_leaves(chat: Chat, ask: Ask) -> None:
    code, out, err = chat(["The fox", "/reset", "Once", "/dance", "/exit", "never asked"])
    assert (code, out) == (0, f"{ask(['The fox'])}\n{ask(['Once'])}\n")
    notices = err.replace(CUT, "").splitlines()
    assert notices[0] == "[forgotten]"
    assert notices[1].startswith("[/dance: unknown; /exit or Ctrl-D leaves")
    assert len(notices) == 2


def test_system_message_outlives_a_reset(chat: Chat, llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "The fox"}]
    answer = llm.chat(messages, GREEDY, use_tqdm=False)[0].outputs[0].text
    _, out, _ = chat(["/reset", "The fox"], "--system", "Be brief")
    assert out == f"{answer}\n"


def test_a_full_context_drops_the_oldest_exchange(chat: Chat, ask: Ask, llm: LLM) -> None:
    long = "fox " * 80
    num_tokens = len(llm.get_tokenizer().encode(long))
    assert 256 / 4 < num_tokens < 256 / 3  # so that three messages do not fit, but two do
    first = ask([long])
    second = ask([long, first, long])
    third = ask([long, second, long])
    _, out, err = chat([long, long, long])
    assert out == f"{first}\n{second}\n{third}\n"
    assert "[the context of 256 tokens is full: forgot the oldest 1 exchange]\n" in err


def test_a_message_that_is_too_long_is_not_kept(chat: Chat, ask: Ask) -> None:
    code, out, err = chat(["fox " * 300, "The fox"])
    assert (code, out) == (0, f"{ask(['The fox'])}\n")
    assert err.startswith("[not sent: the prompt has ")


def test_a_failed_step_does_not_end_the_conversation(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no device")

    monkeypatch.setattr("jaxllm.runtime.model_runner.ModelRunner.execute", fail)
    code, out, err = chat(["The fox", "/reset"])
    assert (code, out) == (0, "\n")
    assert "[the engine failed: RuntimeError: no device]\n[forgotten]\n" in err


def test_a_model_without_a_template_cannot_chat(
    chat: Chat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jaxllm.text.tokenizer._read_chat_template", lambda *_: None)
    code, out, err = chat(["The fox"])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "has no chat template; use jaxllm generate" in err


class Terminal:
    """A chat in a process of its own, on a pseudo-terminal."""

    def __init__(self, held: Hold, *words: str) -> None:
        self._screen, child_side = os.openpty()
        self.seen = ""
        self.held = held
        self.child = subprocess.Popen(
            held.command("chat", *words),
            stdin=child_side,
            stdout=child_side,
            stderr=child_side,
            env={**held.environment(), "TERM": "dumb"},
            pass_fds=(held.read_fd,),
        )
        os.close(child_side)

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self._screen, text.encode())

    def wait_for(self, what: Callable[[str], bool], seconds: float = 60) -> str:
        deadline = time.monotonic() + seconds
        while not what(self.seen):
            assert select.select([self._screen], [], [], deadline - time.monotonic())[0], self.seen
            self.seen += os.read(self._screen, 4096).decode(errors="replace")
        return self.seen

    def interrupt_until(self, what: Callable[[str], bool]) -> str:
        """Ctrl-C while the user's line is awaited. Python's input() misses a signal that comes
        between its prompt and its wait: after a silence it is sent again."""
        self.seen = ""
        for _ in range(20):
            self.child.send_signal(signal.SIGINT)
            if select.select([self._screen], [], [], 3)[0]:
                break
        return self.wait_for(what)

    def close(self) -> None:
        self.child.kill()
        self.child.wait()
        os.close(self._screen)


@pytest.fixture
def terminal(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[Terminal]:
    flags = ("--temperature", "0", "--ignore-eos")
    with hold() as held:
        terminal = Terminal(held, str(tiny_llama_folder), *flags_of(tiny_llm), *flags)
        yield terminal
        terminal.close()


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Terminal) -> None:
    terminal.wait_for(lambda seen: seen.endswith("> "))
    terminal.type("The fox\n")
    echo = "The fox\r\n"
    terminal.wait_for(lambda seen: len(seen) > len(echo))  # the answer has begun
    terminal.child.send_signal(signal.SIGINT)
    terminal.held.release()
    seen = terminal.wait_for(lambda seen: seen.endswith("> "))
    assert seen.endswith("\r\n[stopped]\r\n> ")
    assert "cut off" not in seen  # it did not run to the end of the context

    # where nothing is to be stopped: a hint
    seen = terminal.interrupt_until(lambda seen: seen.endswith("> "))
    assert "[/exit or Ctrl-D leaves" in seen

    terminal.type("\x04")  # Ctrl-D
    assert terminal.child.wait(timeout=60) == 0
