"""Quantised blocks against decoders that are written from ggml's layouts, value by value.

The layouts are the structs of ggml/src/ggml-common.h, the arithmetic is that of the
dequantize_row_* functions in ggml/src/ggml-quants.c (github.com/ggml-org/ggml).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter

from jaxllm.loading.gguf_source import QUANTIZED, GGUFFile

NUM_BLOCKS = 12


def half(data: bytes, position: int) -> float:
    return struct.unpack_from("<e", data, position)[0]


def q4_0(block: bytes) -> list[float]:
    """d, 16 bytes: low nibbles are the first 16 values, high nibbles the others; less 8."""
    d = half(block, 0)
    return [d * ((block[2 + i % 16] >> i // 16 * 4 & 15) - 8) for i in range(32)]


def q4_1(block: bytes) -> list[float]:
    """d, m, 16 bytes as in Q4_0, not shifted."""
    d, m = half(block, 0), half(block, 2)
    return [d * (block[4 + i % 16] >> i // 16 * 4 & 15) + m for i in range(32)]


def q5_0(block: bytes) -> list[float]:
    """d, 32 fifth bits, 16 bytes of nibbles; less 16."""
    d, fifth = half(block, 0), int.from_bytes(block[2:6], "little")
    low = [block[6 + i % 16] >> i // 16 * 4 & 15 for i in range(32)]
    return [d * ((low[i] | (fifth >> i & 1) << 4) - 16) for i in range(32)]


def q5_1(block: bytes) -> list[float]:
    """d, m, 32 fifth bits, 16 bytes of nibbles."""
    d, m, fifth = half(block, 0), half(block, 2), int.from_bytes(block[4:8], "little")
    low = [block[8 + i % 16] >> i // 16 * 4 & 15 for i in range(32)]
    return [d * (low[i] | (fifth >> i & 1) << 4) + m for i in range(32)]


def q8_0(block: bytes) -> list[float]:
    """d, 32 signed bytes."""
    return [half(block, 0) * q for q in struct.unpack_from("32b", block, 2)]


def q2_k(block: bytes) -> list[float]:
    """scales[16] (low nibble scale, high nibble minimum), qs[64], d, dmin. Sub-blocks of 16. Each
    32 bytes hold 128 values: four planes of two bits, each plane's 32 values in byte order."""
    d, dmin = half(block, 80), half(block, 82)
    values = []
    for i in range(256):
        plane = i % 128 // 32
        q = block[16 + i // 128 * 32 + i % 32] >> 2 * plane & 3
        scale = block[i // 16]
        values.append(d * (scale & 15) * q - dmin * (scale >> 4))
    return values


def q3_k(block: bytes) -> list[float]:
    """hmask[32], qs[64] as in Q2_K, scales[12], d. A value is the two bits, less 4 where its bit of
    hmask is not set; bit b of byte j is that of value 32 b + j. Scales are 6 bits, less 32."""
    d = half(block, 108)
    packed = block[96:108]
    values = []
    for i in range(256):
        low = block[32 + i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
        is_high = block[i % 32] >> i // 32 & 1
        j = i // 16
        scale = packed[j % 8] >> j // 8 * 4 & 15 | (packed[8 + j % 4] >> j // 4 * 2 & 3) << 4
        values.append(d * (scale - 32) * (low - (0 if is_high else 4)))
    return values


def scale_and_minimum(packed: bytes, j: int) -> tuple[int, int]:
    """get_scale_min_k4: eight pairs of six bits in 12 bytes, of the 32 values of sub-block j."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return (
        packed[j + 4] & 15 | packed[j - 4] >> 6 << 4,
        packed[j + 4] >> 4 | packed[j] >> 6 << 4,
    )


def q4_k(block: bytes) -> list[float]:
    """d, dmin, scales[12], qs[128]: each 32 bytes hold 64 values, first the low nibbles."""
    d, dmin = half(block, 0), half(block, 2)
    values = []
    for i in range(256):
        scale, minimum = scale_and_minimum(block[4:16], i // 32)
        q = block[16 + i // 64 * 32 + i % 32] >> i % 64 // 32 * 4 & 15
        values.append(d * scale * q - dmin * minimum)
    return values


def q5_k(block: bytes) -> list[float]:
    """d, dmin, scales[12], qh[32], qs[128] as in Q4_K; bit b of qh[j] is the fifth of value
    32 b + j."""
    d, dmin = half(block, 0), half(block, 2)
    values = []
    for i in range(256):
        scale, minimum = scale_and_minimum(block[4:16], i // 32)
        q = block[48 + i // 64 * 32 + i % 32] >> i % 64 // 32 * 4 & 15
        q |= (block[16 + i % 32] >> i // 32 & 1) << 4
        values.append(d * scale * q - dmin * minimum)
    return values


def q6_k(block: bytes) -> list[float]:
    """ql[128], qh[64], scales[16] signed, d. Each half of 128 values has 64 bytes of ql, first the
    low nibbles, and 32 bytes of qh, four planes of two bits; less 32."""
    d = half(block, 208)
    scales = struct.unpack_from("16b", block, 192)
    values = []
    for i in range(256):
        k, r = divmod(i, 128)
        low = block[64 * k + r % 64] >> r // 64 * 4 & 15
        high = block[128 + 32 * k + r % 32] >> r // 32 * 2 & 3
        values.append(d * scales[i // 16] * ((low | high << 4) - 32))
    return values


# and where in a block its float16 scales stand
DECODERS: dict[str, tuple[Callable[[bytes], list[float]], tuple[int, ...]]] = {
    "Q4_0": (q4_0, (0,)),
    "Q4_1": (q4_1, (0, 2)),
    "Q5_0": (q5_0, (0,)),
    "Q5_1": (q5_1, (0, 2)),
    "Q8_0": (q8_0, (0,)),
    "Q2_K": (q2_k, (80, 82)),
    "Q3_K": (q3_k, (108,)),
    "Q4_K": (q4_k, (0, 2)),
    "Q5_K": (q5_k, (0, 2)),
    "Q6_K": (q6_k, (208,)),
}


def test_each_quantised_type_has_a_decoder() -> None:
    assert set(DECODERS) == set(QUANTIZED)


@pytest.mark.parametrize("name", DECODERS)
def test_random_blocks_are_decoded_as_their_layout_says(tmp_path: Path, name: str) -> None:
    decode, scale_positions = DECODERS[name]
    kind = GGMLQuantizationType[name]
    size, num_bytes = gguf.GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (NUM_BLOCKS, num_bytes), dtype=np.uint8)
    for position in scale_positions:  # any bits could be infinite
        scales = rng.uniform(-1, 1, (NUM_BLOCKS, 1)).astype("<f2")
        blocks[:, position : position + 2] = scales.view(np.uint8)
    expected = np.array([decode(block.tobytes()) for block in blocks])  # [blocks, size]

    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("output.weight", blocks.reshape(4, -1), raw_dtype=kind)  # 3 blocks a row
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = GGUFFile(tmp_path / "m.gguf").source().read("lm_head.weight")
    assert found.shape == (4, 3 * size)
    # ours is float32: three roundings of what the decoder has in float64
    largest = np.abs(expected).max()
    np.testing.assert_allclose(found.reshape(NUM_BLOCKS, size), expected, atol=largest * 2**-21)
