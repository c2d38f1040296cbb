"""Commands of jaxllm in processes of their own."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

PROGRAM = "from jaxllm.cli import main; main()"
POLL_SECONDS = 0.01


class ProcessError(RuntimeError):
    """A process ended that should not have."""


def command(*words: str) -> list[str]:
    """What runs `jaxllm WORDS`."""
    return [sys.executable, "-c", PROGRAM, *words]


def free_port() -> int:
    """One that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


@contextlib.contextmanager
def server(model: str, *flags: str) -> Iterator[str]:
    """`jaxllm serve`, from when /health says that it is ready; its address. Raises ProcessError."""
    port = free_port()
    quiet = subprocess.DEVNULL
    words = command("serve", model, "--port", str(port), *flags)
    with subprocess.Popen(words, stdout=quiet, stderr=quiet) as process:
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}", process)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{url}/health"):
                return
        except OSError:  # not listening yet, or 503
            if process.poll() is not None:
                raise ProcessError(f"jaxllm serve ended with status {process.returncode}") from None
            time.sleep(POLL_SECONDS)


def seconds_to_first_token(model: str, flags: Sequence[str]) -> float:
    """From the start of `jaxllm generate` until its stream has written something; the process may
    take longer to end. Raises ProcessError."""
    prompt = ["--prompt", "The capital of France is", "--max-tokens", "1", "--temperature", "0"]
    words = command("generate", model, *prompt, "--stream", *flags)
    started = time.perf_counter()
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    if process.returncode or not first:
        raise ProcessError(f"jaxllm generate ended with status {process.returncode}")
    return seconds


def import_seconds() -> float:
    """`import jaxllm` in a new process, by its own clock."""
    program = "import time; t = time.perf_counter(); import jaxllm; print(time.perf_counter() - t)"
    words = [sys.executable, "-c", program]
    return float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)


@contextlib.contextmanager
def cache_with_models(cache_dir: Path | None = None) -> Iterator[str]:
    """A cache folder with the fetched models of another one (None: the user's) and no programs."""
    from jaxllm.loading.hub import cache_folder

    models = (cache_dir or cache_folder()) / "models"
    with tempfile.TemporaryDirectory(prefix="jaxllm-bench-", ignore_cleanup_errors=True) as folder:
        if models.is_dir():
            (Path(folder) / "models").symlink_to(models.absolute())
        yield folder
