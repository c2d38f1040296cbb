"""What a program costs, read from the program itself: its products and its collectives."""

from __future__ import annotations

import math
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s64": 8,
              "u64": 8, "f64": 8}  # fmt: skip
_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
_COLLECTIVE = re.compile(rf" = (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(")
_COPY = re.compile(r" = (.*?) copy(?:-start)?\(")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"(body|condition|calls|branch_computations)=(\{[^}]*\}|%[\w.-]+)")


def product_flops(jaxpr: Any) -> int:
    """Floating-point operations of all matrix products of a traced program, on all devices
    together. A lower bound: a loop whose length is not known counts once, a condition as its
    cheapest branch, a kernel as it says, and one device's part of attention not at all."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _dot_flops(equation)
        elif name == "cond":
            total += min(product_flops(branch.jaxpr) for branch in params["branches"])
        elif name == "pallas_call":
            estimate = params["cost_estimate"]
            total += estimate.flops if estimate is not None else 0
        elif name != "shard_map":
            times = params["length"] if name == "scan" else 1
            total += times * sum(product_flops(inner) for inner in _inner(params))
    return total


def _dot_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    size = math.prod(equation.outvars[0].aval.shape)
    return 2 * size * math.prod(left[axis] for axis in contracted)


def _inner(params: dict[str, Any]) -> list[Any]:
    values = [v for value in params.values() for v in (value if type(value) is tuple else (value,))]
    return [getattr(v, "jaxpr", v) for v in values if hasattr(getattr(v, "jaxpr", v), "eqns")]


def compile_for_text(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, str]:
    """A compiled program and its optimized HLO. What libtpu compiles cannot always be printed by
    jaxlib's older HLO, so the compiler writes it itself."""
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, str | bool] = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        compiled = lowered.compile(options)
        (path,) = Path(folder).glob("*after_optimizations.txt")
        return compiled, path.read_text()


@dataclass
class _Computation:
    """One of a module: the bytes of its own collectives, the types of arrays that it makes by
    copying, what it calls and how often."""

    own: float = 0.0
    copied: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    loops: list[tuple[str, str]] = field(default_factory=list)  # condition, body
    branches: list[list[str]] = field(default_factory=list)
    constants: list[int] = field(default_factory=list)
    compares: bool = False


def collective_bytes(hlo: str, num_devices: int) -> float:
    """Bytes that each device sends to others in one run of a program. A lower bound, as
    `product_flops`; all-reduce as a reduce-scatter and an all-gather."""
    computations, entry = _parse(hlo, num_devices)

    def total(name: str) -> float:
        this = computations[name]
        called = sum(total(other) for other in this.calls)
        loops = sum(_trips(computations[c]) * total(body) for c, body in this.loops)
        branches = sum(min(map(total, names)) for names in this.branches)
        return this.own + called + loops + branches

    return total(entry)


def copies(hlo: str, array: jax.ShapeDtypeStruct) -> bool:
    """Whether a program makes another array of the shape that one has on a device: a copy of it,
    also to another layout. A fusion in a fusion only says how a part that is read lies."""
    assert array.sharding is not None
    shape = array.sharding.shard_shape(array.shape)
    text = f"[{','.join(map(str, shape))}]"
    computations, _ = _parse(hlo, 1)
    fused = {name for computation in computations.values() for name in computation.calls}
    nested = {name for outer in fused for name in computations[outer].calls}
    return any(
        text in made
        for name, computation in computations.items()
        if name not in nested
        for made in computation.copied
    )


def _parse(hlo: str, num_devices: int) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = "", _Computation()
    for line in hlo.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[1]] = _Computation()
            if line.startswith("ENTRY"):
                entry = header[1]
        elif " = " in line:
            _read_instruction(line, current, num_devices)
    return computations, entry


def _read_instruction(line: str, computation: _Computation, num_devices: int) -> None:
    if found := _COLLECTIVE.search(line):
        computation.own += _sent(found[2], _largest_array(found[1]), num_devices)
    if found := _COPY.search(line):
        computation.copied.append(found[1])
    if found := re.search(r" s32\[\][^ ]* constant\((\d+)\)", line):
        computation.constants.append(int(found[1]))
    computation.compares |= " compare(" in line
    called = {kind: re.findall(r"%([\w.-]+)", names) for kind, names in _CALLED.findall(line)}
    if "body" in called:
        computation.loops.append((called["condition"][0], called["body"][0]))
    computation.calls += called.get("calls", [])
    if "branch_computations" in called:
        computation.branches.append(called["branch_computations"])


def _trips(condition: _Computation) -> int:
    """How often a loop runs whose condition compares its counter with a constant, else 1."""
    return condition.constants[0] if condition.compares and len(condition.constants) == 1 else 1


def _largest_array(shape: str) -> int:
    return max(
        (
            ITEM_BYTES.get(kind, 1 if kind.startswith("f8") else 4)
            * math.prod(int(size) for size in sizes.split(",") if size)
            for kind, sizes in _ARRAY.findall(shape)
        ),
        default=0,
    )


def _sent(kind: str, size: int, num_devices: int) -> float:
    """Bytes that a device sends. size: of the result, which a start's shape holds as well."""
    others = (num_devices - 1) / num_devices
    if kind == "all-reduce":
        return 2 * others * size
    if kind == "reduce-scatter":
        return (num_devices - 1) * size
    return size if kind == "collective-permute" else others * size
