"""The compiled step as a program: what it copies, and for which platforms it can be lowered."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxllm.config import ModelConfig, RopeConfig
from jaxllm.engine.batch import Bucket, PackedLayout
from jaxllm.engine.sequence import mask_len
from jaxllm.models.decoder import LayerLoop, Model
from jaxllm.runtime.kv_cache import abstract_pool
from jaxllm.runtime.step import State, StepOptions, abstract_tables, make_step

CONFIG = ModelConfig("LlamaForCausalLM", 320, 64, 128, 3, 4, 2, 16, 512, 1e-5, RopeConfig())
DECODE = Bucket(8, 8, decode_only=True)
MIXED = Bucket(32, 8, decode_only=False)
NUM_SLOTS, NUM_BLOCKS = 8, 4096


def jitted_step(
    bucket: Bucket,
    layer_loop: LayerLoop,
    dtype: Any,
    platform: str,
    max_steps: int = 1,
    max_drafts: int = 0,
) -> tuple[Any, tuple[Any, ...]]:
    """The step of a bucket, not yet compiled, and its abstract arguments."""
    model = Model(CONFIG, layer_loop=layer_loop, dtype=dtype)
    layout = PackedLayout(bucket, 32, max_steps, max_drafts)
    # Pallas lowers for a chip that it knows, see test_check_configs
    attention = "xla" if platform == "tpu" else None
    state = State(
        abstract_pool(CONFIG, NUM_BLOCKS, 16, dtype, platform, attention),  # type: ignore[arg-type]
        *abstract_tables(CONFIG, NUM_SLOTS),  # type: ignore[arg-type]
    )
    step = jax.jit(make_step(model, layout, StepOptions(attention)), donate_argnums=1)
    packed = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
    masks = jax.ShapeDtypeStruct((bucket.num_seqs, mask_len(CONFIG.vocab_size)), jnp.int32)
    return step, (tuple(jax.tree.leaves(model.stored_parameters())), state, packed, masks)


@pytest.mark.parametrize(("bucket", "max_steps"), [(DECODE, 1), (DECODE, 4), (MIXED, 1)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_pool_is_updated_in_place(bucket: Bucket, max_steps: int, dtype: Any) -> None:
    step, arguments = jitted_step(bucket, "switch", dtype, "cpu", max_steps)
    pool = arguments[1].kv_pool
    pool_bytes = pool.size * pool.dtype.itemsize  # 25 MiB or 50
    analysis = step.lower(*arguments).compile().memory_analysis()
    assert analysis.alias_size_in_bytes > pool_bytes
    assert analysis.temp_size_in_bytes < pool_bytes / 8


@pytest.mark.parametrize(
    ("bucket", "max_steps", "max_drafts"),
    [(DECODE, 1, 0), (DECODE, 4, 0), (MIXED, 1, 0), (MIXED, 1, 7)],
)
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_the_step_lowers_for_accelerators(
    bucket: Bucket, max_steps: int, max_drafts: int, platform: str
) -> None:
    step, arguments = jitted_step(bucket, "scan", jnp.bfloat16, platform, max_steps, max_drafts)
    text = step.trace(*arguments).lower(lowering_platforms=(platform,)).as_text()
    assert "stablehlo.while" in text
    shape = "x".join(map(str, arguments[1].kv_pool.shape))
    assert f"tensor<{shape}xbf16>" in text  # the pool, in its own type


@pytest.mark.parametrize("bucket", [DECODE, MIXED], ids=str)
def test_the_sums_of_embeddings_are_not_copied(bucket: Bucket) -> None:
    step, arguments = jitted_step(bucket, "switch", jnp.float32, "cpu")
    state = arguments[1]
    num_slots = 24  # a shape that nothing else has
    state = State(
        state.kv_pool,
        *(jax.ShapeDtypeStruct((num_slots, *leaf.shape[1:]), leaf.dtype) for leaf in state[1:]),  # type: ignore[arg-type]
    )
    compiled = step.lower(arguments[0], state, *arguments[2:]).compile()
    sums = f"f32[{num_slots},{CONFIG.hidden_size}]"
    instructions = [line.split(" = ") for line in compiled.as_text().splitlines() if " = " in line]
    made = [code.split("(")[0].split()[-1] for _, code in instructions if code.startswith(sums)]
    assert "get-tuple-element" in made  # of the condition's result
    assert "copy" not in made
