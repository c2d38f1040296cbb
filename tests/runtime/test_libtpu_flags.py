"""What libtpu is told."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from jaxllm.runtime.libtpu_flags import FLAG, VARIABLE, set_flags


def install(folder: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for libtpu; None: without its library."""
    if content is not None:
        (folder / "libtpu.so").write_bytes(content)
    spec = SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: spec)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, f"--{FLAG}=false"),
        ("--other=1", f"--other=1 --{FLAG}=false"),
        (f"--{FLAG}=true", f"--{FLAG}=true"),
    ],
)
def test_the_flag_is_added_once_and_the_users_stays(
    given: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, given or "")
    install(tmp_path, b"..." + FLAG.encode() + b"...", monkeypatch)
    for _ in range(2):
        set_flags()
        assert os.environ[VARIABLE] == expected


@pytest.mark.parametrize("content", [b"another libtpu", None])
def test_a_libtpu_that_would_not_know_it_is_told_nothing(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "--other=1")
    install(tmp_path, content, monkeypatch)
    set_flags()
    assert os.environ[VARIABLE] == "--other=1"


def test_without_libtpu_nothing_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    set_flags()
    assert VARIABLE not in os.environ
