"""jaxllm generate: prompts in, answers out."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from jaxllm.beam_search_params import BeamSearchParams
from jaxllm.cli import beams
from jaxllm.cli.answers import JsonWriter, TextWriter, Writer
from jaxllm.cli.prompt_input import Job, jsonl_jobs, read_lines, text_jobs
from jaxllm.cli.settings import Settings, UsageError, read_settings
from jaxllm.outputs import RequestOutput
from jaxllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from jaxllm.startup import RunningEngine

SMALL_BATCH = 8  # sequences; an engine for so many needs few programs and a small pool
JSONL_ONLY = ("logprobs", "prompt_logprobs", "detokenize")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What only this command has."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", action="append", metavar="TEXT", help="may be repeated")
    source.add_argument("--prompts-file", metavar="FILE", help="default, and for -: standard input")
    formats = ("text", "jsonl")
    parser.add_argument(
        "--input-format",
        choices=formats,
        help="text: a prompt a line; jsonl (default for a .jsonl file): objects with prompt, "
        "messages or prompt_token_ids, and optional id, priority and sampling options",
    )
    parser.add_argument("--output-format", choices=formats, default="text")
    parser.add_argument("--output", metavar="FILE", help="instead of standard output")
    parser.add_argument("--stream", action="store_true", help="write answers as they come")
    parser.add_argument(
        "--chat", action="store_true", help="text prompts are a user's message in a chat"
    )
    beams.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """The exit code: 1 if a prompt was not answered. What is wrong with the command, and whatever
    ends it early, is raised."""
    settings = read_settings(arguments)
    searching = beams.beam_options(arguments)
    if searching is not None:
        beams.search_params(searching, settings.sampling, {})
    is_text = arguments.output_format == "text"
    if is_text:
        _check_text_output(settings.sampling)
    jobs = _read_jobs(arguments, settings)
    if not jobs:
        raise UsageError("no prompts: the input is empty")
    good = [job for job in jobs if job.error is None]
    if is_text:
        for job in good:
            _check_text_output(job.options, f"line {job.line}: ")
    with _open_output(arguments.output) as file:
        writer: Writer = (
            TextWriter(jobs, file) if is_text else JsonWriter(jobs, file, arguments.stream)
        )
        for job in jobs:
            if job.error is not None:
                writer.error(job, job.error)
        num_failed = len(jobs) - len(good)
        if good:
            with _progress(len(good), arguments.stream) as advance:
                num_failed += _answer(good, settings, writer, arguments, searching, advance)
    return 1 if num_failed else 0


def _check_text_output(options: Mapping[str, Any], where: str = "") -> None:
    for name in JSONL_ONLY:
        value = options.get(name)
        if value is not None and value is not True:  # 1 == True
            raise UsageError(f"{where}{name} has no place in text; use --output-format jsonl")


def _read_jobs(arguments: argparse.Namespace, settings: Settings) -> list[Job]:
    num_seqs = SamplingParams.from_dict(settings.sampling).n
    if arguments.prompt is not None:
        if arguments.input_format == "jsonl":
            raise UsageError("--input-format jsonl is for files and standard input, not --prompt")
        return [Job(i, text=t, num_seqs=num_seqs) for i, t in enumerate(arguments.prompt, 1)]
    path = arguments.prompts_file
    lines = read_lines(path)
    is_jsonl = arguments.input_format == "jsonl" or (
        arguments.input_format is None and path is not None and Path(path).suffix == ".jsonl"
    )
    return jsonl_jobs(lines, settings.sampling) if is_jsonl else text_jobs(lines, num_seqs)


@contextlib.contextmanager
def _open_output(path: str | None) -> Iterator[TextIO]:
    if path is None:
        yield sys.stdout
        return
    try:
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UsageError(f"--output {path}: cannot be written: {error.strerror}") from error
    with file:
        yield file


@contextlib.contextmanager
def _progress(total: int, stream: bool) -> Iterator[Callable[[], Any]]:
    """A progress bar on a terminal, when there is something to wait for."""
    if stream or total == 1 or sys.stderr is None or not sys.stderr.isatty():
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc="prompts", file=sys.stderr) as bar:
        yield bar.update


def _answer(
    jobs: Sequence[Job],
    settings: Settings,
    writer: Writer,
    arguments: argparse.Namespace,
    searching: Mapping[str, Any] | None,
    advance: Callable[[], Any],
) -> int:
    """Starts the engine and answers; the number of prompts that failed."""
    from jaxllm.startup import start_engine

    per_prompt = SamplingParams.from_dict(settings.sampling).num_sequences
    if searching is not None:
        per_prompt = searching["beam_width"]
    num_seqs = max(sum(job.num_seqs for job in jobs), per_prompt * len(jobs))
    defaults: dict[str, Any] = {}
    if num_seqs <= SMALL_BATCH:  # most programs would be compiled for nothing
        max_num_seqs = 1 if num_seqs == 1 else SMALL_BATCH
        defaults = {"max_num_seqs": max_num_seqs, "compilation": "on_demand"}
    assert settings.model is not None
    options = settings.engine_options(**defaults)
    running = start_engine(settings.model, options)
    # The process's end frees all. It does not wait for compilation, unless the program at hand is
    # one that the next run needs as well.
    closes = not arguments.ends_process
    try:
        kind = RequestOutputKind.DELTA if arguments.stream else RequestOutputKind.FINAL_ONLY
        generation = _Generation(
            running, settings.sampling, searching, kind, arguments.chat, writer, advance
        )
        num_failed = generation.run(jobs)
        closes |= options.compilation == "on_demand" and options.program_cache
    finally:
        if closes:
            running.close()
    return num_failed


class _Generation:
    """Keeps the engine full until all jobs are answered."""

    def __init__(
        self,
        running: RunningEngine,
        sampling: Mapping[str, Any],
        searching: Mapping[str, Any] | None,
        kind: RequestOutputKind,
        chat: bool,
        writer: Writer,
        advance: Callable[[], Any],
    ) -> None:
        self._running = running
        self._engine = running.engine
        self._sampling = sampling
        self._searching = searching
        self._kind = kind
        self._chat = chat
        self._writer = writer
        self._advance = advance
        self._live: dict[str, Job] = {}
        self._num_failed = 0

    def run(self, jobs: Sequence[Job]) -> int:
        """The number of jobs that failed. Only some jobs are in the engine at a time: the first
        answer does not wait until the last prompt is tokenized."""
        waiting = deque(jobs)
        most = 2 * self._engine.config.max_num_seqs
        while waiting or self._live:
            while waiting and len(self._live) < most and self._engine.has_room:
                self._add(waiting.popleft())
            for output in self._engine.step():
                self._take(output)
        return self._num_failed

    def _add(self, job: Job) -> None:
        try:
            params, search = self._params(job)
            prompt = self._tokenize(job)
            request = self._running.request(
                str(job.line), prompt, params, priority=job.priority, beam_search=search
            )
            self._engine.add_request(request)
        except ValueError as error:
            self._fail(job, str(error))
        else:
            self._live[request.request_id] = job

    def _params(self, job: Job) -> tuple[SamplingParams, BeamSearchParams | None]:
        from jaxllm.prompts import params_of_kind

        if self._searching is not None:
            search = beams.search_params(self._searching, self._sampling, job.options)
            return search.sampling_params(), search
        options = {**self._running.default_sampling, **self._sampling, **job.options}
        return params_of_kind(SamplingParams.from_dict(options), {}, self._kind), None

    def _tokenize(self, job: Job) -> Any:
        from jaxllm.prompts import tokenize_chat, tokenize_prompt

        tokenizer = self._running.tokenizer
        if job.messages is not None:
            return tokenize_chat(list(job.messages), tokenizer)  # type: ignore[arg-type]
        if job.token_ids is not None:
            return tokenize_prompt({"prompt_token_ids": job.token_ids}, tokenizer)
        assert job.text is not None
        if self._chat:
            return tokenize_chat([{"role": "user", "content": job.text}], tokenizer)
        return tokenize_prompt(job.text, tokenizer)

    def _take(self, output: RequestOutput) -> None:
        job = self._live[output.request_id]
        if any(completion.finish_reason == "error" for completion in output.outputs):
            self._engine.abort(output.request_id)
            del self._live[output.request_id]
            self._fail(job, f"the engine failed: {self._engine.last_error}")
            return
        self._writer.output(job, output)
        if output.finished:
            del self._live[output.request_id]
            self._advance()

    def _fail(self, job: Job, message: str) -> None:
        self._num_failed += 1
        self._writer.error(job, message)
        self._advance()
