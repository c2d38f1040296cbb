"""Small tokenizers made from a few sentences, and SmolLM2's real one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from small_vocabularies import gguf_byte_level, gguf_sentencepiece

from jaxllm.loading.gguf_header import read_header
from jaxllm.text.tokenizer import Tokenizer, load_tokenizer_from_gguf


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    return load_tokenizer_from_gguf(gguf_byte_level("gpt-2"))


@pytest.fixture(scope="session")
def sentencepiece() -> Tokenizer:
    return load_tokenizer_from_gguf(gguf_sentencepiece())


@pytest.fixture(scope="session")
def smollm2_metadata(smollm2_path: Path) -> Mapping[str, Any]:
    return read_header(smollm2_path)[0]


@pytest.fixture(scope="session")
def smollm2(smollm2_metadata: Mapping[str, Any]) -> Tokenizer:
    return load_tokenizer_from_gguf(smollm2_metadata)
