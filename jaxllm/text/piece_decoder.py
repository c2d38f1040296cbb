"""From token ids to text, a few tokens at a time.

Two decoders cover the models in use, and both are plain concatenation of bytes: ByteLevel (GPT-2,
Llama 3, Qwen) and SentencePiece's byte fallback (Llama 2, Mistral, Gemma). For these a token's
bytes are looked up in a table and fed to an incremental UTF-8 decoder, which is exact and costs
the same at any length. Every other decoder is asked again over a small window of tokens.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenizers import Tokenizer as Backend

REPLACEMENT = "\ufffd"
MAX_INCOMPLETE_BYTES = 3  # of a UTF-8 character
WINDOW_CONTEXT = 16  # prompt tokens that a windowed decode sees
MAX_WINDOW = 64  # tokens without a complete character before it is given up


class PieceDecoder(Protocol):
    """The text of one sequence's output, piece by piece."""

    def push(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens completed; never ends inside a character."""

    def finish(self) -> str:
        """What was held back, U+FFFD standing for bytes that are no character."""


@dataclass(frozen=True)
class ByteRule:
    """How a decoder that concatenates bytes makes text: a token's bytes, the codec error handler
    that says how invalid bytes are shown, and whether the first space of a text is dropped."""

    token_to_bytes: Callable[[str], bytes]
    errors: str
    drops_first_space: bool


def find_byte_rule(backend: Backend) -> ByteRule | None:
    """The rule of the tokenizer's decoder, or None if it is not one that concatenates bytes."""
    if backend.decoder is None:
        return None
    decoder = json.loads(backend.decoder.__getstate__())
    if decoder["type"] == "ByteLevel":
        return ByteRule(_byte_level_bytes, "replace", False)
    parts = decoder.get("decoders", [])
    if [part["type"] for part in parts[:3]] != ["Replace", "ByteFallback", "Fuse"]:
        return None
    pattern = parts[0]["pattern"].get("String")
    first_space = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if not pattern or parts[3:] not in ([], [first_space]):
        return None
    content = parts[0]["content"]
    return ByteRule(
        lambda token: _byte_fallback_bytes(token.replace(pattern, content)),
        "jaxllm_each_byte",
        bool(parts[3:]),
    )


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes: printable ones stand for themselves, the others for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(others)}


BYTE_LEVEL_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([BYTE_LEVEL_ALPHABET[char] for char in token])
    except KeyError:  # an added token: spelled as it is
        return token.encode()


def _byte_fallback_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.encode()


def _each_byte(error: UnicodeError) -> tuple[str, int]:
    """ByteFallback shows each invalid byte as one U+FFFD; "replace" would join some of them."""
    assert isinstance(error, UnicodeDecodeError)
    return REPLACEMENT * (error.end - error.start), error.end


codecs.register_error("jaxllm_each_byte", _each_byte)


class TokenBytes(dict[int, bytes]):
    """The bytes of each token id, filled when asked. An id outside the vocabulary has none."""

    def __init__(self, backend: Backend, rule: ByteRule, skipped: frozenset[int]) -> None:
        super().__init__()
        self._backend = backend
        self._rule = rule
        self._skipped = skipped

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped else self._backend.id_to_token(int(token_id))
        piece = b"" if token is None else self._rule.token_to_bytes(token)
        self[token_id] = piece
        return piece


class ByteDecoder:
    """Concatenates the tokens' bytes and decodes them as they come.

    One difference to ``Tokenizer.decode``: where byte-fallback tokens in a row are not valid
    UTF-8, that shows all of them as U+FFFD, valid characters too. Those may have been sent long
    before, so they are kept here.
    """

    def __init__(
        self, pieces: TokenBytes, rule: ByteRule, prompt_token_ids: Sequence[int] = ()
    ) -> None:
        self._pieces = pieces
        self._errors = rule.errors
        self._at_start = rule.drops_first_space and not any(pieces[t] for t in prompt_token_ids)
        self._pending = self._incomplete_end(prompt_token_ids)

    def _incomplete_end(self, prompt_token_ids: Sequence[int]) -> bytes:
        """A prompt may end inside a character, which the output then completes."""
        end = b""
        for token_id in reversed(prompt_token_ids):
            end = self._pieces[token_id] + end
            if len(end) >= MAX_INCOMPLETE_BYTES:
                break
        return end[codecs.utf_8_decode(end, self._errors, False)[1] :]

    def push(self, token_ids: Sequence[int]) -> str:
        pieces = self._pieces
        data = self._pending + b"".join([pieces[token_id] for token_id in token_ids])
        if self._at_start and data:
            self._at_start = False
            data = data.removeprefix(b" ")
        text, num_bytes = codecs.utf_8_decode(data, self._errors, False)
        self._pending = data[num_bytes:]
        return text

    def finish(self) -> str:
        text = codecs.utf_8_decode(self._pending, self._errors, True)[0]
        self._pending = b""
        return text


class WindowDecoder:
    """Any decoder: decodes the tokens since the last complete character together with the ones
    before them, and takes what is new. The same start on both sides makes leading spaces cancel.
    """

    def __init__(
        self, backend: Backend, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._backend = backend
        self._skip = skip_special_tokens
        self._window = [int(token_id) for token_id in prompt_token_ids[-WINDOW_CONTEXT:]]
        self._num_context = len(self._window)
        self._prefix = self._decode(self._window)

    def _decode(self, token_ids: list[int]) -> str:
        return self._backend.decode(token_ids, skip_special_tokens=self._skip)

    def push(self, token_ids: Sequence[int]) -> str:
        return "".join([self._push_one(int(token_id)) for token_id in token_ids])

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        num_new = len(self._window) - self._num_context
        if len(text) <= len(self._prefix):
            return ""
        if text.endswith(REPLACEMENT) and num_new < MAX_WINDOW:
            return ""
        return self._advance(text)

    def _advance(self, text: str) -> str:
        new = text[len(self._prefix) :]
        self._window = self._window[self._num_context :]
        self._num_context = len(self._window)
        self._prefix = self._decode(self._window)
        return new

    def finish(self) -> str:
        text = self._decode(self._window)
        return self._advance(text) if len(text) > len(self._prefix) else ""
