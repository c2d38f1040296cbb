"""Logs for operators: one line a request, as text or JSON, that no client can forge.

Never in them: prompts, answers, keys. Control characters and all that is not ASCII are escaped, so
a line stays a line and a terminal shows what is there.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

logger = logging.getLogger("jaxllm.access")

FIELDS = "fields"  # of a LogRecord: what its JSON line has beside the usual
_PLAIN = re.compile(r"[A-Za-z0-9._:/{}()+*-]+")


@dataclass
class RequestRecord:
    """What the line of one HTTP request says. The routes fill in what they learn: token counts,
    ttft in seconds and finish_reason stay None for requests that never reach the engine.
    client_request_id: what the client calls it, which is also what the response says.
    aborted: the client left before the end."""

    request_id: str
    method: str
    route: str
    status: int = 0
    model: str | None = None
    num_prompt_tokens: int | None = None
    num_output_tokens: int | None = None
    num_cached_tokens: int | None = None
    ttft: float | None = None
    duration: float = 0.0
    finish_reason: str | None = None
    aborted: bool = False
    client_request_id: str | None = None

    def add(
        self, num_prompt: int, num_output: int, num_cached: int, ttft: float | None, reason: str
    ) -> None:
        """One request to the engine has ended; an HTTP request may make several."""
        self.num_prompt_tokens = (self.num_prompt_tokens or 0) + num_prompt
        self.num_output_tokens = (self.num_output_tokens or 0) + num_output
        self.num_cached_tokens = (self.num_cached_tokens or 0) + num_cached
        if ttft is not None:
            self.ttft = ttft if self.ttft is None else min(ttft, self.ttft)
        self.finish_reason = self.finish_reason or reason


def log_request(record: RequestRecord) -> None:
    """Writes the line."""
    fields = {name: value for name, value in asdict(record).items() if value is not None}
    for name in ("ttft", "duration"):
        if name in fields:
            fields[name] = round(fields[name], 6)
    logger.info("request", extra={FIELDS: fields})


class JsonFormatter(logging.Formatter):
    """A JSON object a line: time, level, logger, message, then the record's fields."""

    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content)  # ASCII only, and no control character is left


class TextFormatter(logging.Formatter):
    """Time, level and message, then name=value. A traceback follows indented, so that no line of
    it can be taken for a record."""

    def format(self, record: logging.LogRecord) -> str:
        fields = getattr(record, FIELDS, {})
        parts = [_time(record), record.levelname, escape(record.getMessage())]
        parts += [f"{name}={_value(value)}" for name, value in fields.items()]
        text = " ".join(parts)
        if record.exc_info:
            trace = self.formatException(record.exc_info).split("\n")
            text += "".join(f"\n  | {escape(line)}" for line in trace)
        return text


def configure_logging(
    log_format: str = "text", level: int = logging.INFO, stream: TextIO | None = None
) -> logging.Handler:
    """Sends everything that jaxllm logs to a stream (stderr by default), in one of the formats
    "text" and "json". Called again, it replaces its handler, which it returns."""
    if log_format not in ("text", "json"):
        raise ValueError(f"log_format must be text or json, got {log_format!r}")
    handler = _Handler(stream if stream is not None else sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger("jaxllm")
    for other in [old for old in root.handlers if isinstance(old, _Handler)]:
        root.removeHandler(other)
    root.addHandler(handler)
    root.setLevel(level)
    root.propagate = False
    return handler


class _Handler(logging.StreamHandler[TextIO]):
    """Marks the handler that is ours."""


def escape(text: str) -> str:
    """The text in printable ASCII, with \\x1b, \\n and \\u2028 for what is not."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        char if char.isascii() and char.isprintable() else ascii(char)[1:-1] for char in text
    )


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")


def _value(value: Any) -> str:
    """As it is if that cannot be misread, else as JSON."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text if _PLAIN.fullmatch(text) else json.dumps(value)
