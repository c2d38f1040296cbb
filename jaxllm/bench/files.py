"""Workloads from files: sharegpt's format, and traces with timestamps."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.bench.vocabulary import Prompt, Vocabulary
from jaxllm.bench.workloads import (
    MAX_PROMPT_LEN,
    MAX_TOTAL_LEN,
    MIN_LEN,
    TRACE_BLOCK,
    Conversation,
    WorkloadOptions,
    single,
)

TRACE_KEYS = ("timestamp", "prompt", "input_length", "output_length", "hash_ids")


def read_text(path: str) -> str:
    """Raises ValueError with the file's name."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8: {error}") from error


def read_json(path: str) -> Any:
    """Raises ValueError with the file's name."""
    try:
        return json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path}: is not valid JSON: {error}") from error


def read_sharegpt(options: WorkloadOptions, vocabulary: Vocabulary) -> list[Conversation]:
    """The first exchange of conversations in random order, without the very short and long ones,
    again from the beginning if there are fewer than num_prompts."""
    assert options.dataset_path is not None
    content = read_json(options.dataset_path)
    if not isinstance(content, list):
        raise ValueError(f"{options.dataset_path}: must be a JSON list of conversations")
    exchanges = [e for e in (_exchange(options.dataset_path, c) for c in content) if e is not None]
    order = np.random.default_rng(options.seed).permutation(len(exchanges))
    found: list[Conversation] = []
    for index in order:
        conversation = _sharegpt_turn(exchanges[index], options, vocabulary)
        if conversation is not None:
            found.append(conversation)
        if len(found) == options.num_prompts:
            return found
    if not found:
        raise ValueError(
            f"{options.dataset_path}: has no exchange of {MIN_LEN} to {MAX_PROMPT_LEN} prompt "
            f"tokens and at most {MAX_TOTAL_LEN} in all"
        )
    return [found[i % len(found)] for i in range(options.num_prompts)]


def _exchange(path: str, content: Any) -> tuple[str, str] | None:
    """The first two messages' texts; None if there are fewer."""
    try:
        messages = content["conversations"]
        texts = [message["value"] for message in messages[:2]]
    except (TypeError, KeyError) as error:
        raise ValueError(
            f'{path}: must be a list of {{"conversations": [{{"from": ..., "value": TEXT}}, ...]}}'
        ) from error
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path}: a message's value must be a string")
    return (texts[0], texts[1]) if len(texts) == 2 else None


def _sharegpt_turn(
    exchange: tuple[str, str], options: WorkloadOptions, vocabulary: Vocabulary
) -> Conversation | None:
    prompt, answer = exchange
    prompt_len = vocabulary.count(prompt)
    fixed = options.sharegpt_output_len
    output_len = fixed or vocabulary.count(answer)
    is_short = prompt_len < MIN_LEN or (fixed is None and output_len < MIN_LEN)
    if is_short or prompt_len > MAX_PROMPT_LEN or prompt_len + output_len > MAX_TOTAL_LEN:
        return None
    return single(prompt, prompt_len, output_len)


def read_trace(options: WorkloadOptions, vocabulary: Vocabulary) -> list[Conversation]:
    """At most num_prompts requests of a file with an object a line: timestamp, output_length, and
    prompt (a text) or input_length with optional hash_ids (each a block of TRACE_BLOCK tokens that
    is the same wherever the id is). Time begins with the first."""
    path = options.dataset_path
    assert path is not None
    unit = {"s": 1.0, "ms": 1e-3}[options.trace_time_unit]
    rng = np.random.default_rng(options.seed)
    found: list[Conversation] = []
    first = previous = -math.inf
    for where, fields in _trace_lines(path):
        if len(found) == options.num_prompts:
            break
        timestamp = _number(where, fields, "timestamp", float)
        if timestamp < previous:
            raise ValueError(
                f"{where}: timestamps must not decrease, got {timestamp:g} after {previous:g}"
            )
        first = timestamp if not found else first
        previous = timestamp
        prompt, prompt_len = _trace_prompt(where, fields, options.seed, vocabulary, rng)
        output_len = _number(where, fields, "output_length", int)
        found.append(single(prompt, prompt_len, output_len, unit * (timestamp - first)))
    if not found:
        raise ValueError(f"{path}: the trace is empty")
    return found


def _trace_lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: is not valid JSON: {error}") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{where}: must be a JSON object, got {type(fields).__name__}")
        if unknown := [key for key in fields if key not in TRACE_KEYS]:
            raise ValueError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(TRACE_KEYS)}")
        yield where, fields


def _number(where: str, fields: dict[str, Any], name: str, kind: type) -> Any:
    value: Any = fields.get(name)
    is_number = isinstance(value, int | kind) and not isinstance(value, bool)
    least = 0 if kind is float else 1
    if not is_number or not least <= value < math.inf:
        what = "a number" if kind is float else "an integer"
        raise ValueError(f"{where}: {name} must be {what} of at least {least}, got {value!r}")
    return value


def _trace_prompt(
    where: str, fields: dict[str, Any], seed: int, vocabulary: Vocabulary, rng: np.random.Generator
) -> tuple[Prompt, int]:
    if ("prompt" in fields) == ("input_length" in fields):
        raise ValueError(f"{where}: needs either prompt or input_length")
    prompt, hash_ids = fields.get("prompt"), fields.get("hash_ids", [])
    if prompt is not None:
        if not isinstance(prompt, str) or not prompt or hash_ids:
            raise ValueError(f"{where}: prompt must be a text, and has no hash_ids")
        return prompt, vocabulary.count(prompt)
    length = _number(where, fields, "input_length", int)
    if not isinstance(hash_ids, list) or not all(type(i) is int and i >= 0 for i in hash_ids):
        raise ValueError(f"{where}: hash_ids must be a list of integers")
    units: list[int] = []
    for hash_id in hash_ids:
        if len(units) < length:
            units += vocabulary.draw(TRACE_BLOCK, np.random.default_rng([seed, 2, hash_id]))
    units = units[:length]
    return vocabulary.prompt([*units, *vocabulary.draw(length - len(units), rng)]), length
