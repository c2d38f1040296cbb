"""Reading safetensors: against the safetensors library, and each way a file can be broken."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxllm.config import ModelError
from jaxllm.loading.safetensors_source import SafetensorsSource

VALUES: dict[str, np.ndarray] = {
    "a": np.arange(24, dtype=np.float32).reshape(4, 6),
    "b": np.arange(5, dtype=np.float16),
    "c": np.arange(6).reshape(3, 1, 2).astype(ml_dtypes.bfloat16),
}


def write(path: Path, header: Any, data: bytes = b"") -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def entry(shape: Any, begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_values_shapes_and_dtypes_of_one_file(tmp_path: Path) -> None:
    save_file(VALUES, tmp_path / "model.safetensors", metadata={"format": "np"})
    source = SafetensorsSource(tmp_path)
    assert source.shapes == {name: value.shape for name, value in VALUES.items()}
    assert source.nbytes == sum(value.nbytes for value in VALUES.values())
    for name, value in VALUES.items():
        found = source.read(name)
        assert found.dtype == value.dtype
        np.testing.assert_array_equal(found, value)
        np.testing.assert_array_equal(source.read(name, 1, 3), value[1:3])


def test_shards_as_transformers_writes_them(save_tiny_model: Callable[..., Any]) -> None:
    folder, state = save_tiny_model("Llama", shard="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    source = SafetensorsSource(folder)
    assert set(source.shapes) == set(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(source.read(name), tensor.numpy())


def test_a_file_by_another_name_is_found(tmp_path: Path) -> None:
    save_file(VALUES, tmp_path / "weights.safetensors")
    assert set(SafetensorsSource(tmp_path).shapes) == set(VALUES)


BROKEN = [
    (b"not json", b"", "not JSON"),
    (b"[]", b"", "not a JSON object"),
    ({"a": 3}, b"", "'a' needs a dtype"),
    ({"a": entry([2], 0, 8) | {"data_offsets": [0]}}, b"", "'a' needs a dtype"),
    ({"a": entry([-2], 0, 8)}, bytes(8), "'a' needs a dtype"),
    ({"a": entry([2], 0, 8, "F8_E4M3")}, bytes(8), "dtype 'F8_E4M3'; supported: F32, F16, BF16"),
    ({"a": entry([2], 0, 12)}, bytes(12), r"'a' of shape \[2\] and F32 cannot have 12 bytes"),
    ({"a": entry([2], 8, 0)}, bytes(8), "cannot have -8 bytes"),
    ({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12), "'b' overlaps"),
    ({"a": entry([2], 0, 8), "b": entry([2], 16, 24)}, bytes(24), "leaves a gap"),
    ({"a": entry([1 << 40], 0, 1 << 42)}, bytes(8), "is truncated"),
    ({"a": entry([2], 0, 8)}, bytes(7), "is truncated"),
    ({"a": entry([2], 0, 8)}, bytes(9), "1 bytes that belong to no tensor"),
]


@pytest.mark.parametrize(("header", "data", "message"), BROKEN)
def test_a_broken_file_is_refused_by_name(
    tmp_path: Path, header: Any, data: bytes, message: str
) -> None:
    write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(ModelError, match=r"model\.safetensors: .*" + message):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("content", [b"", b"abc", b"\xff" * 64, struct.pack("<Q", 57) + b"{}"])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.safetensors: (is too short|claims a header)"):
        SafetensorsSource(tmp_path)


def test_a_file_that_shrinks_after_opening_is_an_error_of_its_own(tmp_path: Path) -> None:
    save_file(VALUES, tmp_path / "model.safetensors")
    source = SafetensorsSource(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:-110])
    with pytest.raises(ModelError, match=r"model\.safetensors: the file ends early"):
        source.read("a")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "gone.safetensors"}, r"gone\.safetensors: missing, but"),
        ({"z": "one.safetensors"}, r"one\.safetensors: has no tensor 'z'"),
        ({"a": "../one.safetensors"}, "not a plain file name"),
        ({"a": 1}, "'weight_map' must map"),
        (None, "'weight_map' must map"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: Any, message: str) -> None:
    save_file(VALUES, tmp_path / "one.safetensors")
    index = {"weight_map": weight_map}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        SafetensorsSource(tmp_path)


def test_pickled_weights_are_refused_with_what_would_do(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no \.safetensors file"):
        SafetensorsSource(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="convert them"):
        SafetensorsSource(tmp_path)


def test_several_files_need_an_index(tmp_path: Path) -> None:
    for name in ("x", "y"):
        save_file(VALUES, tmp_path / f"{name}.safetensors")
    with pytest.raises(ModelError, match=r"2 \.safetensors files but no model\.safetensors\.index"):
        SafetensorsSource(tmp_path)
