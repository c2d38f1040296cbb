"""Which part of each array lies on which device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from jaxllm.config import ModelConfig, RopeConfig
from jaxllm.models.decoder import Model
from jaxllm.runtime.sharding import (
    DIVIDED,
    Placement,
    check_divisible,
    device_bytes,
    kv_repeats,
    repeat_kv_heads,
    with_repeated_kv_heads,
)

CONFIG = ModelConfig("Qwen2ForCausalLM", 96, 16, 32, 3, 8, 2, 4, 64, 1e-5, RopeConfig(),
                     qkv_bias=True, attention_output_bias=True, mlp_bias=True)  # fmt: skip


@pytest.mark.parametrize(
    ("num_devices", "message"),
    [
        (3, "3 devices cannot share the model: its num_heads is 8"),
        (16, "its num_heads is 8"),
        (64, "its num_heads is 8"),
    ],
)
def test_devices_that_cannot_share_the_model(num_devices: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_divisible(CONFIG, num_devices)


def test_feed_forward_and_key_heads_must_be_shared_too() -> None:
    with pytest.raises(ValueError, match="its intermediate_size is 33"):
        check_divisible(replace(CONFIG, intermediate_size=33), 2)
    six = replace(CONFIG, num_heads=12, num_kv_heads=6, intermediate_size=36)
    with pytest.raises(ValueError, match="its num_kv_heads is 6"):
        check_divisible(six, 4)
    for num_devices in (1, 2, 3, 6, 12):
        check_divisible(six, num_devices)


@pytest.mark.parametrize(("num_devices", "repeats"), [(1, 1), (2, 1), (4, 2), (8, 4)])
def test_key_heads_are_repeated_where_devices_are_more(num_devices: int, repeats: int) -> None:
    assert kv_repeats(CONFIG, num_devices) == repeats
    assert with_repeated_kv_heads(CONFIG, repeats).num_kv_heads == 2 * repeats


def test_repeated_heads_keep_the_order_of_the_queries() -> None:
    """Two key heads with four query heads each; written out by hand for copies of two queries."""
    head_of = np.array([[0, 1, 2, 3, 10, 20], [4, 5, 6, 7, 11, 21]])  # queries, key, value
    kernel = np.broadcast_to(head_of[None, :, :, None], (5, 2, 6, 4))
    expected = [[0, 1, 10, 20], [2, 3, 10, 20], [4, 5, 11, 21], [6, 7, 11, 21]]
    repeated = repeat_kv_heads(kernel, 2)
    assert repeated.shape == (5, 4, 4, 4)
    assert repeated[3, :, :, 1].tolist() == expected


def test_a_model_divided_and_with_repeated_heads_computes_the_same() -> None:
    """With an attention that each query head makes of its own key and value."""
    tokens = jnp.arange(6)

    def hidden(num_devices: int) -> jax.Array:
        model = Model(CONFIG, "scan", jnp.float32, num_devices)
        params = model.init_parameters(jax.random.key(0))
        expected = jax.tree.map(lambda leaf: leaf.shape, model.stored_parameters())
        assert jax.tree.map(lambda leaf: leaf.shape, params) == expected

        def attend(q: Any, k: Any, v: Any, pool: Any, layer: Any, window: Any) -> Any:
            group = q.shape[1] // k.shape[1]
            k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
            logits = jnp.einsum("thd,shd->hts", q, k)
            return jnp.einsum("hts,shd->thd", jax.nn.softmax(logits), v), pool

        return model.forward(params, tokens, tokens, tokens + 1, None, attend)[0]

    for num_devices in (2, 4, 8):
        np.testing.assert_allclose(hidden(num_devices), hidden(1), atol=1e-5)


def test_every_large_parameter_is_divided() -> None:
    """By name, each with an axis that the devices divide; norms and outer biases lie whole."""
    model = Model(CONFIG, "scan", jnp.float32, num_devices=2)
    placement = Placement(tuple(jax.devices()) * 2, AbstractMesh((2,), ("tensor",)))  # type: ignore[arg-type]
    placed = placement.parameters(model.stored_parameters())
    whole = set()
    for path, leaf in jax.tree.leaves_with_path(placed):
        shard = leaf.sharding.shard_shape(leaf.shape)
        if np.prod(shard) == np.prod(leaf.shape):
            whole.add(path[-1].key)
    assert whole == {"scale", "o_bias", "down_bias"}
    assert whole.isdisjoint(DIVIDED)
    assert 2 * device_bytes(placed) - device_bytes(model.stored_parameters()) < 2000


def test_a_vocabulary_that_cannot_be_divided_lies_whole() -> None:
    model = Model(replace(CONFIG, vocab_size=97), "scan", jnp.float32, num_devices=2)
    placement = Placement(tuple(jax.devices()) * 2, AbstractMesh((2,), ("tensor",)))  # type: ignore[arg-type]
    placed = placement.parameters(model.stored_parameters())
    assert placed["embed"]["embedding"].sharding.spec == PartitionSpec()
    assert placed["head"]["kernel"].sharding.spec == PartitionSpec()
