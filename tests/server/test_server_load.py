"""Two hundred clients at once, of which many behave badly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loop_lag import lag_of, percentile
from server_on_a_thread import RunningServer

SCRIPT = Path(__file__).parents[2] / "scripts" / "load_test.py"


def load_test(base_url: str, *options: str) -> subprocess.CompletedProcess[str]:
    """The script, in a process of its own so that its memory and its loop are not the server's."""
    command = [sys.executable, str(SCRIPT), "--base-url", base_url, "--model", "tiny", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.long
def test_two_hundred_clients(server: RunningServer, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    warm_up = load_test(server.base_url, "--clients", "20", "--seconds", "1")
    assert warm_up.returncode == 0, warm_up.stdout + warm_up.stderr
    options = ["--clients", "200", "--seconds", "18", "--pid", str(os.getpid())]
    with lag_of(server.loop) as lags:
        result = load_test(server.base_url, *options, "--json", str(file))
    assert result.returncode == 0, result.stdout + result.stderr
    figures = json.loads(file.read_text())
    assert figures["troubles"] == []
    assert figures["counts"].get("wrong_answers", 0) == 0
    for kind in ("finished", "disconnected", "slow_readers", "refused"):
        assert figures["counts"][kind] >= 20, figures["counts"]
    server.wait_idle()  # no block is lost: checks the pool
    assert len(lags) > 500
    assert percentile(lags, 0.99) < 0.05, f"p50 {percentile(lags, 0.5)}, max {max(lags)}"
    samples = figures["memory_mib"]
    assert len(samples) == 3  # thirds of the run
    assert samples[2] - samples[1] < 8, samples
