"""Tiny random models that transformers builds, their logits, and their weights in jaxllm's tree.

The conversion is written for these tests alone, so that it shares no mistake with jaxllm.loading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import transformers

from jaxllm.config import ModelConfig, RopeConfig

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attn_implementation": "eager",
}


def build(family: str, **options: Any) -> torch.nn.Module:
    """A float32 model such as LlamaForCausalLM, with weights that keep activations near 1."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **options})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight.normal_(0, 0.3)
            elif "norm" in name:
                weight.normal_(1, 0.3)
            else:
                weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5)
    return model


def logits(model: torch.nn.Module, token_ids: np.ndarray, num_prompt: int) -> np.ndarray:
    """Float32 logits of every token: the prompt at once, the others one by one with the cache."""
    ids, rows, cache = torch.from_numpy(token_ids).long()[None], [], None
    with torch.no_grad():
        for chunk in (ids[:, :num_prompt], *ids[:, num_prompt:].split(1, dim=1)):
            out = model(chunk, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0].float().numpy())
    return np.concatenate(rows)


def model_config(model: torch.nn.Module) -> ModelConfig:
    """What jaxllm has to know of the model, read from its live configuration and weights."""
    hf, weights = model.config, model.state_dict()
    rope = dict(hf.rope_parameters)
    theta = rope.pop("rope_theta")
    num_layers = hf.num_hidden_layers
    types = (
        getattr(hf, "layer_types", None)
        or ["sliding_attention" if getattr(hf, "sliding_window", None) else "full_attention"]
        * num_layers
    )
    attention = "model.layers.0.self_attn."
    return ModelConfig(
        architecture=type(model).__name__,
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        num_layers=num_layers,
        num_heads=hf.num_attention_heads,
        num_kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        max_position_embeddings=hf.max_position_embeddings,
        rms_norm_eps=hf.rms_norm_eps,
        rope=RopeConfig(theta=theta, **rope),
        tie_word_embeddings=hf.tie_word_embeddings,
        qkv_bias=attention + "q_proj.bias" in weights,
        attention_output_bias=attention + "o_proj.bias" in weights,
        mlp_bias="model.layers.0.mlp.up_proj.bias" in weights,
        qk_norm=attention + "q_norm.weight" in weights,
        sliding_windows=tuple(hf.sliding_window if t[0] == "s" else 0 for t in types),
    )


@dataclass(frozen=True)
class _Weights:
    arrays: dict[str, np.ndarray]
    prefix: str = ""

    def __call__(self, name: str) -> np.ndarray:
        return self.arrays[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.arrays


def parameters(model: torch.nn.Module, config: ModelConfig, layer_loop: str, dtype: Any) -> dict:
    """The model's weights as the nested dict that jaxllm.models runs."""
    arrays = {name: weight.float().numpy() for name, weight in model.state_dict().items()}
    weights = _Weights(arrays)
    tree: dict[str, Any] = {
        "embed": {"embedding": weights("model.embed_tokens.weight")},
        "final_norm": {"scale": weights("model.norm.weight")},
    }
    if not config.tie_word_embeddings:
        tree["head"] = {"kernel": weights("lm_head.weight").T}
    layers = [
        _layer(_Weights(arrays, f"model.layers.{i}."), config) for i in range(config.num_layers)
    ]
    if layer_loop == "switch":
        tree["layers"] = {str(i): layer for i, layer in enumerate(layers)}
    else:
        tree["layers"] = _map(lambda *leaves: np.stack(leaves), *layers)
    return _map(lambda leaf: jnp.asarray(leaf, dtype), tree)


def _map(function: Any, *trees: Any) -> Any:
    if isinstance(trees[0], dict):
        return {name: _map(function, *(tree[name] for tree in trees)) for name in trees[0]}
    return function(*trees)


def _layer(weights: _Weights, config: ModelConfig) -> dict[str, Any]:
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    group = heads // kv_heads
    qkv_kernel = np.zeros((config.hidden_size, kv_heads, group + 2, head_dim), np.float32)
    qkv_bias = np.zeros((kv_heads, group + 2, head_dim), np.float32)

    def place(name: str, kv_head: int, column: int, head: int) -> None:
        rows = slice(head * head_dim, (head + 1) * head_dim)
        qkv_kernel[:, kv_head, column] = weights(f"self_attn.{name}.weight")[rows].T
        if config.qkv_bias:
            qkv_bias[kv_head, column] = weights(f"self_attn.{name}.bias")[rows]

    for head in range(heads):
        place("q_proj", head // group, head % group, head)
    for head in range(kv_heads):
        place("k_proj", head, group, head)
        place("v_proj", head, group + 1, head)
    out = weights("self_attn.o_proj.weight").T.reshape(heads, head_dim, config.hidden_size)
    attention: dict[str, Any] = {"qkv_kernel": qkv_kernel, "o_kernel": out}
    if config.qkv_bias:
        attention["qkv_bias"] = qkv_bias
    if config.attention_output_bias:
        attention["o_bias"] = weights("self_attn.o_proj.bias")
    if config.qk_norm:
        attention["q_norm"] = {"scale": weights("self_attn.q_norm.weight")}
        attention["k_norm"] = {"scale": weights("self_attn.k_norm.weight")}
    return {
        "attention_norm": {"scale": weights("input_layernorm.weight")},
        "attention": attention,
        "mlp_norm": {"scale": weights("post_attention_layernorm.weight")},
        "mlp": _mlp(weights, config),
    }


def _mlp(weights: _Weights, config: ModelConfig) -> dict[str, np.ndarray]:
    def gate_up(kind: str) -> np.ndarray:
        return np.stack([weights(f"mlp.{name}_proj.{kind}") for name in ("gate", "up")])

    mlp = {
        "gate_up_kernel": gate_up("weight").transpose(2, 0, 1),  # [2, F, E] -> [E, 2, F]
        "down_kernel": weights("mlp.down_proj.weight").T,
    }
    if config.mlp_bias:
        mlp["gate_up_bias"], mlp["down_bias"] = gate_up("bias"), weights("mlp.down_proj.bias")
    return mlp
