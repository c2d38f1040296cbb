"""bench ... --compare FILE: results of earlier runs beside this one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.bench.files import read_json
from jaxllm.bench.sweep import point_name
from jaxllm.bench.table import figures, lines, show

SWEEP_KEYS = ("output_throughput", "median_e2el_ms", "p99_e2el_ms")
Result = Mapping[str, Any] | Sequence[Mapping[str, Any]]


def read_results(paths: Sequence[str]) -> dict[str, Result]:
    """By the file's name, or the whole path where two are alike. Raises ValueError."""
    names = [Path(path).stem for path in paths]
    found: dict[str, Result] = {}
    for path, name in zip(paths, names, strict=True):
        content = read_json(path)
        runs = content if isinstance(content, list) else [content]
        if not runs or not all(isinstance(run, dict) and figures(run) for run in runs):
            raise ValueError(f"{path}: is no result of jaxllm bench")
        found[path if names.count(name) > 1 else name] = content
    return found


def compare(this: Result, others: Mapping[str, Result]) -> str:
    """Every figure that this run and another have, and this one's ratio to each of the others.
    Raises ValueError for results of another kind."""
    mine = _flat(this)
    theirs = {name: _flat(other) for name, other in others.items()}
    for name, values in theirs.items():
        if not mine.keys() & values.keys():
            raise ValueError(
                f"{name}: has no figure that this run has, so it was another benchmark"
            )
    head = ["", "this run"]
    for name in theirs:
        head += [name, "ratio"]
    rows = [head]
    for key, value in mine.items():
        if any(key in values for values in theirs.values()):
            row = [key, show(value)]
            for values in theirs.values():
                row += _pair(value, values.get(key))
            rows.append(row)
    return lines(rows)


def _pair(value: float, other: float | None) -> tuple[str, str]:
    if other is None:
        return "-", "-"
    return show(other), f"{value / other:.3f}" if other else "-"


def _flat(result: Result) -> dict[str, float]:
    """Figures by key; those of a sweep by point and key."""
    if isinstance(result, Mapping):
        return figures(result)
    return {
        f"{point_name(dict(run))}: {key}": run[key]
        for run in result
        for key in SWEEP_KEYS
        if key in run
    }
