"""A GGUF file: metadata, configuration and weights under Hugging Face names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np

from jaxllm.config import ModelConfig, ModelError
from jaxllm.loading.byte_ranges import read_bytes
from jaxllm.loading.gguf_config import GGUFTensors, model_config_from_gguf
from jaxllm.loading.gguf_header import TensorInfo, read_header

ROPE_FREQS = "rope_freqs.weight"  # part of the configuration, see gguf_config
STORED_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
CHUNK_ELEMENTS = 1 << 18  # float32 temporaries of this size stay in the core's cache

_TOP_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_ROTATED = re.compile(r"blk\.\d+\.attn_[qk]\.(weight|bias)")


def hugging_face_name(name: str) -> str:
    """The name in Hugging Face's checkpoints; an unknown one is returned as it is."""
    if match := _LAYER_TENSOR.fullmatch(name):
        layer, module, kind = match.groups()
        if module in _LAYER_NAMES:
            return f"model.layers.{layer}.{_LAYER_NAMES[module]}.{kind}"
    module, _, kind = name.rpartition(".")
    return f"{_TOP_NAMES[module]}.{kind}" if module in _TOP_NAMES else name


class GGUFFile:
    """One GGUF file, its header read once; shared by configuration, weights and tokenizer.

    metadata: plain Python values, lists for arrays. Raises ModelError for a file that is corrupt,
    truncated, or not GGUF.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        metadata, self.tensors = read_header(path)
        self.metadata: Mapping[str, Any] = metadata

    def config(self) -> ModelConfig:
        """The model's configuration; raises ModelError for what is missing or not supported."""
        embedding = self.tensors.get("token_embd.weight")
        if embedding is None:
            raise ModelError(f"{self.path}: has no tensor token_embd.weight")
        freqs = self.tensors.get(ROPE_FREQS)
        tensors = GGUFTensors(
            names=self.tensors.keys(),
            vocab_size=embedding.shape[0],
            checkpoint_dtype=self._checkpoint_dtype(),
            rope_freqs=None if freqs is None else lambda: _read_rows(self.path, freqs, 0, None),
        )
        try:
            return model_config_from_gguf(self.metadata, tensors)
        except ModelError as error:
            raise ModelError(f"{self.path}: {error}") from error

    def _checkpoint_dtype(self) -> str:
        query = self.tensors.get("blk.0.attn_q.weight")
        dtype = STORED_DTYPES.get(query.quantization.name) if query is not None else None
        return "bfloat16" if dtype is None else dtype.name

    def source(self) -> GGUFSource:
        """The weights."""
        return GGUFSource(self)


class GGUFSource:
    """The tensors of a GGUF file in Hugging Face's names and row order, dequantised when read.

    Raises ModelError listing the tensors whose quantisation is not supported.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.description = str(file.path)
        self._path = file.path
        infos = {name: info for name, info in file.tensors.items() if name != ROPE_FREQS}
        _check_quantization(file.path, infos)
        self._infos = {hugging_face_name(name): info for name, info in infos.items()}
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: info.shape for name, info in self._infos.items()
        }
        self.nbytes = sum(info.nbytes for info in infos.values())
        self._metadata = file.metadata

    @cached_property
    def _rotated_head_dim(self) -> int | None:
        """Head size if query and key rows are permuted in the file, as "llama" files have them."""
        if self._metadata.get("general.architecture") != "llama":
            return None
        width = self._metadata["llama.embedding_length"]
        num_heads = self._metadata["llama.attention.head_count"]
        return self._metadata.get("llama.attention.key_length", width // num_heads)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop of the first axis; float32 unless stored as F16 or BF16."""
        info = self._infos[name]
        head_dim = self._rotated_head_dim if _ROTATED.fullmatch(info.name) else None
        if head_dim is None:
            return _read_rows(self._path, info, start, stop)
        start, stop, _ = slice(start, stop).indices(info.shape[0])
        first = start // head_dim * head_dim  # whole heads, for the order within one changes
        last = -(-stop // head_dim) * head_dim
        rows = _unpermute(_read_rows(self._path, info, first, last), head_dim)
        return rows[start - first : stop - first]


def _unpermute(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """llama.cpp stores row i of a head's first half at 2i and of its second half at 2i + 1."""
    pairs = rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:])  # [heads, D/2, 2, ...]
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def _check_quantization(path: Path, infos: Mapping[str, TensorInfo]) -> None:
    unsupported = {
        info.quantization.name: name
        for name, info in infos.items()
        if info.quantization.name not in (*STORED_DTYPES, *QUANTIZED)
    }
    if unsupported:
        found = ", ".join(f"{kind} ({name})" for kind, name in unsupported.items())
        raise ModelError(
            f"{path}: unsupported tensor types: {found}; supported: "
            f"{', '.join((*STORED_DTYPES, *QUANTIZED))}"
        )


def _read_rows(path: Path, info: TensorInfo, start: int, stop: int | None) -> np.ndarray:
    start, stop, _ = slice(start, stop).indices(info.shape[0])
    if len(info.shape) == 1:  # one row to the quantisation
        return _read_block_rows(path, info, 0, 1).reshape(-1)[start:stop]
    return _read_block_rows(path, info, start, stop)


def _read_block_rows(path: Path, info: TensorInfo, start: int, stop: int) -> np.ndarray:
    """As float32 or stored; chunk by chunk, since numpy is slow on what leaves the cache."""
    num_rows = info.shape[0] if len(info.shape) > 1 else 1
    row_shape = info.shape[1:] if len(info.shape) > 1 else info.shape
    row_bytes = info.nbytes // num_rows
    data = read_bytes(path, info.offset + start * row_bytes, (stop - start) * row_bytes)
    shape = (stop - start, *row_shape)
    if (dtype := STORED_DTYPES.get(info.quantization.name)) is not None:
        return data.view(dtype).reshape(shape)
    blocks = data.reshape(stop - start, row_bytes)
    chunk = max(1, CHUNK_ELEMENTS // math.prod(row_shape))
    if len(blocks) <= chunk:
        return gguf.quants.dequantize(blocks, info.quantization).reshape(shape)
    out = np.empty((stop - start, math.prod(row_shape)), np.float32)
    for first in range(0, stop - start, chunk):
        rows = slice(first, first + chunk)
        out[rows] = gguf.quants.dequantize(blocks[rows], info.quantization)
    return out.reshape(shape)
