"""Which tensor of a checkpoint belongs where in the parameter tree.

A turn takes a leaf of one layer and returns a view of it, shaped as the checkpoint's tensor with
its first axis split in two: [groups, rows of a group, ...]. Writing the tensor into the view is the
whole conversion. G is H / K, the query heads of one key/value head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxllm.config import ModelConfig

Turn = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Row:
    """One tensor's place. path: the leaf, for a layer without its number; tensor: the checkpoint's
    name, {i} the layer; condition: the ModelConfig flag it depends on, "!" negates."""

    path: tuple[str, ...]
    tensor: str
    turn: Turn
    condition: str | None = None

    def applies(self, config: ModelConfig) -> bool:
        if self.condition is None:
            return True
        value = getattr(config, self.condition.removeprefix("!"))
        return bool(value) != self.condition.startswith("!")


def as_it_is(leaf: np.ndarray) -> np.ndarray:
    """[A, ...] stored the same way."""
    return leaf[None]


def transposed(leaf: np.ndarray) -> np.ndarray:
    """[in, out] from [out, in]."""
    return leaf.T[None]


def output_projection(leaf: np.ndarray) -> np.ndarray:
    """[H, D, E] from [E, H*D]."""
    return leaf.reshape(-1, leaf.shape[-1]).T[None]


def query(leaf: np.ndarray) -> np.ndarray:
    """[E, K, :G, D] from [K*G*D, E]; the group is all query heads of one key head."""
    width, num_kv_heads, num_in_group, head_dim = leaf.shape
    rows = leaf.reshape(width, num_kv_heads, num_in_group * head_dim)
    return rows[:, :, : (num_in_group - 2) * head_dim].transpose(1, 2, 0)  # [K, G*D, E]


def query_bias(leaf: np.ndarray) -> np.ndarray:
    """[K, :G, D] from [K*G*D]."""
    num_kv_heads, num_in_group, head_dim = leaf.shape
    return leaf.reshape(num_kv_heads, -1)[:, : (num_in_group - 2) * head_dim]


def key_or_value(index: int) -> Turn:
    """[E, K, index, D] from [K*D, E]; index -2 is the key, -1 the value."""
    return lambda leaf: leaf[:, :, index].transpose(1, 2, 0)  # [K, D, E]


def key_or_value_bias(index: int) -> Turn:
    """[K, index, D] from [K*D]."""
    return lambda leaf: leaf[:, index]


def gate_or_up(index: int) -> Turn:
    """[E, index, F] from [F, E]; index 0 is the gate."""
    return lambda leaf: leaf[:, index].T[None]


def gate_or_up_bias(index: int) -> Turn:
    """[index, F] from [F]."""
    return lambda leaf: leaf[index][None]


def _row(path: str, tensor: str, turn: Turn, condition: str | None = None) -> Row:
    if path.startswith("layers/"):
        tensor = f"model.layers.{{i}}.{tensor}"
    return Row(tuple(path.split("/")), tensor, turn, condition)


_QKV, _QKV_BIAS = "layers/attention/qkv_kernel", "layers/attention/qkv_bias"
_GATE_UP, _GATE_UP_BIAS = "layers/mlp/gate_up_kernel", "layers/mlp/gate_up_bias"
# fmt: off
LLAMA_TABLE = (
    _row("embed/embedding", "model.embed_tokens.weight", as_it_is),
    _row("final_norm/scale", "model.norm.weight", as_it_is),
    _row("head/kernel", "lm_head.weight", transposed, "!tie_word_embeddings"),
    _row("layers/attention_norm/scale", "input_layernorm.weight", as_it_is),
    _row("layers/mlp_norm/scale", "post_attention_layernorm.weight", as_it_is),
    _row(_QKV, "self_attn.q_proj.weight", query),
    _row(_QKV, "self_attn.k_proj.weight", key_or_value(-2)),
    _row(_QKV, "self_attn.v_proj.weight", key_or_value(-1)),
    _row(_QKV_BIAS, "self_attn.q_proj.bias", query_bias, "qkv_bias"),
    _row(_QKV_BIAS, "self_attn.k_proj.bias", key_or_value_bias(-2), "qkv_bias"),
    _row(_QKV_BIAS, "self_attn.v_proj.bias", key_or_value_bias(-1), "qkv_bias"),
    _row("layers/attention/o_kernel", "self_attn.o_proj.weight", output_projection),
    _row("layers/attention/o_bias", "self_attn.o_proj.bias", as_it_is, "attention_output_bias"),
    _row("layers/attention/q_norm/scale", "self_attn.q_norm.weight", as_it_is, "qk_norm"),
    _row("layers/attention/k_norm/scale", "self_attn.k_norm.weight", as_it_is, "qk_norm"),
    _row(_GATE_UP, "mlp.gate_proj.weight", gate_or_up(0)),
    _row(_GATE_UP, "mlp.up_proj.weight", gate_or_up(1)),
    _row(_GATE_UP_BIAS, "mlp.gate_proj.bias", gate_or_up_bias(0), "mlp_bias"),
    _row(_GATE_UP_BIAS, "mlp.up_proj.bias", gate_or_up_bias(1), "mlp_bias"),
    _row("layers/mlp/down_kernel", "mlp.down_proj.weight", transposed),
    _row("layers/mlp/down_bias", "mlp.down_proj.bias", as_it_is, "mlp_bias"),
)
# fmt: on


def mapping_table(config: ModelConfig) -> dict[tuple[str, ...], list[Row]]:
    """The rows that apply to a model, by leaf. All families so far name their tensors alike."""
    table: dict[tuple[str, ...], list[Row]] = {}
    for row in LLAMA_TABLE:
        if row.applies(config):
            table.setdefault(row.path, []).append(row)
    return table


def is_harmless(name: str, config: ModelConfig) -> bool:
    """Whether a checkpoint may have this tensor although the model has no place for it: buffers
    that are computed, and the copy of a tied embedding."""
    if name == "lm_head.weight":
        return config.tie_word_embeddings
    return name.endswith(".rotary_emb.inv_freq")
