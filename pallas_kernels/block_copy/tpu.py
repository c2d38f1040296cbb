"""Block copies on TPU: from memory to memory, without passing through the chip.

The pools stay where they are and the target is changed in place. One copy moves a block of all
layers, and a window of copies is in flight at a time.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

IN_FLIGHT = 8


def _kernel(
    pairs_ref: Any,  # [2P] in SMEM
    *refs: Any,  # inputs: source [L, M, ...] if it is another pool, target [L, N, ...];
    # output: the target again; scratch: semaphores [IN_FLIGHT]
) -> None:
    *_, target_ref, semaphores = refs
    source_ref = refs[0] if len(refs) == 4 else target_ref
    num_pairs = pairs_ref.shape[0] // 2

    def copy_if_real(pair: jax.Array, act: str) -> None:
        read, write = pairs_ref[2 * pair], pairs_ref[2 * pair + 1]
        is_source = (read >= 0) & (read < source_ref.shape[1])
        is_target = (write >= 0) & (write < target_ref.shape[1])

        @pl.when(is_source & is_target)
        def _() -> None:
            copy = pltpu.make_async_copy(
                source_ref.at[:, read], target_ref.at[:, write], semaphores.at[pair % IN_FLIGHT]
            )
            getattr(copy, act)()

    def step(pair: jax.Array, _: None) -> None:
        @pl.when(pair >= IN_FLIGHT)
        def _wait() -> None:
            copy_if_real(pair - IN_FLIGHT, "wait")

        @pl.when(pair < num_pairs)
        def _start() -> None:
            copy_if_real(pair, "start")

    jax.lax.fori_loop(0, num_pairs + IN_FLIGHT, step, None)


def copy_blocks(pool: jax.Array, pairs: jax.Array, source: jax.Array | None) -> jax.Array:
    """Every case that api.py describes."""
    operands = [pool] if source is None else [source, pool]
    return pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(1,),
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(operands),
            out_specs=pl.BlockSpec(memory_space=pl.ANY),
            scratch_shapes=[pltpu.SemaphoreType.DMA((IN_FLIGHT,))],
        ),
        out_shape=jax.ShapeDtypeStruct(pool.shape, pool.dtype),
        input_output_aliases={len(operands): 0},
        name="copy_blocks",
    )(pairs.reshape(-1), *operands)
