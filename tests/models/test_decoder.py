"""The tree of parameters, what `attend` is given, and what the compiler makes of the embedding."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.config import ModelConfig, RopeConfig
from jaxllm.models.decoder import Model

V, E, F, L, H, K, D = 96, 32, 40, 3, 6, 2, 8
PLAIN = ModelConfig(
    "LlamaForCausalLM", V, E, F, L, H, K, D, 64, 1e-5, RopeConfig(), tie_word_embeddings=True
)
FULL = replace(
    PLAIN,
    architecture="Qwen3ForCausalLM",
    tie_word_embeddings=False,
    qkv_bias=True,
    attention_output_bias=True,
    mlp_bias=True,
    qk_norm=True,
)
PLAIN_LAYER = {
    "attention_norm/scale": (32,),
    "mlp_norm/scale": (32,),
    "attention/qkv_kernel": (32, 2, 5, 8),
    "attention/o_kernel": (6, 8, 32),
    "mlp/gate_up_kernel": (32, 2, 40),
    "mlp/down_kernel": (40, 32),
}
FULL_LAYER = {
    **PLAIN_LAYER,
    "attention/qkv_bias": (2, 5, 8),
    "attention/o_bias": (32,),
    "attention/q_norm/scale": (8,),
    "attention/k_norm/scale": (8,),
    "mlp/gate_up_bias": (2, 40),
    "mlp/down_bias": (32,),
}
ENDS = {"embed/embedding": (96, 32), "final_norm/scale": (32,)}
HEAD = {"head/kernel": (32, 96)}


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {
        path: leaf
        for name, part in tree.items()
        for path, leaf in flat(part, f"{prefix}{name}/").items()
    }


def zeros(model: Model) -> dict[str, Any]:
    shapes = model.stored_parameters()
    return jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape), leaf.dtype), shapes)


@pytest.mark.parametrize(
    ("config", "layer", "ends"), [(PLAIN, PLAIN_LAYER, ENDS), (FULL, FULL_LAYER, {**ENDS, **HEAD})]
)
@pytest.mark.parametrize("layer_loop", ["switch", "scan"])
def test_parameter_tree(
    config: ModelConfig, layer: dict[str, Any], ends: dict[str, Any], layer_loop: Any
) -> None:
    if layer_loop == "switch":
        layers = {f"layers/{i}/{path}": shape for i in range(3) for path, shape in layer.items()}
    else:
        layers = {f"layers/{path}": (3, *shape) for path, shape in layer.items()}
    model = Model(config, layer_loop=layer_loop, dtype=jnp.bfloat16)
    leaves = flat(model.abstract_parameters())
    assert {path: leaf.shape for path, leaf in leaves.items()} == {**ends, **layers}
    assert all(type(leaf) is jax.ShapeDtypeStruct for leaf in leaves.values())
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(jnp.bfloat16)}


def test_random_parameters_fill_the_tree_alike_in_both_loops() -> None:
    key = jax.random.key(3)
    switched = Model(FULL, layer_loop="switch", dtype=jnp.float32)
    stacked = Model(FULL, layer_loop="scan", dtype=jnp.float32)
    params, stacked_params = switched.init_parameters(key), stacked.init_parameters(key)
    for model, drawn in ((switched, params), (stacked, stacked_params)):
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), drawn)
        assert shapes == model.stored_parameters()
    layers = [params["layers"][str(i)] for i in range(L)]
    restacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    jax.tree.map(np.testing.assert_array_equal, restacked, stacked_params["layers"])
    kernels = restacked["mlp"]["down_kernel"]  # [L, F, E], each drawn anew
    assert np.std(kernels) == pytest.approx(F**-0.5, rel=0.05)
    assert np.abs(kernels[0] - kernels[1]).min() > 0


@pytest.mark.parametrize(
    ("layer_loop", "windows", "expected"),
    [
        ("switch", (), ["traced", 0]),
        ("switch", (4, 4, 4), ["traced", 4]),
        ("switch", (0, 4, 9), ["traced", "traced"]),
        ("scan", (), ["traced", 0]),
        ("scan", (4, 4, 4), ["traced", 4]),
        ("scan", (0, 4, 9), ["traced", "traced"]),
    ],
)
def test_attend_gets_layer_and_window(layer_loop: Any, windows: Any, expected: Any) -> None:
    seen: list[Any] = []

    def attend(q, k, v, kv_pool, layer, window):  # type: ignore[no-untyped-def]
        assert (q.shape, k.shape, v.shape) == ((8, H, D), (8, K, D), (8, K, D))
        numbers = ["traced" if isinstance(n, jax.core.Tracer) else n for n in (layer, window)]
        seen.append(tuple(numbers))
        return q, (kv_pool[0] + layer, kv_pool[1] + window)

    config = replace(PLAIN, sliding_windows=windows)
    model = Model(config, layer_loop=layer_loop, dtype=jnp.float32)
    params = zeros(model)
    ids = jnp.arange(8)
    pool = (jnp.int32(0), jnp.int32(0))
    _, pool = jax.jit(lambda p: model.forward(p, ids, ids, ids + 1, pool, attend))(params)
    assert set(seen) == {tuple(expected)}
    assert (int(pool[0]), int(pool[1])) == (0 + 1 + 2, sum(windows))


def test_unsupported_layer_loop_and_dtype() -> None:
    with pytest.raises(
        ValueError, match="layer_loop must be 'switch', 'scan' or 'packed', got 'map'"
    ):
        Model(PLAIN, layer_loop="map", dtype=jnp.float32)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dtype must be float32 or bfloat16, got float16"):
        Model(PLAIN, layer_loop="scan", dtype=jnp.float16)
    for config, dtype in (
        (PLAIN, jnp.float32),
        (replace(PLAIN, mlp_bias=True), jnp.bfloat16),
        (replace(PLAIN, intermediate_size=33), jnp.bfloat16),
    ):
        with pytest.raises(ValueError, match="layer_loop 'packed' needs bfloat16"):
            Model(config, layer_loop="packed", dtype=dtype)


@pytest.mark.parametrize(
    "config",
    [PLAIN, replace(FULL, mlp_bias=False), replace(PLAIN, intermediate_size=34, vocab_size=50)],
    ids=["tied", "biases, norms, own head", "sizes that fill no panel"],
)
def test_packed_kernels_compute_what_plain_ones_do(config: ModelConfig) -> None:
    def run(loop: Any, num_tokens: int | None) -> tuple[np.ndarray, np.ndarray]:
        model = Model(config, layer_loop=loop, dtype=jnp.bfloat16)
        params = model.init_parameters(jax.random.key(0))
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
        assert shapes == model.stored_parameters()

        def step(params: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
            def attend(q: jax.Array, k: jax.Array, v: jax.Array, *_: Any) -> tuple[jax.Array, None]:
                return q + jnp.repeat(k * v, q.shape[1] // k.shape[1], axis=1), None

            hidden, _ = model.forward(
                params, ids, ids, ids + 1, None, attend, num_tokens=num_tokens
            )
            return hidden, model.logits(params, hidden, num_tokens)

        hidden, logits = jax.jit(step)(params, jnp.arange(10))
        return np.asarray(hidden, np.float32), np.asarray(logits)

    hidden, logits = run("scan", None)
    packed_hidden, packed_logits = run("packed", 7)
    np.testing.assert_allclose(packed_hidden[:7], hidden[:7], atol=0.06)
    np.testing.assert_allclose(packed_logits[:7], logits[:7], atol=0.06)
    assert not packed_logits[7:].any()


def test_packed_kernels_are_read_where_they_are() -> None:
    config = replace(PLAIN, vocab_size=4096)
    model = Model(config, layer_loop="packed", dtype=jnp.bfloat16)

    def step(params: Any, ids: jax.Array) -> jax.Array:
        hidden, _ = model.forward(params, ids, ids, ids + 1, None, lambda q, k, v, *_: (q, None))
        return model.logits(params, hidden)

    ids = jax.ShapeDtypeStruct((8,), jnp.int32)
    compiled = jax.jit(step).lower(model.stored_parameters(), ids).compile()
    kernel = 4096 * 32 * 2
    assert compiled.memory_analysis().temp_size_in_bytes < kernel


@pytest.mark.parametrize("layer_loop", ["switch", "packed"])
def test_token_ids_outside_the_vocabulary_read_its_nearest_row(layer_loop: Any) -> None:
    model = Model(replace(PLAIN, num_layers=1), layer_loop=layer_loop, dtype=jnp.bfloat16)
    params = model.init_parameters(jax.random.key(0))
    ids = jnp.array([-1, -(2**31), V, 2**31 - 1], jnp.int32)

    def hidden(ids: jax.Array) -> jax.Array:
        zeros = jnp.zeros(4, jnp.int32)
        return model.forward(params, ids, zeros, zeros + 1, None, lambda q, k, v, *_: (q, None))[0]

    expected = jax.jit(hidden)(jnp.array([0, 0, V - 1, V - 1]))
    np.testing.assert_array_equal(jax.jit(hidden)(ids), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_embedding_and_tied_head_copy_no_table(dtype: Any) -> None:
    """XLA's CPU backend would convert a bfloat16 table to float32 for a plain gather."""
    config = replace(PLAIN, vocab_size=4096, num_layers=1)
    model = Model(config, layer_loop="switch", dtype=dtype)

    def step(params: Any, ids: jax.Array) -> jax.Array:
        hidden, _ = model.forward(params, ids, ids, ids + 1, None, lambda q, k, v, *_: (q, None))
        return model.logits(params, hidden)

    ids = jax.ShapeDtypeStruct((8,), jnp.int32)
    compiled = jax.jit(step).lower(model.stored_parameters(), ids).compile()
    table = re.compile(r"= \w+\[(?:4096,32|32,4096)\]\S* (\S+?)\(")
    made_by = set(table.findall(compiled.as_text()))
    assert "parameter" in made_by
    assert made_by <= {"parameter", "bitcast", "bitcast-convert"}
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    assert temporaries < 4096 * 32 * 2, "a table of bfloat16"
