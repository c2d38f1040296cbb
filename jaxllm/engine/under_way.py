"""Steps that were dispatched and whose results were not taken yet."""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.engine.sequence import Batch, StepHandle, StepResult


@dataclass(frozen=True, slots=True)
class StepUnderWay:
    """A dispatched step. needs_host: the next one must not be packed before its result is known."""

    batch: Batch
    handle: StepHandle
    dispatch_time: float
    needs_host: bool


@dataclass(frozen=True, slots=True)
class FailedStep:
    """Stands for a step that could not be dispatched, until those before it are done."""

    error: Exception

    def result(self) -> StepResult:
        """Raises what went wrong."""
        raise self.error
