"""What an operator may say about the server. No heavy imports: the command line reads it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

COUNTS = (
    "max_body_bytes", "max_headers", "max_header_bytes", "max_json_depth", "max_completions",
    "max_total_tokens", "max_stop_strings", "max_stop_chars", "max_logit_bias",
)  # fmt: skip
SECONDS = (
    "request_timeout", "header_timeout", "body_timeout", "write_timeout", "keep_alive_seconds",
    "hang_seconds",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What an operator may say about the server.

    served_model_name: names that requests may use; the first is the one answers carry. Empty: a
    short form of the model's own name.
    api_key: keys that open every route but /health and /ready; none: all are open.
    max_queued_requests: answers that may wait beyond those that the engine computes at once.
    request_timeout: seconds after which a request ends with "timeout"; None: never.
    drain_seconds: how long running requests may go on after SIGTERM.
    cors_origin: origins whose pages may call the server; "*" for all.
    max_completions: prompts x n of a request. max_total_tokens: that times max_tokens.
    header_timeout, body_timeout: seconds in which a client must have sent them.
    write_timeout: seconds in which the client of a stream must have read something, once what it
    has not read fills the buffers.
    keep_alive_seconds: a stream that is silent for so long gets a comment.
    hang_seconds: a step that takes longer counts as hung, and /health says so.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: tuple[str, ...] = ()
    api_key: tuple[str, ...] = ()
    api_key_file: Path | None = None
    max_queued_requests: int = 256
    request_timeout: float | None = None
    drain_seconds: float = 30.0
    tls_cert: Path | None = None
    tls_key: Path | None = None
    cors_origin: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    max_headers: int = 100
    max_header_bytes: int = 8190
    max_json_depth: int = 64
    max_completions: int = 256
    max_total_tokens: int = 2**20
    max_stop_strings: int = 16
    max_stop_chars: int = 1024
    max_logit_bias: int = 1024
    header_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    keep_alive_seconds: float = 15.0
    hang_seconds: float = 120.0
    log_format: str = "text"
    metrics_prefix: str = "jaxllm"
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be in [0, 65535], got {self.port}")
        for name in COUNTS:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.max_queued_requests < 0:
            raise ValueError(
                f"max_queued_requests must not be negative, got {self.max_queued_requests}"
            )
        for name in SECONDS:
            value = getattr(self, name)
            if value is not None and not 0 < value < 1e9:
                raise ValueError(f"{name} must be a positive number of seconds, got {value}")
        if not 0 <= self.drain_seconds < 1e9:
            raise ValueError(f"drain_seconds must not be negative, got {self.drain_seconds}")
        self._check_texts()

    def _check_texts(self) -> None:
        if self.log_format not in ("text", "json"):
            raise ValueError(f"log_format must be text or json, got {self.log_format!r}")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together; give both or neither")
        for name in ("served_model_name", "api_key", "cors_origin"):
            if not all(getattr(self, name)):
                raise ValueError(f"{name} must not be empty text")
        if not all(key.isascii() and key.isprintable() for key in self.api_key):
            raise ValueError("api_key must be printable ASCII, since it travels in a header")

    def all_keys(self) -> tuple[str, ...]:
        """All keys, those of the file included. Raises ValueError if the file cannot be used."""
        if self.api_key_file is None:
            return self.api_key
        try:
            text = self.api_key_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"api_key_file {self.api_key_file} cannot be read: {error}") from error
        found = tuple(line.strip() for line in text.splitlines())
        found = tuple(key for key in found if key and not key.startswith("#"))
        if not found:
            raise ValueError(f"api_key_file {self.api_key_file} holds no key; write one a line")
        if not all(key.isascii() and key.isprintable() for key in found):
            raise ValueError(f"api_key_file {self.api_key_file}: keys must be printable ASCII")
        return self.api_key + found


OPTION_NAMES = tuple(field.name for field in fields(ServerOptions))
