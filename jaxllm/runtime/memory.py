"""How much memory there is, and how many blocks of the pool it holds."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import jax
import psutil

from jaxllm.config import ModelConfig

GIB = 1 << 30
CONTROL_GROUP = Path("/sys/fs/cgroup")
CPU_SHARE = 0.25  # of the machine's memory for the pool: on a CPU others live there too
# Of host memory, measured with a model of 30 layers on CPU: what each program takes once it is
# loaded, and the compiler beside that.
PROGRAM_BYTES = 25 << 20
COMPILER_BYTES = 200 << 20
RESERVE_SHARE = 0.04  # of an accelerator's memory, for the runtime and fragmentation


@dataclass(frozen=True)
class StepMemory:
    """What a step's program takes of a device, in bytes. temporaries: those and the results that
    are no argument's memory; code: the program itself."""

    temporaries: int
    code: int = 0
    arguments: int = 0

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> StepMemory:
        """By the compiler's own figures."""
        analysis = compiled.memory_analysis()
        if analysis is None:
            return cls(0)
        results = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
        return cls(
            analysis.temp_size_in_bytes + max(0, results),
            analysis.generated_code_size_in_bytes,
            analysis.argument_size_in_bytes,
        )

    @classmethod
    def estimated(cls, config: ModelConfig, num_tokens: int, num_seqs: int) -> StepMemory:
        """An upper bound from shapes, before there is a program."""
        widest = max(3 * config.intermediate_size, 4 * config.num_heads * config.head_dim)
        logits = 6 * num_seqs * config.vocab_size
        return cls(4 * (num_tokens * (4 * config.hidden_size + 2 * widest) + logits))


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that an engine takes of each device, as it says at start-up. programs: compiled code,
    on an accelerator. process: what the interpreter, its libraries and the compiler hold in this
    process; only counted where the device is the host. draft_model: its parameters, pool and
    sampling state."""

    parameters: int
    pool: int
    state: int
    temporaries: int
    programs: int = 0
    process: int = 0
    draft_model: int = 0

    @classmethod
    def on_device(
        cls, parameters: int, pool: int, state: int, step: StepMemory, num_programs: int
    ) -> MemoryPlan:
        """That of an accelerator. step: the most of any bucket."""
        return cls(parameters, pool, state, step.temporaries, step.code * num_programs)

    @property
    def total(self) -> int:
        return (
            self.parameters + self.pool + self.state + self.temporaries + self.programs
            + self.process + self.draft_model
        )  # fmt: skip

    def __str__(self) -> str:
        parts = [
            f"parameters {_gib(self.parameters)}",
            f"block pool {_gib(self.pool)}",
            f"sampling state {_gib(self.state)}",
            f"temporaries {_gib(self.temporaries)}",
        ]
        if self.programs:
            parts.append(f"programs {_gib(self.programs)}")
        if self.draft_model:
            parts.append(f"draft model {_gib(self.draft_model)}")
        if self.process:
            parts.append(f"process {_gib(self.process)}")
        return f"{_gib(self.total)} GiB = " + " + ".join(parts)


def host_memory(control_group: Path = CONTROL_GROUP) -> int:
    """Bytes of memory that this process may use: the machine's, or its control group's if less."""
    total = psutil.virtual_memory().total
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        limit = control_group / name
        if limit.is_file() and (text := limit.read_text().strip()).isdecimal():
            total = min(total, int(text))
    return total


def host_pool_budget() -> int:
    """Bytes that the pool may take of a CPU's memory. It depends on the machine only, not on what
    else runs, so that the same programs serve every start."""
    return int(host_memory() * CPU_SHARE)


def device_memory(device: jax.Device) -> int:
    """Bytes of an accelerator's memory that programs may use."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise ValueError(
            f"{device} does not say how much memory it has; give kv_cache_memory_bytes"
        )
    return int(limit)


def reserve(device_memory: int) -> int:
    """Bytes of an accelerator's memory that are left alone."""
    return math.ceil(device_memory * RESERVE_SHARE)


def left_for_pool(
    device_memory: int, *, parameters: int, state: int, step: StepMemory, num_programs: int
) -> int:
    """Bytes of an accelerator's memory that nothing else needs. step: the most of any bucket."""
    others = MemoryPlan.on_device(parameters, 0, state, step, num_programs)
    return device_memory - reserve(device_memory) - others.total


def num_pool_blocks(
    budget: int, bytes_of_block: int, block_size: int, max_num_seqs: int, max_model_len: int
) -> int:
    """Blocks in a budget, never more than max_num_seqs sequences of max_model_len need. Raises
    ValueError when one sequence does not fit."""
    blocks_of_sequence = math.ceil(max_model_len / block_size)
    num_blocks = min(budget // bytes_of_block, max_num_seqs * blocks_of_sequence)
    if num_blocks < blocks_of_sequence:
        fitting_len = max(0, budget // bytes_of_block) * block_size
        raise ValueError(
            f"the block pool gets {max(0, budget) / GIB:.2f} GiB, which holds {fitting_len} "
            f"tokens, but one sequence of max_model_len {max_model_len} needs "
            f"{blocks_of_sequence * bytes_of_block / GIB:.2f} GiB; lower max_model_len or raise "
            f"kv_cache_memory_bytes"
        )
    return num_blocks


def process_bytes() -> int:
    """Resident memory of this process now."""
    return psutil.Process().memory_info().rss


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"
