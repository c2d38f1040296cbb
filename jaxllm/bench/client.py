"""A client of OpenAI's streams, /v1/completions and /v1/chat/completions, that takes the time."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np

from jaxllm.bench.metrics import Record
from jaxllm.bench.vocabulary import WORDS, Prompt, Vocabulary

TOTAL_SECONDS = 6 * 3600.0  # after which a request has failed
REPLY_SECONDS = 30.0  # for what is asked beside the requests
READ_BYTES = 1 << 22  # longest line of a stream
ERROR_CHARS = 300
ENDPOINTS = ("/v1/completions", "/v1/chat/completions")


@dataclass(frozen=True)
class Target:
    """A server. body: fields of every request beside prompt and max_tokens."""

    base_url: str
    model: str
    endpoint: str = "/v1/completions"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        return self.endpoint.endswith("chat/completions")

    def url(self, path: str) -> str:
        """The address of a path on this server."""
        return self.base_url.rstrip("/") + path


@dataclass
class Dialogue:
    """What was said, in the form the endpoint takes: messages, or one prompt that grows."""

    is_chat: bool
    prompt: Prompt = ""
    messages: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, prompt: Prompt) -> None:
        """Adds the user's next words. Token ids are for completions and cannot be continued."""
        if self.is_chat:
            self.messages.append({"role": "user", "content": prompt})
        elif isinstance(prompt, str) and isinstance(self.prompt, str):
            self.prompt += prompt if not self.prompt else f"\n{prompt}"
        else:
            self.prompt = prompt

    def answer(self, text: str) -> None:
        """Adds the server's."""
        if self.is_chat:
            self.messages.append({"role": "assistant", "content": text})
        elif isinstance(self.prompt, str):
            self.prompt += text

    def body(self) -> dict[str, Any]:
        return {"messages": self.messages} if self.is_chat else {"prompt": self.prompt}


def new_session(target: Target) -> aiohttp.ClientSession:
    """With as many connections as there are requests."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=TOTAL_SECONDS),
        headers=target.headers,
        read_bufsize=READ_BYTES,
    )


async def stream(
    session: aiohttp.ClientSession,
    target: Target,
    dialogue: Dialogue,
    prompt_len: int,
    output_len: int,
) -> Record:
    """Sends one request and takes its times. Whatever goes wrong is in the record's error."""
    body = {
        "model": target.model,
        **dialogue.body(),
        "max_tokens": output_len,
        "stream": True,
        "stream_options": {"include_usage": True},
        **target.body,
    }
    record = Record(start_time=time.perf_counter(), prompt_len=prompt_len)
    reader = _StreamReader(record, target.is_chat)
    try:
        async with session.post(target.url(target.endpoint), json=body) as response:
            if response.status != 200:
                raise ValueError(f"HTTP {response.status}: {_one_line(await response.text())}")
            async for line in response.content:
                reader.take(line)
        reader.finish()
    except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
        record.error = _reason(error)
        record.latency = time.perf_counter() - record.start_time
    return record


class _StreamReader:
    """Writes what a stream's lines say into a record."""

    def __init__(self, record: Record, is_chat: bool) -> None:
        self._record = record
        self._is_chat = is_chat
        self._last = record.start_time
        self._num_chunks = 0
        self._is_complete = False  # it said that it had ended
        self._usage: Mapping[str, Any] = {}
        self._texts: list[str] = []

    def take(self, line: bytes) -> None:
        """Raises ValueError for what is no chunk."""
        if not line.startswith(b"data:"):
            return
        content = line[5:].strip()
        if content == b"[DONE]":
            self._is_complete = True
            return
        now = time.perf_counter()
        try:
            chunk = json.loads(content)
        except ValueError:
            raise ValueError(f"the stream has a chunk that is not JSON: {content!r:.80}") from None
        if not isinstance(chunk, dict):
            raise ValueError(f"the stream has a chunk that is no object: {content!r:.80}")
        if "error" in chunk:
            raise ValueError(f"the stream failed: {_one_line(json.dumps(chunk['error']))}")
        self._usage = chunk.get("usage") or self._usage
        if chunk.get("choices"):
            self._take_choice(chunk["choices"][0], now)

    def _take_choice(self, choice: Mapping[str, Any], now: float) -> None:
        is_last = choice.get("finish_reason") is not None
        self._is_complete |= is_last
        delta = choice.get("delta") or {} if self._is_chat else {"content": choice.get("text")}
        said = [delta.get(key) for key in ("reasoning", "reasoning_content", "content")]
        self._texts.append(delta.get("content") or "")
        # A chat's first chunk has but a role and its last one but a reason: neither is a token.
        is_empty = not any(said) and not delta.get("tool_calls")
        if self._is_chat and is_empty and (not is_last or self._num_chunks):
            return
        record = self._record
        if self._num_chunks:
            record.itls.append(now - self._last)
        else:
            record.ttft = now - record.start_time
        self._num_chunks += 1
        self._last = now
        record.latency = now - record.start_time

    def finish(self) -> None:
        """At the end of the response. Raises ValueError if it came too early."""
        record = self._record
        record.text = "".join(self._texts)
        if not self._is_complete:
            raise ValueError("the stream ended midway: no finish_reason and no [DONE]")
        if not self._num_chunks:
            raise ValueError("the stream had no token")
        record.output_len = self._usage.get("completion_tokens") or self._num_chunks
        record.prompt_len = self._usage.get("prompt_tokens") or record.prompt_len


def _one_line(text: str) -> str:
    return " ".join(text.split())[:ERROR_CHARS]


def _reason(error: Exception) -> str:
    if isinstance(error, ValueError):
        return str(error)
    if isinstance(error, aiohttp.ClientPayloadError):
        return f"the stream ended midway: {_one_line(str(error))}"
    return f"{type(error).__name__}: {_one_line(str(error))}".rstrip(": ")


# ---- what is asked before a run


async def find_model(session: aiohttp.ClientSession, target: Target) -> str:
    """The first model that the server lists. Raises ValueError if there is no such server."""
    url = target.url("/v1/models")
    reply = await _ask(session, "GET", url)
    try:
        return str(reply["data"][0]["id"])
    except (TypeError, KeyError, IndexError):
        raise ValueError(f"{url} lists no model; give --model NAME") from None


async def server_vocabulary(session: aiohttp.ClientSession, target: Target) -> Vocabulary:
    """The token ids that the server's /tokenize makes of common words; the words themselves from
    a server that has no such route, or for chats."""
    if target.is_chat:
        return Vocabulary()
    body = {"model": target.model, "prompt": " ".join(WORDS), "add_special_tokens": False}
    try:
        reply = await _ask(session, "POST", target.url("/tokenize"), body)
        token_ids = np.unique(np.asarray(reply["tokens"], int))
    except (ValueError, TypeError, KeyError):
        return Vocabulary()
    if token_ids.ndim != 1 or not len(token_ids):
        return Vocabulary()
    return Vocabulary(token_ids)


async def _ask(session: aiohttp.ClientSession, method: str, url: str, body: Any = None) -> Any:
    timeout = aiohttp.ClientTimeout(total=REPLY_SECONDS)
    try:
        async with session.request(method, url, json=body, timeout=timeout) as response:
            if response.status != 200:
                text = _one_line(await response.text())
                raise ValueError(f"{url}: HTTP {response.status}: {text}")
            return await response.json(content_type=None)
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise ValueError(f"{url}: no answer: {_reason(error)}") from None


async def check_server(
    session: aiohttp.ClientSession, target: Target, dialogue: Dialogue, output_len: int
) -> None:
    """One request that is not measured, as a first test and to warm up. Raises ValueError."""
    record = await stream(session, target, dialogue, 0, output_len)
    if record.error:
        raise ValueError(f"{target.url(target.endpoint)}: {record.error}")


def split_headers(headers: Sequence[str]) -> dict[str, str]:
    """K=V to a mapping. Raises ValueError."""
    found = {}
    for header in headers:
        name, equals, value = header.partition("=")
        if not name or not equals:
            raise ValueError(f"--header must be NAME=VALUE, got {header!r}")
        found[name.strip()] = value.strip()
    return found
