"""The header of a GGUF file: metadata and where each tensor lies.

The gguf package's own reader builds several numpy objects for each string of the vocabulary and
takes seconds; this one walks the same bytes in a fraction of a second and checks every length.
Format: github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from jaxllm.config import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class TensorInfo:
    """shape is numpy's order (rows first); offset counts from the start of the file."""

    name: str
    shape: tuple[int, ...]
    quantization: gguf.GGMLQuantizationType
    offset: int
    nbytes: int


class Metadata(Mapping[str, Any]):
    """Key to plain Python value. Arrays are decoded to lists when first asked for."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self._path = path
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _RawArray):
            value = self._values[key] = value.decode(f"{self._path}: key {key!r}")
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


@dataclass(frozen=True)
class _RawArray:
    items: list[bytes] | np.ndarray

    def decode(self, name: str) -> list[Any]:
        if isinstance(self.items, np.ndarray):
            return self.items.tolist()
        try:
            return [item.decode() for item in self.items]
        except UnicodeDecodeError as error:
            raise ModelError(f"{name} has a string that is not UTF-8; corrupt file") from error


def read_header(path: Path) -> tuple[Metadata, dict[str, TensorInfo]]:
    """Metadata and tensors of a GGUF file; raises ModelError naming the file."""
    try:
        with open(path, "rb") as file:
            if file.read(4) != MAGIC:
                raise ModelError(f"{path}: is not a GGUF file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                values, tensors = _Header(data).parse()
                return Metadata(path, values), tensors
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    except (struct.error, OverflowError, UnicodeDecodeError) as error:
        raise ModelError(f"{path}: corrupt or truncated GGUF file; fetch it again") from error
    except ModelError as error:
        text = str(error)
        raise ModelError(text if text.startswith(str(path)) else f"{path}: {text}") from error


class _Header:
    """A cursor over the file. Its struct.error means: the file ends early."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.position = len(MAGIC)

    def parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        (version,) = self.unpack("I")
        if version not in VERSIONS:
            supported = " and ".join(map(str, VERSIONS))
            raise ModelError(f"GGUF version {version} is not supported (only {supported})")
        num_tensors, num_keys = self.unpack("QQ")
        self.check_count(num_keys, 13)
        values: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.string().decode()
            if key in values:
                raise ModelError(f"corrupt GGUF file: key {key!r} occurs twice")
            values[key] = self.value(*self.unpack("I"))
        self.check_count(num_tensors, 24)
        infos = [self.tensor_info() for _ in range(num_tensors)]
        return values, self.place(infos, values.get("general.alignment"))

    def unpack(self, format: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + format, self.data, self.position)
        self.position += struct.calcsize("<" + format)
        return values

    def check_count(self, count: int, least_bytes: int) -> None:
        if count * least_bytes > self.size - self.position:
            raise ModelError(f"corrupt or truncated GGUF file: it claims {count} entries")

    def string(self) -> bytes:
        (length,) = self.unpack("Q")
        self.check_count(length, 1)
        self.position += length
        return self.data[self.position - length : self.position]

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string().decode()
        if kind == ARRAY:
            return self.array()
        if kind not in SCALARS:
            raise ModelError(f"corrupt GGUF file: unknown value type {kind}")
        return self.unpack(SCALARS[kind])[0]

    def array(self) -> _RawArray:
        kind, count = self.unpack("IQ")
        if kind == STRING:
            self.check_count(count, 8)
            return _RawArray(self.strings(count))
        if kind not in SCALARS:
            raise ModelError(f"GGUF arrays of value type {kind} are not supported")
        dtype = np.dtype("<" + SCALARS[kind])
        self.check_count(count, dtype.itemsize)
        # a copy: the mapping closes when the header is read
        items = np.frombuffer(self.data, dtype, count, self.position).copy()
        self.position += items.nbytes
        return _RawArray(items)

    def strings(self, count: int) -> list[bytes]:
        """As string(), but written for hundreds of thousands of them."""
        data, position, items = self.data, self.position, []
        unpack_length = struct.Struct("<Q").unpack_from
        for _ in range(count):
            start = position + 8
            position = start + unpack_length(data, position)[0]
            items.append(data[start:position])
        if position > self.size:
            raise ModelError("corrupt or truncated GGUF file: a string passes its end")
        self.position = position
        return items

    def tensor_info(self) -> TensorInfo:
        name = self.string().decode()
        (num_dims,) = self.unpack("I")
        if not 1 <= num_dims <= MAX_DIMENSIONS:
            raise ModelError(f"corrupt GGUF file: tensor {name!r} has {num_dims} dimensions")
        shape = self.unpack(f"{num_dims}Q")[::-1]
        kind, offset = self.unpack("IQ")
        try:
            quantization = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise ModelError(f"tensor {name!r} has the unknown type {kind}") from None
        block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
        if not all(shape) or shape[-1] % block:
            raise ModelError(
                f"corrupt GGUF file: tensor {name!r} has shape {list(shape)}, but "
                f"{quantization.name} comes in blocks of {block}"
            )
        return TensorInfo(
            name, shape, quantization, offset, math.prod(shape) // block * block_bytes
        )

    def place(self, infos: list[TensorInfo], alignment: Any) -> dict[str, TensorInfo]:
        """Offsets from the start of the file, checked: within it and without overlap."""
        alignment = DEFAULT_ALIGNMENT if alignment is None else alignment
        if type(alignment) is not int or alignment < 1:
            raise ModelError(f"corrupt GGUF file: general.alignment is {alignment!r}")
        start = end = -(-self.position // alignment) * alignment
        tensors = {}
        for info in sorted(infos, key=lambda info: info.offset):
            offset = start + info.offset
            if info.name in tensors or offset < end:
                raise ModelError(f"corrupt GGUF file: tensor {info.name!r} overlaps another one")
            end = offset + info.nbytes
            if end > self.size:
                raise ModelError(
                    f"truncated GGUF file: tensor {info.name!r} ends at byte {end} of {self.size}; "
                    f"fetch it again"
                )
            tensors[info.name] = TensorInfo(
                info.name, info.shape, info.quantization, offset, info.nbytes
            )
        return tensors
