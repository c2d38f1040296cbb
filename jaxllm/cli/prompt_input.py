"""Prompts from flags, files and standard input."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxllm.cli.settings import UsageError
from jaxllm.sampling_params import SamplingParams

PROMPT_KEYS = ("prompt", "messages", "prompt_token_ids")


@dataclass(frozen=True)
class Job:
    """One prompt. Exactly one of text, token_ids, messages and error is there.

    line: its line in the input, from 1. id: the user's, handed back. options: sampling options of
    this line, over the command's. error: what is wrong with the line.
    """

    line: int
    id: Any = None
    text: str | None = None
    token_ids: Sequence[int] | None = None
    messages: Sequence[Mapping[str, Any]] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    priority: int = 0
    num_seqs: int = 1
    error: str | None = None


def text_jobs(lines: Iterable[str], num_seqs: int) -> list[Job]:
    """A prompt a line; empty lines are passed over."""
    numbered = ((i, line.rstrip("\r\n")) for i, line in enumerate(lines, 1))
    return [Job(i, text=line, num_seqs=num_seqs) for i, line in numbered if line.strip()]


def jsonl_jobs(lines: Iterable[str], sampling: Mapping[str, Any]) -> list[Job]:
    """An object a line; what is wrong with one becomes its job's error."""
    return [_jsonl_job(i, line, sampling) for i, line in enumerate(lines, 1) if line.strip()]


def _jsonl_job(number: int, line: str, sampling: Mapping[str, Any]) -> Job:
    given_id = None
    try:
        fields = json.loads(line)
        if not isinstance(fields, dict):
            raise ValueError(f"must be a JSON object, got {type(fields).__name__}")
        given_id = fields.pop("id", None)
        return _parse(number, given_id, fields, sampling)
    except json.JSONDecodeError as error:
        return Job(number, error=f"is not valid JSON: {error.msg} (column {error.colno})")
    except RecursionError:
        return Job(number, error="is nested too deeply")
    except ValueError as error:
        return Job(number, given_id, error=str(error))


def _parse(number: int, given_id: Any, fields: dict[str, Any], sampling: Mapping[str, Any]) -> Job:
    given = [key for key in PROMPT_KEYS if key in fields]
    if len(given) != 1:
        found = "has none" if not given else f"has {' and '.join(given)}"
        raise ValueError(f"needs one of {', '.join(PROMPT_KEYS)}; it {found}")
    key = given[0]
    prompt = fields.pop(key)
    priority = fields.pop("priority", 0)
    params = SamplingParams.from_dict({**sampling, **fields})
    kind, what = (str, "a string") if key == "prompt" else (list, "a list")
    if not isinstance(prompt, kind):
        raise ValueError(f"{key} must be {what}, got {type(prompt).__name__}")
    name = {"prompt": "text", "prompt_token_ids": "token_ids"}.get(key, key)
    content: dict[str, Any] = {name: prompt}
    return Job(number, given_id, options=fields, priority=priority, num_seqs=params.n, **content)


def read_lines(path: str | None) -> list[str]:
    """The lines of a file, of standard input for None or "-". Raises UsageError."""
    if path is None or path == "-":
        if sys.stdin is None or sys.stdin.closed:
            raise UsageError("no prompts: standard input is closed; give --prompt TEXT")
        if sys.stdin.isatty():
            print("Prompts, one a line; Ctrl-D ends them:", file=sys.stderr)
        return _decoded("standard input", lambda: sys.stdin.readlines())
    return _decoded(path, lambda: _read_file(Path(path)))


def _read_file(path: Path) -> list[str]:
    with open(path, encoding="utf-8-sig") as file:  # -sig: some editors begin a file with a BOM
        return file.readlines()


def _decoded(name: str, read: Any) -> list[str]:
    try:
        return read()
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: is not UTF-8: {error}") from error
    except OSError as error:
        raise UsageError(f"{name}: cannot be read: {error.strerror}") from error
