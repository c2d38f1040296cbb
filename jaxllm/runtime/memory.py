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
class MemoryPlan:
    """Bytes that an engine takes, as it says at start-up. process: what the interpreter, its
    libraries and the compiler hold in this process; only counted where the device is the host."""

    parameters: int
    pool: int
    state: int
    temporaries: int
    process: int

    @property
    def total(self) -> int:
        return self.parameters + self.pool + self.state + self.temporaries + self.process

    def __str__(self) -> str:
        parts = [
            f"parameters {_gib(self.parameters)}",
            f"block pool {_gib(self.pool)}",
            f"sampling state {_gib(self.state)}",
            f"temporaries {_gib(self.temporaries)}",
        ]
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


def pool_budget(device: jax.Device, parameters: int, state: int, temporaries: int) -> int:
    """Bytes that the pool may take on a device. It depends on the machine and the model only, not
    on what else runs, so that the same programs serve every start.

    CPU: a share of the host's memory. Elsewhere: the device's memory less what is given, less a
    reserve.
    """
    if device.platform == "cpu":
        return int(host_memory() * CPU_SHARE)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None:
        raise ValueError(
            f"{device} does not say how much memory it has; give kv_cache_memory_bytes"
        )
    return int(limit * (1 - RESERVE_SHARE)) - parameters - state - temporaries


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


def estimated_temporaries(config: ModelConfig, num_tokens: int, num_seqs: int) -> int:
    """An upper bound, from shapes, on what a step needs beside its arguments; the compiler's own
    figure replaces it as soon as there is one."""
    widest = max(3 * config.intermediate_size, 4 * config.num_heads * config.head_dim)
    logits = 6 * num_seqs * config.vocab_size
    return 4 * (num_tokens * (4 * config.hidden_size + 2 * widest) + logits)


def process_bytes() -> int:
    """Resident memory of this process now."""
    return psutil.Process().memory_info().rss


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"
