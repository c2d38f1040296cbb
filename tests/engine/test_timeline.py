"""The timeline: what a trace viewer reads, and that steps are on it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

from fake_runner import VOCAB_SIZE, FakeRunner, ids

from jaxllm.config import EngineConfig
from jaxllm.engine.engine import Engine, Request
from jaxllm.engine.timeline import Timeline
from jaxllm.sampling_params import SamplingParams

CONFIG = EngineConfig(
    num_blocks=12, block_size=4, max_model_len=40, max_num_seqs=3, max_num_batched_tokens=16
)


def written(timeline: Timeline, folder: Path) -> list[dict[str, Any]]:
    path = folder / "timeline.json"
    timeline.write(path)
    events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def test_spans_are_written_in_microseconds_and_lanes(tmp_path: Path) -> None:
    timeline = Timeline()
    timeline.record("schedule", 2.0, 2.25)
    timeline.record("device", 2.5, 3.0)
    *lanes, schedule, device = written(timeline, tmp_path)
    assert {lane["tid"]: lane["args"]["name"] for lane in lanes} == {1: "engine", 2: "device"}
    assert schedule == {
        "name": "schedule", "ph": "X", "pid": 1, "tid": 1, "ts": 2e6, "dur": 250e3,
    }  # fmt: skip
    assert (device["tid"], device["ts"], device["dur"]) == (2, 2.5e6, 500e3)


def test_only_the_last_spans_are_kept(tmp_path: Path) -> None:
    timeline = Timeline(max_events=2)
    for number in range(5):
        timeline.record(str(number), number, number + 1)
    assert [e["name"] for e in written(timeline, tmp_path) if e["ph"] == "X"] == ["3", "4"]


def test_each_step_of_the_engine_is_on_it(tmp_path: Path) -> None:
    timeline = Timeline()
    engine = Engine(CONFIG, FakeRunner(CONFIG), vocab_size=VOCAB_SIZE, timeline=timeline)
    engine.add_request(Request("r", ids("abc"), SamplingParams(max_tokens=4, ignore_eos=True)))
    while engine.has_unfinished_requests():
        engine.step()
    events = [event for event in written(timeline, tmp_path) if event["ph"] == "X"]
    for name in ("device", "wait", "postprocess"):
        assert sum(event["name"] == name for event in events) == 4, name
    assert sum(event["name"] == "schedule" for event in events) == 5  # the last finds nothing to do
    device = [event for event in events if event["name"] == "device"]
    for before, after in itertools.pairwise(device):
        assert before["ts"] + before["dur"] <= after["ts"] + 0.2, "one step at a time"
