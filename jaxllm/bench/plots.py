"""Pictures of results, each as PNG and as SVG. Only this file needs matplotlib."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.bench.sweep import X, point_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
WITHOUT = "--plot needs matplotlib: pip install 'jaxllm[bench]' (or matplotlib)"
TITLES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2EL", "latency": "batch"}


def check_folder(folder: str) -> Path:
    """Makes the folder, before anything is measured. Raises ValueError if that, or a plot, cannot
    be made."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError(WITHOUT) from None
    path = Path(folder).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--plot {folder}: cannot be made: {error.strerror}") from error
    return path


def plot_serve(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """The distributions of a run's times, and its timeline where the server shows one."""
    good = [i for i, error in enumerate(result["errors"]) if not error]
    latencies = [result["latencies"][i] for i in good]
    ttfts, lens = [result["ttfts"][i] for i in good], [result["output_lens"][i] for i in good]
    times = zip(latencies, ttfts, lens, strict=True)
    values = {
        "ttft": ttfts,
        "tpot": [(latency - ttft) / (n - 1) for latency, ttft, n in times if n > 1],
        "itl": [itl for i in good for itl in result["itls"][i]],
        "e2el": latencies,
    }
    files = plot_distributions(values, folder)
    if result["timeline"] is not None:
        timeline: dict[str, list[float]] = result["timeline"]
        files += _draw(folder, "timeline", (8, 5), lambda figure: _timeline(figure, timeline))
    return files


def plot_distributions(seconds: Mapping[str, Sequence[float]], folder: Path) -> list[Path]:
    """The share of values at or below each time."""

    def draw(figure: Figure) -> None:
        axes = np.atleast_1d(figure.subplots(1, len(seconds), sharey=True))
        for one, (name, values) in zip(axes, seconds.items(), strict=True):
            ordered = 1e3 * np.sort(np.asarray(values, float))
            one.step(ordered, (1 + np.arange(len(ordered))) / max(1, len(ordered)), where="post")
            one.set_xlabel(f"{TITLES[name]} (ms)")
            one.set_ylim(0, 1)
            one.grid(alpha=0.3)
        axes[0].set_ylabel("share of values")

    return _draw(folder, "latency", (3 * len(seconds) + 1, 3.5), draw)


def _timeline(figure: Figure, timeline: Mapping[str, Sequence[float]]) -> None:
    requests, cache = figure.subplots(2, 1, sharex=True)
    times = timeline["times"]
    for name in ("running", "waiting"):
        requests.plot(times, timeline[f"num_requests_{name}"], label=name)
    requests.set_ylabel("requests")
    requests.legend()
    cache.plot(times, 100 * np.asarray(timeline["kv_cache_usage_perc"]))
    cache.set_ylabel("KV cache in use (%)")
    cache.set_ylim(0, 100)
    cache.set_xlabel("seconds")


def plot_sweep(results: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """Throughput against latency, a point for each run, the knee marked."""
    curves = {
        "E2EL (ms)": ("median_e2el_ms", "p99_e2el_ms"),
        "TPOT (ms)": ("median_tpot_ms", "p99_tpot_ms"),
    }

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(curves))
        for one, (title, keys) in zip(axes, curves.items(), strict=True):
            _curve(one, results, [key for key in keys if key in results[0]])
            one.set_xlabel("output tokens/s")
            one.set_ylabel(title)

    return _draw(folder, "curve", (11, 4.5), draw)


def _curve(axes: Axes, results: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    x = [result[X] for result in results]
    for key in keys:
        axes.plot(x, [result[key] for result in results], marker="o", label=key.split("_")[0])
    for result in results if keys else ():
        position = (result[X], result[keys[0]])
        near: dict[str, Any] = {"textcoords": "offset points", "xytext": (4, -9), "fontsize": 7}
        axes.annotate(point_name(dict(result)), position, **near)
        if result.get("is_knee"):
            (ring,) = axes.plot(*position, "o", color="red", label="knee")
            ring.set(markersize=14, fillstyle="none")
    axes.margins(x=0.15)  # room for the last point's name
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw(
    folder: Path, name: str, size: tuple[float, float], draw: Callable[[Figure], None]
) -> list[Path]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    files = [folder / f"{name}.{suffix}" for suffix in FORMATS]
    for file in files:
        figure.savefig(file)
    return files
