"""Tiny random models as transformers saves them, and the tree that they are loaded into."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxllm.config import ModelConfig

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture
def tiny_config() -> Callable[..., Any]:
    """tiny_config("Qwen3", head_dim=16) -> a transformers configuration."""
    import transformers

    def build(family: str, **options: Any) -> Any:
        return getattr(transformers, f"{family}Config")(**{**TINY, **options})

    return build


@pytest.fixture
def save_tiny_model(tmp_path: Path, tiny_config: Callable[..., Any]) -> Callable[..., Any]:
    """Saves a random model; returns its folder and its torch state dict."""
    import torch
    import transformers

    def save(family: str, dtype: Any = torch.float32, shard: str = "1GB", **options: Any) -> Any:
        torch.manual_seed(0)
        model = getattr(transformers, f"{family}ForCausalLM")(tiny_config(family, **options))
        with torch.no_grad():
            for parameter in model.parameters():  # norms and biases are constant at first
                parameter.normal_()
        model.to(dtype).save_pretrained(tmp_path / "model", max_shard_size=shard)
        return tmp_path / "model", model.state_dict()

    return save


@pytest.fixture
def abstract_tree() -> Callable[..., dict[str, Any]]:
    """The parameter tree's shapes, from the letters of the design."""

    def build(config: ModelConfig, dtype: Any = np.float32, form: str = "dict") -> dict[str, Any]:
        def leaf(*shape: int) -> Any:
            return SimpleNamespace(shape=shape, dtype=np.dtype(dtype))

        vocab, width = config.vocab_size, config.hidden_size
        tree: dict[str, Any] = {
            "embed": {"embedding": leaf(vocab, width)},
            "final_norm": {"scale": leaf(width)},
        }
        if not config.tie_word_embeddings:
            tree["head"] = {"kernel": leaf(width, vocab)}
        if form == "stacked":
            tree["layers"] = _layer(config, lambda *shape: leaf(config.num_layers, *shape))
        else:
            layers = [_layer(config, leaf) for _ in range(config.num_layers)]
            tree["layers"] = (
                layers if form == "list" else {str(i): layer for i, layer in enumerate(layers)}
            )
        return tree

    return build


def _layer(config: ModelConfig, leaf: Callable[..., Any]) -> dict[str, Any]:
    width, ffn, dim = config.hidden_size, config.intermediate_size, config.head_dim
    heads, kv = config.num_heads, config.num_kv_heads
    group = heads // kv + 2
    attention = {"qkv_kernel": leaf(width, kv, group, dim), "o_kernel": leaf(heads, dim, width)}
    mlp = {"gate_up_kernel": leaf(width, 2, ffn), "down_kernel": leaf(ffn, width)}
    if config.qkv_bias:
        attention["qkv_bias"] = leaf(kv, group, dim)
    if config.attention_output_bias:
        attention["o_bias"] = leaf(width)
    if config.qk_norm:
        attention |= {"q_norm": {"scale": leaf(dim)}, "k_norm": {"scale": leaf(dim)}}
    if config.mlp_bias:
        mlp |= {"gate_up_bias": leaf(2, ffn), "down_bias": leaf(width)}
    return {
        "attention_norm": {"scale": leaf(width)},
        "mlp_norm": {"scale": leaf(width)},
        "attention": attention,
        "mlp": mlp,
    }
