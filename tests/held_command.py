"""A command in a process of its own, whose engine stops in the midst of an answer until the test
lets it go on: what the test does meanwhile cannot come too late."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

NUM_STEPS = 20  # before it stops; the answer's first text has been written by then
PROGRAM = f"""
import os, sys
from jaxllm.cli import main
from jaxllm.runtime.model_runner import ModelRunner

execute, numbers = ModelRunner.execute, iter(range(10**6))

def held(runner, batch):
    if next(numbers) == {NUM_STEPS}:
        os.read(int(os.environ["HELD_FD"]), 1)
    return execute(runner, batch)

ModelRunner.execute = held
main()
"""


@dataclass(frozen=True)
class Hold:
    """How a child is started, and what lets it go on."""

    read_fd: int
    write_fd: int

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-c", PROGRAM, *words]

    def environment(self) -> dict[str, str]:
        return {**os.environ, "HELD_FD": str(self.read_fd)}

    def release(self) -> None:
        os.write(self.write_fd, b"x")


@contextmanager
def hold() -> Iterator[Hold]:
    """To be left when the child has ended. Give subprocess pass_fds=(hold.read_fd,)."""
    pipe = Hold(*os.pipe())
    try:
        yield pipe
    finally:
        os.close(pipe.read_fd)
        os.close(pipe.write_fd)
