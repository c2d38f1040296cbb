"""ModelConfig, RopeConfig and EngineConfig refuse what contradicts itself."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from jaxllm.config import ROPE_TYPES, EngineConfig, ModelConfig, ModelError, RopeConfig

MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=100,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
    rope=RopeConfig(),
)
ENGINE = EngineConfig(
    num_blocks=8, block_size=16, max_model_len=100, max_num_seqs=4, max_num_batched_tokens=32
)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 0}, "vocab_size must be a positive integer, got 0"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_layers": 1.5}, "num_layers"),
        ({"num_heads": True}, "num_heads"),
        ({"max_position_embeddings": "64"}, "max_position_embeddings"),
        ({"intermediate_size": None}, "intermediate_size"),
        ({"num_kv_heads": 3}, "multiple of num_kv_heads"),
        ({"num_kv_heads": 8}, "multiple of num_kv_heads"),
        ({"head_dim": 5}, "head_dim must be even"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": 1.0}, "rms_norm_eps"),
        ({"sliding_windows": (8,)}, "sliding_windows has 1 entries for 2 layers"),
        ({"sliding_windows": (8, -1)}, "sliding_windows must not be negative"),
        ({"vocab_size": 10**18}, "vocab_size must be at most 16777216, got 10{18}"),
        ({"intermediate_size": 10**18}, "intermediate_size must be at most"),
        ({"hidden_size": 1 << 21}, "hidden_size must be at most 1048576, got 2097152"),
        ({"num_layers": 4097}, "num_layers must be at most 4096, got 4097"),
        ({"num_heads": 10**12, "num_kv_heads": 10**12}, "num_heads must be at most"),
        ({"head_dim": 2 * 10**9}, "head_dim must be at most 4096, got 2000000000"),
        ({"max_position_embeddings": 10**15}, "max_position_embeddings must be at most"),
        ({"eos_token_ids": (2, 100)}, "eos_token_id 100 is outside the vocabulary of 100"),
        ({"eos_token_ids": (-1,)}, "eos_token_id -1"),
    ],
)
def test_model_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        dataclasses.replace(MODEL, **changes)


def test_window_of_a_layer() -> None:
    assert [MODEL.window(layer) for layer in range(2)] == [0, 0]
    windowed = dataclasses.replace(MODEL, sliding_windows=(0, 8))
    assert [windowed.window(layer) for layer in range(2)] == [0, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_type": "su"}, f"'su' is not supported; supported: {', '.join(ROPE_TYPES)}"),
        ({"theta": 0.0}, "rope_theta"),
        ({"theta": math.nan}, "rope_theta"),
        ({"theta": math.inf}, "rope_theta"),
        ({"factor": -1.0}, "factor"),
        ({"factor": math.nan}, "factor"),
        ({"factor": math.inf}, "factor"),
        ({"factor": 1e300}, "factor must be positive and at most 1048576, got 1e.300"),
        ({"original_max_position_embeddings": 0}, "original_max_position_embeddings must be a pos"),
        (
            {"original_max_position_embeddings": 10**9},
            "original_max_position_embeddings must be at",
        ),
    ],
)
def test_rope_config_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        RopeConfig(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 0}, "num_blocks must be a positive integer, got 0"),
        ({"block_size": 16.0}, "block_size"),
        ({"max_model_len": -1}, "max_model_len"),
        ({"max_num_seqs": True}, "max_num_seqs"),
        ({"max_num_batched_tokens": None}, "max_num_batched_tokens"),
        ({"policy": "random"}, "policy must be 'fcfs' or 'priority', got 'random'"),
        ({"max_num_seqs": 33}, "max_num_batched_tokens .32. must be at least max_num_seqs .33."),
        ({"max_model_len": 129}, "holds 128 tokens, fewer than one sequence of max_model_len 129"),
    ],
)
def test_engine_config_refuses(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(ENGINE, **changes)


@pytest.mark.parametrize(("max_model_len", "blocks"), [(1, 1), (16, 1), (17, 2), (128, 8)])
def test_width_of_a_block_table(max_model_len: int, blocks: int) -> None:
    config = dataclasses.replace(ENGINE, max_model_len=max_model_len)
    assert config.max_blocks_per_seq == blocks


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        (RopeConfig(), 2048),
        (RopeConfig("linear", factor=4.0), 8192),
        (RopeConfig("dynamic", factor=2.0), 4096),
        (RopeConfig("llama3", factor=8.0, original_max_position_embeddings=512), 2048),
        (RopeConfig("yarn", factor=4.0, original_max_position_embeddings=2048), 8192),
        (RopeConfig("yarn", factor=4.0, original_max_position_embeddings=512), 2048),
        (RopeConfig("linear", factor=1e-300), 1),
        (RopeConfig("dynamic", factor=2.0**20), 2**27),
        (RopeConfig("yarn", factor=2.0**20), 2**27),
    ],
)
def test_the_longest_context_follows_the_rotation(rope: RopeConfig, expected: int) -> None:
    config = ModelConfig("LlamaForCausalLM", 9, 8, 8, 1, 2, 1, 4, 2048, 1e-5, rope)
    assert config.max_context_len == expected
