"""What a program costs, against counts by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxllm.runtime.cost import collective_bytes, copies, product_flops

A = jax.ShapeDtypeStruct((8, 16), jnp.float32)
B = jax.ShapeDtypeStruct((16, 16), jnp.float32)
ONE = 2 * 8 * 16 * 16  # multiplications and additions of a @ b


def scanned(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda x, _: (x @ b, None), a, length=5)[0]


def looped(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ b, a)


def chosen(a: jax.Array, b: jax.Array) -> jax.Array:
    return jax.lax.cond(a[0, 0] > 0, lambda: a @ b @ b @ b, lambda: a @ b)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda a, b: a + 1, 0),
        (lambda a, b: a @ b, ONE),
        (lambda a, b: jax.jit(lambda x: x @ b)(a) @ b, 2 * ONE),
        (lambda a, b: jnp.einsum("te,ef->ft", a, b), ONE),
        (scanned, 5 * ONE),
        (looped, ONE),
        (chosen, ONE),
        (lambda a, b: scanned(a, b) + looped(a, b), 6 * ONE),
    ],
)
def test_products_of_a_program(function: Callable[..., Any], expected: int) -> None:
    assert product_flops(jax.jit(function).trace(A, B).jaxpr.jaxpr) == expected


HLO = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}

%fused (p: bf16[4,8]) -> bf16[4,64] {
  ROOT %gathered = bf16[4,64]{1,0} all-gather(%p), dimensions={1}
}

%layer (arg: (s32[], bf16[4,64])) -> (s32[], bf16[4,64]) {
  %reduced = bf16[4,64]{1,0:T(8,128)(2,1)} all-reduce(%x), to_apply=%add
  ROOT %out = (s32[], bf16[4,64]) tuple(%i, %reduced)
}

%until_the_last_layer (arg: (s32[], bf16[4,64])) -> pred[] {
  %number = s32[]{:T(128)} constant(30)
  ROOT %less = pred[] compare(%i, %number), direction=LT
}

%unknown (arg: (s32[], s32[])) -> pred[] {
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%nothing (arg: f32[8]) -> f32[8] {
  ROOT %same = f32[8]{0} copy(%arg)
}

%much (arg: f32[8]) -> f32[8] {
  ROOT %moved = f32[8000]{0} collective-permute(%arg)
}

ENTRY %main (p: bf16[4,8]) -> bf16[4,64] {
  %f = bf16[4,64]{1,0} fusion(%p), kind=kCustom, calls=%fused
  %layers = (s32[], bf16[4,64]) while(%t), condition=%until_the_last_layer, body=%layer
  %more = (s32[], bf16[4,64]) while(%t), condition=%unknown, body=%layer
  %c = f32[8]{0} conditional(%i, %a, %b), branch_computations={%nothing, %much}
  %start = (bf16[2,64], bf16[16,64]) all-gather-start(%p), dimensions={0}
  ROOT %done = bf16[16,64]{1,0} all-gather-done(%start)
}
"""


def test_collectives_of_a_program() -> None:
    """On 8 devices: an all-reduce of 512 bytes in 30 layers and in a loop that counts once, an
    all-gather of 512 bytes in a fusion and one of 2,048; the cheaper branch sends nothing."""
    seven_eighths = 7 / 8
    expected = 31 * 2 * seven_eighths * 512 + seven_eighths * (512 + 2048)
    assert collective_bytes(HLO, 8) == pytest.approx(expected)
    assert collective_bytes(HLO, 1) == 0


def test_kinds_of_collectives() -> None:
    def sent(instruction: str) -> float:
        hlo = f"ENTRY %main (p: f32[8]) -> f32[8] {{\n  %x = {instruction}\n}}\n"
        return collective_bytes(hlo, 4)

    assert sent("f32[8]{0} reduce-scatter(%p), dimensions={0}") == 3 * 32
    assert sent("f32[8]{0} all-to-all(%p), dimensions={0}") == 24
    assert sent("f8e4m3fn[8]{0} collective-permute(%p)") == 8
    assert sent("s8[8]{0} collective-permute(%p)") == 8
    assert sent("f32[8]{0} add(%p, %p)") == 0


def described_pool() -> jax.ShapeDtypeStruct:
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("tensor",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct((4, 8, 16), "bfloat16", sharding=sharding)


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("%copy.1 = bf16[4,8,16]{2,1,0} copy(%pool)", True),
        ("%s = (bf16[4,8,16]{0,1,2}, bf16[4,8,16]{2,1,0}, u32[]) copy-start(%pool)", True),
        ("%copy.1 = bf16[4,8]{1,0} copy(%other)", False),
        ("%pool = bf16[4,8,16]{2,1,0} get-tuple-element(%state), index=0", False),
        ("%f = bf16[4,8,16]{2,1,0} fusion(%pool, %copy.2), kind=kCustom", False),
    ],
)
def test_a_copy_of_the_pool_is_found(instruction: str, expected: bool) -> None:
    pool = described_pool()
    assert copies(f"ENTRY %main (p: s32[]) -> s32[] {{\n  {instruction}\n}}\n", pool) == expected


NESTED = """
%view (input: bf16[4,8,16]) -> bf16[4,8,16] {
  ROOT %copy.1 = bf16[4,8,16]{2,1,0:T(8,128)} copy(%input)
}
%part (p: bf16[4,8,16]) -> bf16[4,1,16] {
  %seen = bf16[4,8,16]{2,1,0:T(8,128)} fusion(%p), kind=kLoop, calls=%view
  ROOT %slice = bf16[4,1,16] dynamic-slice(%seen)
}
ENTRY %main (p: bf16[4,8,16]) -> bf16[4,1,16] {
  ROOT %out = bf16[4,1,16] fusion(%p), kind=kLoop, calls=CALLED
}
"""


@pytest.mark.parametrize(("called", "expected"), [("%part", False), ("%view", True)])
def test_a_view_within_a_fusion_is_no_copy(called: str, expected: bool) -> None:
    pool = described_pool()
    assert copies(NESTED.replace("CALLED", called), pool) == expected
