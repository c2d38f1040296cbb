"""GGUF files written with the gguf package, read back by ours."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from jaxllm.config import ModelError, RopeConfig
from jaxllm.loading.gguf_source import GGUFFile, hugging_face_name

KEYS: dict[str, Any] = {
    "block_count": 2,
    "context_length": 256,
    "embedding_length": 32,
    "feed_forward_length": 48,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 5e5,
}
TOKENS = ["<s>", "</s>", "é", "▁a"]


def write_gguf(
    path: Path,
    arch: str = "llama",
    keys: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
    tokenizer: dict[str, Any] | None = None,
) -> Path:
    """A small file; a key whose value is None is left out."""
    writer = GGUFWriter(path, arch)
    for key, value in {**KEYS, **(keys or {})}.items():
        name = f"{arch}.{key}" if not key.startswith("split") else key
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.5, -1.0, 2.0, 0.0])
    for key, value in {"bos_token_id": 0, "eos_token_id": 1, **(tokenizer or {})}.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", value)
    defaults = {"token_embd.weight": np.ones((96, 32), np.float32)}
    for name, value in {**defaults, **(tensors or {})}.items():
        data, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantized(values: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Packed blocks: real ones where the package can, else random ones with sane scales."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        rng = np.random.default_rng(0)
        num_blocks = values.size // block
        blocks = rng.integers(0, 256, (num_blocks, block_bytes), dtype=np.uint8)
        # both float16 scales, wherever the type has them: 0x2c.. is about 0.07
        positions = {"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)}.get(kind.name, (0, 2))
        for position in positions:
            blocks[:, position + 1] = 0x2C
        return blocks.reshape(values.shape[0], -1)


# type -> the largest error of a value, as a share of its block's largest magnitude: half a
# step (a step for Q4_0 and Q5_0 at the clipped end), and the scale's rounding
ERRORS = {
    "F32": 0, "F16": 2**-11, "BF16": 2**-8,
    "Q4_0": 1 / 8, "Q4_1": 1 / 14, "Q5_0": 1 / 16, "Q5_1": 1 / 30, "Q8_0": 1 / 220,
    "Q2_K": None, "Q3_K": None, "Q4_K": None, "Q5_K": None, "Q6_K": None,
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_each_type_is_read_as_the_package_dequantises_it(tmp_path: Path, name: str) -> None:
    kind = GGMLQuantizationType[name]
    values = np.random.default_rng(1).standard_normal((33, 256)).astype(np.float32)
    packed = quantized(values, kind)
    path = write_gguf(tmp_path / "m.gguf", tensors={"blk.0.ffn_down.weight": (packed, kind)})
    source = GGUFFile(path).source()
    tensor = "model.layers.0.mlp.down_proj.weight"
    found = source.read(tensor)
    assert source.shapes[tensor] == (33, 256)
    assert found.dtype == {"F16": np.float16, "BF16": ml_dtypes.bfloat16}.get(name, np.float32)
    assert np.isfinite(found.astype(np.float32)).all()
    np.testing.assert_array_equal(
        found.astype(np.float32), gguf.quants.dequantize(packed, kind).reshape(33, 256)
    )
    np.testing.assert_array_equal(source.read(tensor, 7, 20), found[7:20])
    if (share := ERRORS[name]) is not None:
        largest = np.abs(values.reshape(33, -1, 32)).max(-1, keepdims=True)
        errors = np.abs(values - found.astype(np.float32)).reshape(33, -1, 32)
        assert (errors <= share * largest * 1.01).all()


def test_a_tensor_of_many_chunks_equals_one_read_at_once(tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q4_1
    values = np.random.default_rng(2).standard_normal((700, 1024)).astype(np.float32)
    packed = gguf.quants.quantize(values, kind)
    path = write_gguf(tmp_path / "m.gguf", tensors={"output.weight": (packed, kind)})
    found = GGUFFile(path).source().read("lm_head.weight")
    np.testing.assert_array_equal(found, gguf.quants.dequantize(packed, kind))


def test_header_as_the_package_reads_it(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf",
        keys={"x.strings": ["a", "", "ü"], "x.ints": [1, -2, 3], "x.flags": [True, False]},
        tensors={"a": np.zeros((3, 5, 7), np.float16), "b": np.arange(7, dtype=np.float32)},
    )
    file, reference = GGUFFile(path), GGUFReader(path)
    fields = {k: v.contents() for k, v in reference.fields.items() if not k.startswith("GGUF.")}
    assert dict(file.metadata) == fields
    assert file.metadata["tokenizer.ggml.tokens"] == TOKENS
    for tensor in reference.tensors:
        info = file.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert info.quantization == tensor.tensor_type


def test_llama_query_and_key_rows_are_put_back_in_order(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    query, bias = rng.standard_normal((32, 32)).astype(np.float32), rng.standard_normal(32)
    value = rng.standard_normal((16, 32)).astype(np.float32)

    def permuted(rows: np.ndarray) -> np.ndarray:  # head size 8: 0 4 1 5 2 6 3 7
        order = [head * 8 + half * 4 + i for head in range(4) for i in range(4) for half in (0, 1)]
        return rows[order].astype(np.float32)

    tensors = {
        "blk.0.attn_q.weight": permuted(query),
        "blk.0.attn_q.bias": permuted(bias),
        "blk.0.attn_v.weight": value,
    }
    prefix = "model.layers.0.self_attn"
    source = GGUFFile(write_gguf(tmp_path / "l.gguf", tensors=tensors)).source()
    np.testing.assert_array_equal(source.read(f"{prefix}.q_proj.weight"), query)
    np.testing.assert_array_equal(source.read(f"{prefix}.q_proj.weight", 3, 21), query[3:21])
    np.testing.assert_array_equal(source.read(f"{prefix}.q_proj.bias"), bias.astype(np.float32))
    np.testing.assert_array_equal(source.read(f"{prefix}.v_proj.weight"), value)
    other = GGUFFile(write_gguf(tmp_path / "q.gguf", "qwen2", tensors=tensors)).source()
    np.testing.assert_array_equal(other.read(f"{prefix}.q_proj.weight"), permuted(query))


def test_config_of_each_architecture(tmp_path: Path) -> None:
    head = {"output.weight": np.zeros((96, 32), np.float32)}
    llama = GGUFFile(write_gguf(tmp_path / "l.gguf", tokenizer={"eot_token_id": 3})).config()
    assert llama.architecture == "LlamaForCausalLM"
    assert (llama.vocab_size, llama.head_dim, llama.num_kv_heads) == (96, 8, 2)
    assert (llama.rms_norm_eps, llama.rope) == (1e-5, RopeConfig("default", 5e5))
    assert llama.eos_token_ids == (1, 3)
    assert (llama.tie_word_embeddings, llama.qkv_bias, llama.qk_norm) == (True, False, False)
    qwen2 = GGUFFile(write_gguf(tmp_path / "q2.gguf", "qwen2", tensors=head)).config()
    assert (qwen2.qkv_bias, qwen2.attention_output_bias) == (True, False)
    assert not qwen2.tie_word_embeddings
    keys = {"attention.key_length": 16, "attention.value_length": 16}
    qwen3 = GGUFFile(write_gguf(tmp_path / "q3.gguf", "qwen3", keys)).config()
    assert (qwen3.qk_norm, qwen3.qkv_bias, qwen3.head_dim) == (True, False, 16)
    mistral = GGUFFile(write_gguf(tmp_path / "m.gguf", keys={"attention.sliding_window": 64}))
    assert mistral.config().sliding_windows == (64, 64)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"rope.freq_base": None}, RopeConfig("default", 10000.0)),
        ({"rope.scaling.type": "none"}, RopeConfig("default", 5e5)),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 2.5},
            RopeConfig("linear", 5e5, 2.5),
        ),
        ({"rope.scale_linear": 2.0}, RopeConfig("linear", 5e5, 2.0)),
        ({"rope.scaling.factor": 4.0}, RopeConfig("linear", 5e5, 4.0)),  # no type: linear
        ({"rope.scaling.factor": 1.0}, RopeConfig("default", 5e5)),
        ({"rope.scaling.factor": 0.0}, RopeConfig("default", 5e5)),
        ({"rope.scaling.type": "linear"}, RopeConfig("default", 5e5)),
        (
            {"rope.scaling.factor": 4.0, "rope.scale_linear": 2.0},  # the new key wins
            RopeConfig("linear", 5e5, 4.0),
        ),
        (
            {"rope.scaling.type": "none", "rope.scaling.factor": 4.0, "rope.scale_linear": 2.0},
            RopeConfig("default", 5e5),
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64,
            },
            RopeConfig("yarn", 5e5, 4.0, 64),
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, keys: dict[str, Any], expected: RopeConfig) -> None:
    assert GGUFFile(write_gguf(tmp_path / "m.gguf", keys=keys)).config().rope == expected


@pytest.mark.parametrize("context", [8192, 2048])
def test_llama3_scaling_is_recognised_from_its_frequencies(
    tmp_path: Path, tiny_config: Callable[..., Any], context: int
) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {"rope_theta": 5e5, "factor": 32.0}
    llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3["original_max_position_embeddings"] = context
    frequencies = [
        ROPE_INIT_FUNCTIONS[kind](tiny_config("Llama", head_dim=64, rope_parameters=values))[0]
        for kind, values in (
            ("linear", {**rope, "rope_type": "linear", "factor": 1.0}),
            ("llama3", {**rope, **llama3, "rope_type": "llama3"}),
        )
    ]
    divisors = (frequencies[0] / frequencies[1]).numpy()
    keys = {"attention.key_length": 64, "attention.value_length": 64}
    path = write_gguf(tmp_path / "m.gguf", keys=keys, tensors={"rope_freqs.weight": divisors})
    file = GGUFFile(path)
    found = file.config().rope
    assert found.rope_type == "llama3"
    assert found.factor == pytest.approx(32.0, rel=1e-6)
    assert found.original_max_position_embeddings == context
    assert (found.low_freq_factor, found.high_freq_factor) == (1.0, 4.0)
    assert "rope_freqs.weight" not in file.source().shapes


BAD = [
    ({"arch": "gemma"}, "'gemma' is not supported; supported: llama, qwen2, qwen3"),
    ({"keys": {"block_count": None}}, r"llama\.block_count must be an integer, got nothing"),
    ({"keys": {"feed_forward_length": [1, 2]}}, "must be one integer for all layers"),
    ({"keys": {"attention.head_count": 0}}, "num_heads must be a positive integer"),
    ({"keys": {"attention.head_count": "4"}}, "head_count must be an integer, got '4'"),
    ({"keys": {"rope.freq_base": "x"}}, "freq_base must be a number"),
    ({"keys": {"rope.dimension_count": 4}}, r"rope\.dimension_count is 4; only 8 is supported"),
    ({"keys": {"expert_count": 8}}, "expert_count is 8"),
    ({"keys": {"split.count": 3}}, "one of 3 parts"),
    ({"keys": {"rope.scaling.type": "longrope"}}, "'longrope' is not supported"),
    (
        {"keys": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                  "rope.scaling.attn_factor": 2.0}},
        r"rope\.scaling\.attn_factor is not supported",
    ),
    ({"keys": {"rope.scaling.factor": 2.0},
      "tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, "both rope_freqs.* 'linear'"),
    ({"keys": {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
      "tensors": {"rope_freqs.weight": np.ones(4, np.float32)}}, "both rope_freqs.* 'linear'"),
    ({"keys": {"block_count": 10**9, "attention.sliding_window": 64}},
     r"llama\.block_count must be at most 4096, got 1000000000"),
    ({"keys": {"attention.key_length": 10**9, "attention.value_length": 10**9}},
     "head_dim must be at most 4096"),
    ({"keys": {"context_length": 4 * 10**9}}, "max_position_embeddings must be at most"),
    ({"keys": {"logit_scale": 0.0625}}, r"logit_scale is 0\.0625; only 0 or 1 is supported"),
    ({"keys": {"attention.scale": 0.5}}, r"attention\.scale is 0\.5; only 0 or 0\.353"),
    ({"keys": {"attention.clamp_kqv": 8.0}}, r"attention\.clamp_kqv is 8\.0"),
    ({"keys": {"attn_logit_softcapping": 50.0}}, "attn_logit_softcapping is 50"),
    ({"keys": {"attention.causal": False}}, r"attention\.causal is False"),
    ({"arch": "qwen2", "keys": {"attention.sliding_window": 64}}, "sliding_window is not supp"),
    ({"tensors": {"token_embd.weight": np.ones((3, 32), np.float32)}}, "4 tokens, but"),
    ({"tokenizer": {"eot_token_id": 96}}, "eos_token_id 96 is outside the vocabulary"),
    ({"tensors": {"rope_freqs.weight": np.array([1, 2, 3, 1], np.float32)}}, "does not hold a Lla"),
    ({"tensors": {"rope_freqs.weight": np.ones(5, np.float32)}}, r"has shape \(5,\), not \(4,\)"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD)
def test_what_is_not_supported_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(ModelError, match=r"m\.gguf: .*" + message):
        GGUFFile(path).config()


def test_unsupported_tensor_types_are_named(tmp_path: Path) -> None:
    kind = GGMLQuantizationType.IQ4_NL
    tensors = {"blk.0.attn_v.weight": (np.zeros((4, 18), np.uint8), kind)}
    with pytest.raises(ModelError, match=r"IQ4_NL \(blk\.0\.attn_v\.weight\); supported: F32"):
        GGUFFile(write_gguf(tmp_path / "m.gguf", tensors=tensors)).source()


def test_a_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tensors={"b": np.ones(3, np.float32)})
    content = path.read_bytes()
    data_end = max(info.offset + info.nbytes for info in GGUFFile(path).tensors.values())
    for size in [*range(0, 1400, 7), data_end - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(ModelError, match=r"m\.gguf: "):
            GGUFFile(path)


def test_damaged_bytes_never_raise_anything_else(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tensors={"b": np.ones(3, np.float32)})
    content, rng, messages = path.read_bytes(), random.Random(0), []
    header_size = min(info.offset for info in GGUFFile(path).tensors.values())
    for _ in range(600):
        damaged = bytearray(content)
        damaged[rng.randrange(header_size)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        path.write_bytes(damaged)
        try:
            file = GGUFFile(path)
            dict(file.metadata)
            file.config()
            file.source()
        except ModelError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all(message.startswith(f"{path}: ") for message in messages)


def test_wrong_magic_old_version_and_missing_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    content = path.read_bytes()
    path.write_bytes(b"GGML" + content[4:])
    with pytest.raises(ModelError, match="is not a GGUF file"):
        GGUFFile(path)
    path.write_bytes(content[:4] + b"\1\0\0\0" + content[8:])
    with pytest.raises(ModelError, match="GGUF version 1 is not supported"):
        GGUFFile(path)
    with pytest.raises(ModelError, match="cannot be read: No such file"):
        GGUFFile(tmp_path / "none.gguf")


def test_names_are_those_of_the_package_s_own_table() -> None:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)
    for kind in ("weight", "bias"):
        for module in (
            "model.embed_tokens", "model.norm", "lm_head", "model.layers.2.input_layernorm",
            "model.layers.2.post_attention_layernorm", "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj",
            "model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.q_norm",
            "model.layers.1.self_attn.k_norm", "model.layers.1.mlp.gate_proj",
            "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj",
        ):  # fmt: skip
            name = names.get_name(f"{module}.{kind}", try_suffixes=(f".{kind}",))
            assert name is not None
            assert hugging_face_name(name) == f"{module}.{kind}"
    assert hugging_face_name("blk.0.ffn_gate_exps.weight") == "blk.0.ffn_gate_exps.weight"
