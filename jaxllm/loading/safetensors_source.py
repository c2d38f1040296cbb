"""safetensors files: one, or many with an index. Format: huggingface.co/docs/safetensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from jaxllm.config import ModelError
from jaxllm.loading.byte_ranges import read_bytes
from jaxllm.loading.config_json import read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: offset is from the start of the file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SafetensorsSource:
    """The tensors of a model folder. Headers are read and checked at once, data when asked for.

    Raises ModelError naming the file: none there, a shard missing, truncated or overlapping data,
    a dtype other than float32, float16 and bfloat16.
    """

    def __init__(self, folder: Path) -> None:
        self.description = str(folder)
        self._tensors = _find_tensors(folder)
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tensor.shape for name, tensor in self._tensors.items()
        }
        self.nbytes = sum(tensor.nbytes for tensor in self._tensors.values())

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop of the first axis, in the stored dtype."""
        tensor = self._tensors[name]
        if not tensor.shape:
            return read_bytes(tensor.file, tensor.offset, tensor.nbytes).view(tensor.dtype)[0]
        start, stop, _ = slice(start, stop).indices(tensor.shape[0])
        row_bytes = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        data = read_bytes(
            tensor.file, tensor.offset + start * row_bytes, (stop - start) * row_bytes
        )
        return data.view(tensor.dtype).reshape(stop - start, *tensor.shape[1:])


def _find_tensors(folder: Path) -> dict[str, StoredTensor]:
    if (folder / INDEX_FILE).exists():
        return _indexed(folder)
    files = [folder / SINGLE_FILE]
    if not files[0].exists():
        files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return read_file_header(files[0])
    if files:
        raise ModelError(f"{folder}: has {len(files)} .safetensors files but no {INDEX_FILE}")
    if list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        raise ModelError(
            f"{folder}: has only pickled PyTorch weights, which are not read because they can run "
            f"code; convert them with transformers' save_pretrained(..., safe_serialization=True)"
        )
    raise ModelError(f"{folder}: has no .safetensors file")


def _indexed(folder: Path) -> dict[str, StoredTensor]:
    path = folder / INDEX_FILE
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ModelError(f"{path}: 'weight_map' must map tensor names to file names")
    tensors: dict[str, StoredTensor] = {}
    headers: dict[str, dict[str, StoredTensor]] = {}
    for name, shard in weight_map.items():
        if shard not in headers:
            if Path(shard).name != shard:  # an index must not lead out of its folder
                raise ModelError(f"{path}: {shard!r} is not a plain file name")
            if not (folder / shard).is_file():
                raise ModelError(f"{folder / shard}: missing, but {INDEX_FILE} lists it")
            headers[shard] = read_file_header(folder / shard)
        if name not in headers[shard]:
            raise ModelError(f"{folder / shard}: has no tensor {name!r}, but {INDEX_FILE} says so")
        tensors[name] = headers[shard][name]
    return tensors


def read_file_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file. Raises ModelError for whatever the format does not allow."""
    try:
        size = path.stat().st_size
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    if size < 8:
        raise ModelError(f"{path}: is too short for a safetensors file")
    header_bytes = int(read_bytes(path, 0, 8).view("<u8")[0])
    if header_bytes > MAX_HEADER_BYTES or header_bytes > size - 8:
        raise ModelError(
            f"{path}: claims a header of {header_bytes} bytes in a file of {size}; "
            f"it is truncated or no safetensors file"
        )
    try:
        header = json.loads(read_bytes(path, 8, header_bytes).tobytes())
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path}: its header is not JSON; it is no safetensors file") from error
    if not isinstance(header, dict):
        raise ModelError(f"{path}: its header is not a JSON object")
    header.pop("__metadata__", None)
    start = 8 + header_bytes
    tensors = {name: _stored_tensor(path, name, entry, start) for name, entry in header.items()}
    _check_layout(path, tensors, start, size)
    return tensors


def _stored_tensor(path: Path, name: str, entry: Any, start: int) -> StoredTensor:
    fields = entry if isinstance(entry, dict) else {}
    shape, offsets = fields.get("shape"), fields.get("data_offsets")
    if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
        raise ModelError(f"{path}: tensor {name!r} needs a dtype, a shape and two data_offsets")
    if entry.get("dtype") not in DTYPES:
        raise ModelError(
            f"{path}: tensor {name!r} has dtype {entry.get('dtype')!r}; supported: "
            f"{', '.join(DTYPES)}"
        )
    dtype = DTYPES[entry["dtype"]]
    begin, end = offsets
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ModelError(
            f"{path}: tensor {name!r} of shape {shape} and {entry['dtype']} cannot have "
            f"{end - begin} bytes"
        )
    return StoredTensor(path, dtype, tuple(shape), start + begin, end - begin)


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_layout(path: Path, tensors: dict[str, StoredTensor], start: int, size: int) -> None:
    """The format packs tensors without gaps or overlaps up to the end of the file."""
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if tensor.offset != position:
            raise ModelError(f"{path}: tensor {name!r} overlaps another one or leaves a gap")
        position += tensor.nbytes
    if position > size:
        raise ModelError(f"{path}: is truncated, it has {size} of {position} bytes; fetch it again")
    if position < size:
        raise ModelError(f"{path}: has {size - position} bytes that belong to no tensor")
