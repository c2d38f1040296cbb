"""A picture of the engine at one moment, for those who watch it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxllm.engine.scheduler import Scheduler

FREE, CACHED, USED = "free", "cached", "used"
BlockRun = tuple[str, int, int | None]  # state, number of blocks, index into running if used


@dataclass(frozen=True)
class SequenceSnapshot:
    """A sequence that holds a slot. index: which of its request's answers it is."""

    request_id: str
    index: int
    num_prompt_tokens: int
    num_output_tokens: int
    slot: int
    block_table: tuple[int, ...]


@dataclass(frozen=True)
class EngineSnapshot:
    """running: oldest first. cached_blocks: those with content that can be found, held or not."""

    num_blocks: int
    block_size: int
    kv_usage: float
    num_preemptions: int
    num_waiting: int
    num_generation_tokens: int
    running: tuple[SequenceSnapshot, ...]
    cached_blocks: tuple[int, ...]

    def block_runs(self) -> list[BlockRun]:
        """The pool from its first block to its last, equal neighbours taken together. A block that
        several sequences hold is given to the oldest of them."""
        states = np.full(self.num_blocks, -2)  # [N]: -2 free, -1 cached, else who holds it
        states[list(self.cached_blocks)] = -1
        for index in range(len(self.running) - 1, -1, -1):
            states[list(self.running[index].block_table)] = index
        starts = np.flatnonzero(np.diff(states, prepend=-3))
        lengths = np.diff(starts, append=self.num_blocks)
        return [
            (USED, length, state) if state >= 0 else (FREE if state == -2 else CACHED, length, None)
            for state, length in zip(states[starts].tolist(), lengths.tolist(), strict=True)
        ]


def take_snapshot(scheduler: Scheduler, num_generation_tokens: int) -> EngineSnapshot:
    """Copies what is needed and no more: the engine waits for it."""
    pool = scheduler.pool
    return EngineSnapshot(
        num_blocks=pool.num_blocks,
        block_size=pool.block_size,
        kv_usage=pool.usage,
        num_preemptions=scheduler.num_preemptions,
        num_waiting=scheduler.num_waiting,
        num_generation_tokens=num_generation_tokens,
        running=tuple(
            SequenceSnapshot(
                sequence.request_id,
                sequence.index,
                sequence.num_prompt_tokens,
                sequence.num_known_tokens - sequence.num_prompt_tokens,
                sequence.slot,
                tuple(sequence.block_table),
            )
            for sequence in scheduler.running
        ),
        cached_blocks=pool.cached_blocks,
    )
