"""Steps of configs/ compile for TPUs that are not there, and take no more than before."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "check_configs.py"
BEFORE = {"bucket": "decode 8x8", "temporaries": 1000, "pool_is_copied": False}


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("check_configs", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["check_configs"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"temporaries": 1100}, None),
        ({"temporaries": 1101}, "needs 1,101 bytes of temporaries, not 1,000"),
        ({"pool_is_copied": True}, "copies the block pool"),
    ],
)
def test_what_is_worse_than_before(script: Any, changes: dict[str, Any], expected: Any) -> None:
    assert script.problem(BEFORE | changes, BEFORE) == expected


def test_every_problem_is_counted(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def measured(name: str) -> dict[str, Any]:
        if name == "broken":
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return BEFORE

    found, num_problems = script.check(["good", "new", "broken"], {"good": BEFORE}, measured)
    assert (sorted(found), num_problems) == (["good", "new"], 2)
    assert "broken: does not compile: RESOURCE_EXHAUSTED" in capsys.readouterr().out


def test_every_program_of_ci_has_figures(script: Any) -> None:
    figures = json.loads(script.FIGURES.read_text())
    assert set(script.IN_CI) <= set(figures) <= set(script.names())


@pytest.mark.long
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is made for Linux on x86-64 only"
)
def test_the_configurations_compile_as_before() -> None:
    child = subprocess.run(
        [sys.executable, str(SCRIPT)], cwd=ROOT, capture_output=True, text=True, timeout=550,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout + child.stderr[-3000:]
