"""Sequences that wait, and the order in which they are served."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from jaxllm.engine.sequence import Sequence

Key = tuple[float, ...]


def fcfs_key(sequence: Sequence) -> Key:
    """First come, first served."""
    return (sequence.arrival_time, sequence.sequence_id)


def priority_key(sequence: Sequence) -> Key:
    """A smaller priority first; among equals, first come, first served."""
    return (sequence.priority, sequence.arrival_time, sequence.sequence_id)


class WaitingQueue:
    """Sequences in the order of a key that never changes and is unique. O(log n) an operation:
    removed ones stay in the heap until they reach its top or outnumber the others.

    num_sequences: how many wait, the followers of those in the queue included.
    """

    def __init__(self, key: Callable[[Sequence], Key]):
        self._key = key
        self._heap: list[tuple[Key, Sequence]] = []
        self._sizes: dict[int, int] = {}  # sequences that an entry stands for, by sequence_id
        self.num_sequences = 0

    def __len__(self) -> int:
        return len(self._sizes)

    def add(self, sequence: Sequence) -> None:
        """Its followers are known by now."""
        heapq.heappush(self._heap, (self._key(sequence), sequence))
        self._sizes[sequence.sequence_id] = 1 + len(sequence.followers)
        self.num_sequences += 1 + len(sequence.followers)

    def first(self) -> Sequence:
        """The next one; the queue is not empty."""
        while self._heap[0][1].sequence_id not in self._sizes:
            heapq.heappop(self._heap)
        return self._heap[0][1]

    def pop_first(self) -> Sequence:
        """Takes the next one out."""
        sequence = self.first()
        heapq.heappop(self._heap)
        self.num_sequences -= self._sizes.pop(sequence.sequence_id)
        return sequence

    def discard(self, sequence: Sequence) -> None:
        """Takes a sequence out for good (it must not be added again), if it is there."""
        self.num_sequences -= self._sizes.pop(sequence.sequence_id, 0)
        if len(self._heap) > 2 * len(self._sizes) + 16:
            self._heap = [entry for entry in self._heap if entry[1].sequence_id in self._sizes]
            heapq.heapify(self._heap)
