"""The command line in this process, as in test_cli.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from jaxllm.cli import main

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Runs a command: its exit code, stdout and stderr."""

    def run(*argv: object) -> tuple[int, str, str]:
        code = main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return code, out, err

    monkeypatch.delenv("JAXLLM_CACHE", raising=False)
    return run
