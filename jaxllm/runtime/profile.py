"""A trace of a run: the engine's timeline, and JAX's own profile beside it."""

from __future__ import annotations

from pathlib import Path

import jax

from jaxllm.engine.timeline import Timeline
from jaxllm.runtime import chips

TIMELINE_FILE = "timeline.json"


class Profile:
    """Records from its construction until `close`. folder: made if it is missing.

    Raises OSError if the folder cannot be made, RuntimeError if JAX records something already or
    cannot record in this process.
    """

    def __init__(self, folder: Path) -> None:
        if chips.is_libtpu_alone():
            raise RuntimeError(
                "JAX cannot record a profile in a process that has loaded libtpu without a TPU; "
                "use one that does not plan or compile for TPUs, with JAX_PLATFORMS=cpu (or cuda)"
            )
        folder.mkdir(parents=True, exist_ok=True)
        jax.profiler.start_trace(folder)
        self.timeline = Timeline()
        self._folder = folder
        self._closed = False

    def close(self) -> None:
        """Writes both traces. May be called again."""
        if not self._closed:
            self._closed = True
            self.timeline.write(self._folder / TIMELINE_FILE)
            jax.profiler.stop_trace()
