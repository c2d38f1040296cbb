"""How answers are written: as text, or as JSON lines."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol, TextIO

from jaxllm.cli.prompt_input import Job
from jaxllm.outputs import CompletionOutput, RequestOutput, TokenLogprobs

TITLE_LENGTH = 60  # characters of the prompt above its answer


class Writer(Protocol):
    """What generate tells of a job: outputs as they come (with a stream, pieces), or what failed.
    Each job gets any number of outputs that are not finished, then one last call."""

    def output(self, job: Job, output: RequestOutput) -> None: ...

    def error(self, job: Job, message: str) -> None: ...


class TextWriter:
    """Answers in the order of the prompts, with a title above each if there are several. What
    comes out of order waits its turn; the rest is written at once. Errors go to stderr."""

    def __init__(self, jobs: Sequence[Job], file: TextIO) -> None:
        self._file = file
        self._has_titles = sum(job.num_seqs for job in jobs) > 1
        self._parts = {
            (job.line, index): _Part(_title(job, index))
            for job in jobs
            for index in range(job.num_seqs)
        }
        self._unfinished = deque(self._parts.values())
        self._is_first = True

    def output(self, job: Job, output: RequestOutput) -> None:
        for completion in output.outputs:
            part = self._parts[job.line, completion.index]
            part.pieces.append(completion.text)
            part.is_finished = completion.finished()
        if output.finished:  # a search may have found fewer answers than were asked for
            self._finish(job)
        self._write()

    def error(self, job: Job, message: str) -> None:
        print(f"jaxllm: error: prompt {job.line}: {message}", file=sys.stderr)
        self._finish(job)
        self._write()

    def _finish(self, job: Job) -> None:
        for index in range(job.num_seqs):
            self._parts[job.line, index].is_finished = True

    def _write(self) -> None:
        while self._unfinished:
            part = self._unfinished[0]
            if part.pieces:  # there is one, if only an empty one, in every answer
                self._begin(part)
                self._file.write("".join(part.pieces))
                part.pieces.clear()
            if not part.is_finished:
                break
            if part.has_begun:
                self._file.write("\n")
            self._unfinished.popleft()
        self._file.flush()

    def _begin(self, part: _Part) -> None:
        if self._has_titles and not part.has_begun:
            self._file.write(f"{part.title}\n" if self._is_first else f"\n{part.title}\n")
        part.has_begun, self._is_first = True, False


@dataclasses.dataclass
class _Part:
    """One answer's text that is not written yet."""

    title: str
    pieces: list[str] = dataclasses.field(default_factory=list)
    has_begun: bool = False
    is_finished: bool = False


def _title(job: Job, index: int) -> str:
    text = job.text
    if text is None and job.messages is not None and job.messages:
        last = job.messages[-1]
        text = str(last.get("content")) if isinstance(last, dict) else None
    words = " ".join((text or "").split())
    if len(words) > TITLE_LENGTH:
        words = words[: TITLE_LENGTH - 1] + "…"
    number = f"{job.line}.{index + 1}" if job.num_seqs > 1 else str(job.line)
    return f"[{number}] {words}".rstrip()


class JsonWriter:
    """One object a line. Without a stream: one for each prompt, in order. With one: a piece of an
    answer each, as they come."""

    def __init__(self, jobs: Sequence[Job], file: TextIO, stream: bool) -> None:
        self._file = file
        self._stream = stream
        self._order = deque(job.line for job in jobs)
        self._ready: dict[int, dict[str, Any]] = {}

    def output(self, job: Job, output: RequestOutput) -> None:
        if self._stream:
            for completion in output.outputs:
                self._write({**_head(job), **_completion(completion)})
            if output.finished:
                self._write({**_head(job), **_of_prompt(output), "finished": True})
        elif output.finished:
            outputs = [_completion(completion) for completion in output.outputs]
            self._put(job, {**_head(job), **_of_prompt(output), "outputs": outputs})

    def error(self, job: Job, message: str) -> None:
        content = {**_head(job), "error": message}
        if self._stream:
            self._write(content)
        else:
            self._put(job, content)

    def _put(self, job: Job, content: dict[str, Any]) -> None:
        self._ready[job.line] = content
        while self._order and self._order[0] in self._ready:
            self._write(self._ready.pop(self._order.popleft()))

    def _write(self, content: dict[str, Any]) -> None:
        text = json.dumps(content, ensure_ascii=False)
        if not text.isascii():
            try:
                text.encode(self._file.encoding or "utf-8")
            except UnicodeEncodeError:  # half a surrogate pair in the user's own id, or LANG=C
                text = json.dumps(content)
        self._file.write(text + "\n")
        self._file.flush()


def _head(job: Job) -> dict[str, Any]:
    head: dict[str, Any] = {"line": job.line}
    return head if job.id is None else {"id": job.id, **head}


def _completion(completion: CompletionOutput) -> dict[str, Any]:
    """The fields of a CompletionOutput; those about log-probabilities only where asked for."""
    content: dict[str, Any] = {
        "index": completion.index,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.cumulative_logprob is not None:
        content["cumulative_logprob"] = completion.cumulative_logprob
    if completion.logprobs is not None:
        content["logprobs"] = [_logprobs(position) for position in completion.logprobs]
    return content


def _logprobs(position: TokenLogprobs) -> list[dict[str, Any]]:
    return [
        {"token_id": token_id, "token": p.decoded_token, "logprob": p.logprob, "rank": p.rank}
        for token_id, p in position.items()
    ]


def _of_prompt(output: RequestOutput) -> dict[str, Any]:
    content: dict[str, Any] = {
        "prompt": output.prompt,
        "num_prompt_tokens": len(output.prompt_token_ids),
        "num_cached_tokens": output.num_cached_tokens,
    }
    if output.prompt_logprobs is not None:
        content["prompt_logprobs"] = [
            None if position is None else _logprobs(position) for position in output.prompt_logprobs
        ]
    return content
