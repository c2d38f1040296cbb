"""When the engine did what, as a trace that chrome://tracing and Perfetto show."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

MAX_EVENTS = 200_000  # the last ones; about half an hour of steps of 50 ms
DEVICE = "device"
HOST_LANE, DEVICE_LANE = 1, 2


class Timeline:
    """Spans of time on the clock of time.monotonic; the oldest are dropped.

    Names: schedule, pack, dispatch (the call of the compiled step), device (from the dispatch, or
    the end of the step before, to the result), wait (for that result), postprocess.
    """

    def __init__(self, max_events: int = MAX_EVENTS) -> None:
        self._events: deque[tuple[str, float, float]] = deque(maxlen=max_events)

    def record(self, name: str, start: float, end: float) -> None:
        self._events.append((name, start, end))

    def write(self, path: Path) -> None:
        """As a Chrome trace; times in microseconds."""
        lanes = {HOST_LANE: "engine", DEVICE_LANE: DEVICE}
        events: list[dict[str, object]] = [
            {"name": "thread_name", "ph": "M", "pid": 1, "tid": lane, "args": {"name": name}}
            for lane, name in lanes.items()
        ]
        for name, start, end in list(self._events):
            lane = DEVICE_LANE if name == DEVICE else HOST_LANE
            times = {"ts": round(start * 1e6, 1), "dur": round((end - start) * 1e6, 1)}
            events.append({"name": name, "ph": "X", "pid": 1, "tid": lane, **times})
        path.write_text(json.dumps({"traceEvents": events}))
