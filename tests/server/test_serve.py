"""`jaxllm serve` as a process: it starts, drains, and says why it cannot."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from jaxllm.cli import main
from jaxllm.cli.flags import SERVER
from jaxllm.server.options import ServerOptions

CHAT: Any = {"messages": [{"role": "user", "content": "Hello"}], "temperature": 0}
URL = "/v1/chat/completions"


class Process:
    """A server in a process of its own; what it writes is read as it comes."""

    def __init__(self, *argv: object, before: str = "") -> None:
        """before: a program that runs first, in the same process."""
        program = f"{before}\nfrom jaxllm.cli import main; main()"
        command = [sys.executable, "-c", program, "serve", *map(str, argv)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.log = ""
        self._lines = threading.Condition()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._lines:
                self.log += line
                self._lines.notify_all()

    def wait_for(self, pattern: str, seconds: float = 180) -> re.Match[str]:
        """A text in the log."""
        with self._lines:
            self._lines.wait_for(lambda: re.search(pattern, self.log), seconds)
        match = re.search(pattern, self.log)
        assert match, self.log
        return match

    @property
    def base_url(self) -> str:
        return self.wait_for(r"https?://127\.0\.0\.1:\d+").group()

    def end(self, number: int) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def serve(tiny_llama_folder: Path, tiny_llm: dict[str, Any]) -> Iterator[Callable[..., Process]]:
    processes = []
    flags: list[object] = ["--port", 0]
    for name, value in tiny_llm.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else [flag, value]

    def start(*more: object, before: str = "") -> Process:
        processes.append(Process(tiny_llama_folder, *flags, *more, before=before))
        return processes[-1]

    yield start
    for one in processes:
        one.process.kill()
        one.process.wait()


def test_it_serves_and_a_signal_lets_running_requests_finish(
    serve: Callable[..., Process],
) -> None:
    process = serve("--served-model-name", "a", "--served-model-name", "b", "--api-key", "k")
    process.wait_for("ready")
    with httpx.Client(base_url=process.base_url, timeout=60) as client:
        client.headers["Authorization"] = "Bearer k"
        names = [model["id"] for model in client.get("/v1/models").json()["data"]]
        assert names == ["a", "b"]
        body = {**CHAT, "max_tokens": 200, "ignore_eos": True, "stream": True}
        with client.stream("POST", URL, json=body) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.process.send_signal(signal.SIGTERM)
            rest = list(lines)
        assert rest[-2] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-4]
    assert process.process.wait(30) == 0
    assert "k" not in re.findall(r"\bk\b", process.log)


def test_what_exists_at_the_start_is_spared_by_the_garbage_collector(
    serve: Callable[..., Process],
) -> None:
    say = "print('frozen', gc.get_freeze_count() > 10_000, file=sys.stderr)"
    process = serve(
        before=f"import gc, sys; freeze = gc.freeze\ngc.freeze = lambda: (freeze(), {say})"
    )
    process.wait_for("frozen True")


def test_requests_that_take_too_long_are_aborted_at_the_end(
    serve: Callable[..., Process],
) -> None:
    process = serve("--drain-seconds", 0, "--served-model-name", "a")
    process.wait_for("ready")
    body = {**CHAT, "n": 8, "temperature": 1.0, "max_tokens": 240, "ignore_eos": True}
    reasons: list[str] = []

    def ask() -> None:
        reply = httpx.post(process.base_url + URL, json={**body, "seed": 1}, timeout=60)
        reasons.extend(choice["finish_reason"] for choice in reply.json()["choices"])

    thread = threading.Thread(target=ask)
    thread.start()
    while thread.is_alive() and not is_busy(process):
        time.sleep(0.01)
    assert process.end(signal.SIGINT) == 0
    thread.join(10)
    assert reasons == ["abort"] * 8


def is_busy(process: Process) -> bool:
    return httpx.get(f"{process.base_url}/load").json()["live_requests"] > 0


def wait_until_busy(process: Process) -> None:
    deadline = time.monotonic() + 30
    while not is_busy(process):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_second_signal_does_not_wait(serve: Callable[..., Process]) -> None:
    process = serve("--drain-seconds", 1000)
    process.wait_for("ready")
    body = {**CHAT, "n": 8, "temperature": 1.0, "max_tokens": 240, "ignore_eos": True}

    def ask() -> None:
        with contextlib.suppress(httpx.TransportError):
            httpx.post(process.base_url + URL, json=body, timeout=60)

    threading.Thread(target=ask, daemon=True).start()
    wait_until_busy(process)
    process.process.send_signal(signal.SIGTERM)
    process.wait_for("shutting down")
    assert process.end(signal.SIGTERM) == 128 + signal.SIGTERM


HANGING = """
import time
from jaxllm.runtime.model_runner import ModelRunner
ModelRunner.execute = lambda self, batch: time.sleep(1000)
"""


def test_a_signal_ends_it_although_a_step_hangs(serve: Callable[..., Process]) -> None:
    process = serve("--drain-seconds", 0, "--hang-seconds", 0.2, before=HANGING)
    process.wait_for("ready")

    def ask() -> None:
        with contextlib.suppress(httpx.TransportError):
            httpx.post(process.base_url + URL, json={**CHAT, "max_tokens": 2}, timeout=60)

    threading.Thread(target=ask, daemon=True).start()
    deadline = time.monotonic() + 30
    while httpx.get(f"{process.base_url}/health").json()["status"] != "hung":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert process.end(signal.SIGTERM) == 1
    assert "a step hangs" in process.log


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls(serve: Callable[..., Process], tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1"
    names = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(
        [*make.split(), *names, "-keyout", key, "-out", cert], check=True, capture_output=True
    )
    process = serve("--tls-cert", cert, "--tls-key", key)
    url = process.base_url
    assert url.startswith("https://")
    trusting = ssl.create_default_context(cafile=str(cert))
    assert httpx.get(f"{url}/v1/models", verify=trusting).status_code == 200


def test_a_signal_while_the_model_loads_ends_it(serve: Callable[..., Process]) -> None:
    process = serve()
    assert httpx.get(f"{process.base_url}/health").status_code == 503
    assert process.end(signal.SIGTERM) == 0


def test_a_model_that_cannot_be_loaded_ends_it(tmp_path: Path) -> None:
    process = Process(tmp_path, "--port", 0)
    assert process.process.wait(60) == 1
    process.wait_for("jaxllm: error: ")
    assert "Traceback" not in process.log


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "x"], "port"),
        (["--port", "99999"], "port"),
        (["--tls-cert", "a.pem"], "tls_key"),
        (["--tls-cert", "a.pem", "--tls-key", "b.pem"], "tls_cert"),
        (["--api-key-file", "no-such-file"], "api_key_file"),
        (["--tool-call-parser", "nobody"], "hermes"),
        (["--reasoning-parser", "nobody"], "qwen3"),
        (["--metrics-prefix", "a b"], "metrics_prefix"),
        (["--log-format", "xml"], "log_format"),
        (["--temperature", "1"], "temperature"),
    ],
)
def test_wrong_flags_are_told_before_a_model_is_loaded(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", "no-such-model", *flags]) == 2
    error = capsys.readouterr().err
    assert says in error.splitlines()[-1]
    assert "no-such-model" not in error


def test_sampling_of_a_configuration_may_only_be_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.toml").write_text("[sampling]\nn = 2\ntemperature = 1.0\n")
    assert main(["serve", "no-such-model", "--config", str(tmp_path / "c.toml")]) == 2
    assert "n under [sampling]" in capsys.readouterr().err


def test_every_option_has_a_flag_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert set(SERVER.help) == set(ServerOptions.__dataclass_fields__)
    assert main(["serve", "--help"]) == 0
    assert "--max-queued-requests" in capsys.readouterr().out
