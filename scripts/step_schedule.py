#!/usr/bin/env python3
"""How long the compiler expects a decoding step to take, for a chip that need not be there, beside
the time of reading its weights and its sequences' keys and values once.

    python scripts/step_schedule.py --config llama-3-8b-v6e --num-seqs 64 --context 1024

libtpu writes into a program how many cycles it expects of each operation; loops count as often as
they run, a condition as its cheapest branch (greedy sampling, nothing else asked for), and an
operation without an estimate as the least that any has. Kernels have none. Attention's cycles are
the larger of its bundles and its copies, item by item, and the bundles of writing new tokens, one
after the other; those of a product with int8 weights are as tune_kernels.py counts them. Copies are
at the stated bandwidth, or a share of it: the compiler itself allows for about 0.87 (--bandwidth).
Several minutes; needs libtpu.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections import defaultdict
from collections.abc import Hashable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import check_configs
import kernel_schedule
import tpu_dumps
import tune_kernels

from jaxllm.runtime import kv_cache
from jaxllm.runtime.chips import CHIPS, Chip
from jaxllm.runtime.compilation import lower
from jaxllm.runtime.memory import StepMemory
from pallas_kernels.device import device_kind
from pallas_kernels.quantized_matmul.block_sizes import Problem, block_sizes

LEAST = 2100  # cycles that the compiler gives any operation of its own
ATTENTION, PRODUCTS = "attention", "products"  # kinds of operations
KERNEL = re.compile(r"%(ragged_paged_attention|quantized_matmul)[\w.-]* = .* custom-call\(")
INT8_PRODUCT = re.compile(r"bf16\[(\d+),(\d+)\].*? s8\[\d+,\d+,(\d+)\]")
# operations that move nothing, or that run beside others
FREE = re.compile(
    r" (?:parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|partition-id"
    r"|(?:copy|async|all-reduce|collective-permute)-(?:start|done|update)|after-all)\("
)
HEADER = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


@dataclass
class Computation:
    """Part of a program: cycles of its own by kind, and what else it runs."""

    own: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    loops: list[tuple[str, str]] = field(default_factory=list)  # condition, body
    branches: list[list[str]] = field(default_factory=list)
    constants: list[int] = field(default_factory=list)


def kernel_call(line: str) -> Hashable | None:
    """What a line of a program calls: ATTENTION, or the int8 product that it is."""
    found = KERNEL.search(line)
    if found is None or found[1] != "quantized_matmul":
        return ATTENTION if found else None
    sizes = INT8_PRODUCT.search(line, line.index("operand_layout_constraints"))
    assert sizes is not None, line
    return Problem(*map(int, sizes.groups()), weight_bits=8, row_bits=16)


def read_program(text: str, prices: Mapping[Hashable, int]) -> tuple[dict[str, Computation], str]:
    """The computations of a program after code generation, and the first one's name. prices: cycles
    of each kernel_call."""
    computations: dict[str, Computation] = {}
    entry, current = "", Computation()
    for line in text.splitlines():
        if header := HEADER.match(line):
            current = computations[header[1]] = Computation()
            entry = header[1] if line.startswith("ENTRY") else entry
        elif " = " in line:
            _read(line, current, prices)
    return computations, entry


def _read(line: str, computation: Computation, prices: Mapping[Hashable, int]) -> None:
    if found := re.search(r" s32\[\][^ ]* constant\((\d+)\)", line):
        computation.constants.append(int(found[1]))
    if found := re.search(r" while\(.* condition=%([\w.-]+), body=%([\w.-]+)", line):
        computation.loops.append((found[1], found[2]))
    if found := BRANCHES.search(line):
        computation.branches.append(re.findall(r"%([\w.-]+)", found[1]))
    if call := kernel_call(line):
        computation.own[ATTENTION if call == ATTENTION else PRODUCTS] += prices[call]
    elif not FREE.search(line):
        estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
        kind = PRODUCTS if "convolution_algorithm_config" in line else "other"
        computation.own[kind] += int(estimate[1]) if estimate else LEAST


def cycles(computations: dict[str, Computation], name: str) -> dict[str, int]:
    """By kind, of one run. A loop that ends by what it computes runs once."""
    this = computations[name]
    total = defaultdict(int, this.own)
    for condition, body in this.loops:
        constants = computations[condition].constants
        _add(total, cycles(computations, body), constants[0] if len(constants) == 1 else 1)
    for branches in this.branches:
        costs = [cycles(computations, branch) for branch in branches]
        _add(total, min(costs, key=lambda cost: sum(cost.values())), 1)
    return total


def _add(total: dict[str, int], part: dict[str, int], times: int) -> None:
    for kind, count in part.items():
        total[kind] += times * count


def kernel_prices(
    calls: set[Any],
    chip: Chip,
    case: tuple[int, int, int, str],
    block_size: int,
    num_seqs: int,
    context: int,
) -> dict[Hashable, int]:
    """Cycles of each call. In a process of its own: libtpu would write the programs of a whole
    model too, gigabytes of them."""
    with tempfile.TemporaryDirectory() as folder:
        dump = Path(folder)
        tpu_dumps.start_dumps(dump)
        matmul = tune_kernels.tunables()["quantized_matmul"]
        with tpu_dumps.described(chip):
            kind = device_kind()
        prices: dict[Hashable, int] = {
            ATTENTION: attention_cycles(chip, case, block_size, num_seqs, context, dump)
        }
        for call in calls - {ATTENTION}:
            sizes = block_sizes(call, kind)
            found = tune_kernels.estimate(matmul, "quantized_matmul", call, sizes, chip, dump)
            prices[call] = round(found.cycles)
    return prices


def attention_cycles(
    chip: Chip,
    case: tuple[int, int, int, str],
    block_size: int,
    num_seqs: int,
    context: int,
    dump: Path,
) -> int:
    """Of one layer's call, for sequences of one new token each."""
    problem, tile, loops, _ = kernel_schedule.compile_case(
        chip.name, case, dump, block_size, num_seqs
    )
    num_blocks = -(-context // block_size)
    num_full, rest = divmod(num_blocks, problem.fetch_blocks)
    items = [problem.fetch_blocks] * num_full + ([rest] if rest else [])
    bundles = sum(kernel_schedule.item_bundles(loops, problem, tile, n)[0] for n in items)
    _, num_kv_heads, head_dim, _ = case
    of_block = block_size * 2 * num_kv_heads * head_dim * problem.pool_dtype.itemsize
    copies = of_block / tpu_dumps.bytes_per_cycle(chip)
    reading = max(bundles, num_blocks * copies)
    return round(num_seqs * (reading + kernel_schedule.write_bundles(loops, num_kv_heads)))


def report(name: str, seconds: float, memory: StepMemory, chip: Chip, parts: dict[str, int],
           bound: int) -> None:  # fmt: skip
    """Prints the parts, the whole and the bound in cycles and milliseconds."""
    print(f"{name}: compiled in {seconds:.0f} s of processor time, {memory.temporaries:,} bytes of "
          f"temporaries")  # fmt: skip
    rows = {**parts, "all": sum(parts.values()), "weights and context read once": bound}
    for part, count in rows.items():
        print(f"| {part} | {count:,} | {count / chip.clock * 1e3:.2f} ms | {count / bound:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    one_device = [s.config for s in check_configs.SETUPS if s.num_devices == 1]
    parser.add_argument("--config", choices=one_device, default="llama-3-8b-v6e")
    parser.add_argument("--chip", choices=CHIPS, default="v6e")
    parser.add_argument("--num-seqs", type=int, default=64, help="of a decode bucket")
    parser.add_argument("--context", type=int, default=1024, help="tokens of each sequence")
    parser.add_argument("--quantization", choices=["int8"], help="as of the engine")
    parser.add_argument("--kv-cache-dtype", default="auto", help="as of the engine")
    parser.add_argument(
        "--bandwidth", type=float, default=1.0, help="share of the stated one that kernels reach"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        estimate(arguments, Path(folder))


def estimate(arguments: argparse.Namespace, folder: Path) -> None:
    """Compiles the step and the kernel and prints what they take."""
    chip = CHIPS[arguments.chip]
    setup = next(s for s in check_configs.SETUPS if s.config == arguments.config)
    programs = check_configs.programs(
        setup, chip.name,
        quantization=arguments.quantization, kv_cache_dtype=arguments.kv_cache_dtype,
    )  # fmt: skip
    model, limits = programs.model.config, programs.config
    fitting = [b for b in programs.buckets if b.decode_only and b.num_seqs == arguments.num_seqs]
    if not fitting:
        raise SystemExit(f"--num-seqs {arguments.num_seqs} is no decode bucket")
    case = (model.num_heads, model.num_kv_heads, model.head_dim, str(programs.model.kv_dtype))
    options: dict[str, Any] = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    _, lowered = lower(programs.step(fitting[0]), programs.placement)
    started = time.process_time()
    compiled = lowered.compile(options)
    seconds = time.process_time() - started
    (text,) = folder.glob("*after_codegen.txt")
    lines = text.read_text()
    calls = {call for line in lines.splitlines() if (call := kernel_call(line))}
    reached = replace(chip, memory_bandwidth=arguments.bandwidth * chip.memory_bandwidth)
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        prices = process.submit(
            kernel_prices, calls, reached, case, limits.block_size, arguments.num_seqs,
            arguments.context,
        ).result()  # fmt: skip
    parts = cycles(*read_program(lines, prices))
    of_token = kv_cache.block_bytes(model, 1, programs.model.kv_dtype)
    context = arguments.num_seqs * arguments.context * of_token
    bound = round((programs.weights_read + context) / tpu_dumps.bytes_per_cycle(chip))
    name = (
        f"{arguments.config} {chip.name}, {fitting[0]}, {arguments.context} tokens each, weights "
        f"{programs.model.quantization or programs.model.dtype}, cache {programs.model.kv_dtype}"
    )
    report(name, seconds, StepMemory.of(compiled), chip, parts, bound)


if __name__ == "__main__":
    main()
