"""Text to token ids and back, whatever file the vocabulary came in.

The ``tokenizers`` library is used directly: importing transformers would cost seconds at start-up,
and is needed only for vocabularies older than tokenizer.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from jaxllm.config import ModelError
from jaxllm.request_error import RequestError
from jaxllm.text.gguf_vocabulary import build_gguf_vocabulary
from jaxllm.text.piece_decoder import (
    ByteDecoder,
    ByteRule,
    PieceDecoder,
    TokenBytes,
    WindowDecoder,
    find_byte_rule,
)

SPECIAL_TOKEN_NAMES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
OLD_FORMATS = (("tokenizer.model",), ("vocab.json", "merges.txt"))


class Tokenizer:
    """A vocabulary with its special tokens and chat template.

    special_tokens: "bos_token", "eos_token", ... -> the token, as chat templates name them.
    special_token_ids: tokens that decoding leaves out unless told otherwise.
    """

    def __init__(
        self,
        backend: Backend,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        backend.no_truncation()  # a tokenizer.json may carry both from its training
        backend.no_padding()
        self.backend = backend
        self.special_tokens: Mapping[str, str] = dict(special_tokens or {})
        self.chat_template = chat_template
        added = backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        self.bos_token_id = self._special_id("bos_token")
        self.eos_token_id = self._special_id("eos_token")
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self._token_bytes: dict[bool, TokenBytes] = {}

    def _special_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.backend.token_to_id(token)

    def special_token_texts(self) -> dict[str, int]:
        """Special tokens by their text."""
        tokens = self.backend.get_added_tokens_decoder()
        return {tokens[i].content: i for i in self.special_token_ids}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids; with add_special_tokens those that the model expects around a text (BOS)."""
        # The library lets other threads run while it encodes a batch, but not one text.
        batch = [_checked_text(text)]
        [encoding] = self.backend.encode_batch_fast(batch, add_special_tokens=add_special_tokens)
        return encoding.ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids outside the vocabulary have none."""
        return self.backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_string(self, token_id: int) -> str:
        """One token's text for people to read: special tokens are shown, a leading space is kept,
        and bytes that are no whole character are U+FFFD."""
        if self._byte_rule is None:
            return self.backend.decode([token_id], skip_special_tokens=False)
        piece = self.token_bytes(skip_special_tokens=False)[token_id]
        return piece.decode(errors=self._byte_rule.errors)

    def bytes_of(self, token_id: int) -> bytes:
        """One token's bytes; those of its text if the vocabulary is not made of bytes."""
        if self._byte_rule is None:
            return self.token_string(token_id).encode()
        return bytes(self.token_bytes(skip_special_tokens=False)[token_id])

    def token_bytes(self, skip_special_tokens: bool) -> TokenBytes:
        """The table from token id to bytes; only where the decoder concatenates bytes."""
        assert self._byte_rule is not None
        table = self._token_bytes.get(skip_special_tokens)
        if table is None:
            skipped = self.special_token_ids if skip_special_tokens else frozenset()
            table = TokenBytes(self.backend, self._byte_rule, skipped)
            self._token_bytes[skip_special_tokens] = table
        return table

    def piece_decoder(
        self, prompt_token_ids: Sequence[int], skip_special_tokens: bool
    ) -> PieceDecoder:
        """An incremental decoder of the output that follows a prompt."""
        if self._byte_rule is None:
            return WindowDecoder(self.backend, prompt_token_ids, skip_special_tokens)
        pieces = self.token_bytes(skip_special_tokens)
        return ByteDecoder(pieces, self._byte_rule, prompt_token_ids)

    @cached_property
    def _byte_rule(self) -> ByteRule | None:
        return find_byte_rule(self.backend)


def load_tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes. Raises ModelError."""
    vocabulary = build_gguf_vocabulary(metadata)
    special = vocabulary.special_tokens
    _add_ends(vocabulary.backend, special, vocabulary.add_bos, vocabulary.add_eos)
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(vocabulary.backend, special, template if isinstance(template, str) else None)


def load_tokenizer_from_folder(folder: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face model folder. Raises ModelError if there is none, or a file
    is corrupt. No code of the folder is run.

    As in transformers 5, the post-processor of tokenizer.json decides about BOS and EOS;
    add_bos_token and add_eos_token of tokenizer_config.json are for older formats.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if not path.is_file():
        return _load_old_format(folder)
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise ModelError(f"{path} is not a usable tokenizer: {error}") from error
    config = _read_json(folder / "tokenizer_config.json")
    special = _special_tokens(config, _read_json(folder / "special_tokens_map.json"))
    _add_missing_tokens(backend, config, special)
    return Tokenizer(backend, special, _read_chat_template(folder, config))


def _load_old_format(folder: Path) -> Tokenizer:
    if not any(all((folder / name).is_file() for name in names) for names in OLD_FORMATS):
        raise ModelError(f"{folder} has no tokenizer.json (nor tokenizer.model) to tokenize with")
    from transformers import AutoTokenizer

    try:
        old = AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        )
        backend = old.backend_tokenizer
    except Exception as error:  # whatever its many converters raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{folder} has no tokenizer.json, and transformers cannot convert its tokenizer: "
            f"{lines[0]} (tokenizer.model needs the package sentencepiece)"
        ) from error
    template = old.chat_template if isinstance(old.chat_template, str) else None
    return Tokenizer(backend, old.special_tokens_map, template)


def _checked_text(text: str) -> str:
    if not isinstance(text, str):
        raise RequestError(
            f"text to tokenize must be a string, got {type(text).__name__}", param="prompt"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"text to tokenize is not valid Unicode: {error}", param="prompt"
        ) from error
    return text


def _add_ends(backend: Backend, special: Mapping[str, str], add_bos: bool, add_eos: bool) -> None:
    """Makes encode put BOS before and EOS after a text, as far as told and they exist."""
    bos, eos = special.get("bos_token"), special.get("eos_token")
    parts: list[str | int] = ["$A"]
    used: list[tuple[str, int]] = []
    for token, wanted, where in ((bos, add_bos, 0), (eos, add_eos, 2)):
        if token is not None and wanted:
            parts.insert(where, token)
            token_id = backend.token_to_id(token)
            assert token_id is not None, "special tokens are in the vocabulary"
            used.append((token, token_id))
    backend.post_processor = processors.TemplateProcessing(
        single=parts, pair=[*parts, "$B"], special_tokens=used
    )


def _special_tokens(config: dict[str, Any], tokens_map: dict[str, Any]) -> dict[str, str]:
    """A special token is written as a string or as an object with its "content"."""
    special = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = config[name] if name in config else tokens_map.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if value is None:
            continue
        if not isinstance(value, str) or not value:
            raise ModelError(f"tokenizer_config.json: {name} must be a string, got {value!r}")
        special[name] = value
    return special


def _add_missing_tokens(
    backend: Backend, config: dict[str, Any], special: Mapping[str, str]
) -> None:
    """tokenizer_config.json may name tokens that tokenizer.json does not know as whole tokens."""
    try:
        known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
        listed = _listed_tokens(config.get("added_tokens_decoder") or {})
        backend.add_tokens([token for token in listed if repr(token) not in known])
        extra = config.get("additional_special_tokens") or config.get("extra_special_tokens") or []
        extra = list(extra.values()) if isinstance(extra, dict) else extra
        extra = [token["content"] if isinstance(token, dict) else token for token in extra]
        names = {token.content for token in backend.get_added_tokens_decoder().values()}
        missing = [t for t in dict.fromkeys([*special.values(), *extra]) if t not in names]
        backend.add_tokens([AddedToken(token, special=True) for token in missing])
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise ModelError(f"tokenizer_config.json lists a malformed token: {error!r}") from error


def _listed_tokens(entries: Mapping[str, Any]) -> list[AddedToken]:
    return [
        AddedToken(**{name: value for name, value in entries[key].items() if name != "__type"})
        for key in sorted(entries, key=int)
    ]


def _read_chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ModelError(f"{path} is not UTF-8: {error}") from error
    template = _read_json(folder / "chat_template.json").get("chat_template")
    if template is None:
        template = config.get("chat_template")
    if isinstance(template, list):  # [{"name": "default", "template": ...}, ...]
        named = [e for e in template if isinstance(e, dict) and e.get("name") == "default"]
        template = named[0].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise ModelError(f"{folder}: the chat template must be a string, got {template!r:.80}")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
