"""bench latency, throughput and startup on the tiny model; and that flags and options agree."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from jaxllm.bench import startup
from jaxllm.bench.client import ENDPOINTS
from jaxllm.bench.offline import latency_figures
from jaxllm.bench.startup import engine_flags
from jaxllm.bench.workloads import DATASETS, WorkloadOptions
from jaxllm.cli import bench_flags

Cli = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def tiny_flags(tiny_llm: dict[str, Any]) -> list[str]:
    return engine_flags(tiny_llm)


@pytest.fixture
def bench(
    cli: Cli, tiny_llama_folder: Path, tiny_flags: list[str], tmp_path: Path
) -> Callable[..., tuple[dict[str, Any], str]]:
    """The saved result and what was printed."""

    def run(command: str, *flags: object) -> tuple[dict[str, Any], str]:
        file = tmp_path / "result.json"
        code, out, err = cli(
            "bench", command, tiny_llama_folder, *tiny_flags, "--save-result", file, *flags
        )
        assert (code, err) == (0, ""), err
        return json.loads(file.read_text()), out

    return run


def check_shares(result: dict[str, Any], out: str) -> None:
    assert 0 < result["padding_share"] < 1
    assert 0 < result["idle_share"] < 1
    assert "Padding share of computed tokens" in out
    assert "Idle share of time" in out
    assert "not available" not in out


def test_latency(bench: Callable[..., tuple[dict[str, Any], str]], tmp_path: Path) -> None:
    result, out = bench(
        "latency", "--input-len", 10, "--output-len", 6, "--batch-size", 3, "--num-iters", 4,
        "--num-iters-warmup", 1, "--plot", tmp_path,
    )  # fmt: skip
    assert len(result["latencies"]) == 4
    assert result["avg_latency"] == pytest.approx(sum(result["latencies"]) / 4)
    assert result["percentiles"].keys() == {"10", "25", "50", "75", "90", "99"}
    assert (tmp_path / "latency.png").stat().st_size > 1000
    assert "p99_latency" in out
    check_shares(result, out)


def test_latency_figures_by_hand() -> None:
    figures = latency_figures([1.0, 2.0, 3.0])
    assert (figures["avg_latency"], figures["percentiles"]["50"]) == (2, 2)
    assert figures["percentiles"]["75"] == 2.5
    assert figures["std_latency"] == pytest.approx((2 / 3) ** 0.5)


def test_throughput_of_random_prompts(bench: Callable[..., tuple[dict[str, Any], str]]) -> None:
    result, out = bench("throughput", "--num-prompts", 12, "--random-input-len", 9,
                        "--random-output-len", 5)  # fmt: skip
    assert (result["num_requests"], result["total_num_tokens"]) == (12, 12 * 14)
    assert result["total_output_tokens"] == 60
    elapsed = result["elapsed_time"]
    assert result["requests_per_second"] == pytest.approx(12 / elapsed)
    assert result["tokens_per_second"] == pytest.approx(168 / elapsed)
    assert result["output_tokens_per_second"] == pytest.approx(60 / elapsed)
    check_shares(result, out)


def test_throughput_of_a_file(
    bench: Callable[..., tuple[dict[str, Any], str]], tmp_path: Path
) -> None:
    file = tmp_path / "chats.json"
    messages = [{"value": "The quick brown fox jumps"}, {"value": "Once upon a time there was"}]
    file.write_text(json.dumps([{"conversations": messages}]))
    result, _ = bench("throughput", "--num-prompts", 3, "--dataset-name", "sharegpt",
                      "--dataset-path", file, "--sharegpt-output-len", 4)  # fmt: skip
    assert (result["num_requests"], result["total_output_tokens"]) == (3, 12)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("latency m --batch-size 0", "--batch-size must be at least 1, got 0"),
        ("latency", "which model?"),
        ("throughput m --dataset-name multi-turn", "invalid choice: 'multi-turn'"),
        ("throughput m --num-prompts 0", "--num-prompts must be at least 1, got 0"),
        ("startup m --runs 0", "--runs must be at least 1, got 0"),
        ("", "the following arguments are required: BENCHMARK"),
        ("dance", "invalid choice: 'dance'"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(cli: Cli, words: str, message: str) -> None:
    code, out, err = cli("bench", *words.split())
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_an_unknown_model_is_one_line(cli: Cli) -> None:
    for command in ("latency", "throughput", "startup"):
        code, out, err = cli("bench", command, "nosuch")
        assert (code, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("jaxllm: error: no model 'nosuch'")


def test_the_flags_are_those_of_the_workloads() -> None:
    """They are written down twice so that the command line stays light."""
    options = {field.name: field.default for field in fields(WorkloadOptions)}
    assert set(bench_flags.WORKLOAD) == set(options)
    assert {name: default for name, (default, _) in bench_flags.LENGTHS.items()} == {
        name: options[name] for name in bench_flags.LENGTHS
    }
    assert (bench_flags.DATASETS, bench_flags.ENDPOINTS) == (DATASETS, ENDPOINTS)


@pytest.mark.parametrize("command", ["serve", "sweep", "latency"])
def test_help_imports_nothing_heavy(command: str) -> None:
    program = f"""
import sys
from jaxllm.cli import main
main(["bench", "{command}", "--help"])
heavy = {{"jax", "numpy", "aiohttp", "matplotlib", "tqdm"}} & set(sys.modules)
print("\\nheavy:", *heavy)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "heavy:"


def test_the_script_is_the_command() -> None:
    script = ROOT / "scripts" / "bench.py"
    words = [sys.executable, str(script), "--help"]
    result = subprocess.run(words, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("usage: jaxllm bench")


# ---- startup


def test_engine_options_become_the_flags_they_came_from() -> None:
    options = {"max_model_len": 64, "seed": 3, "program_cache": False, "forbid_compile": True,
               "max_num_waiting": None}  # fmt: skip
    assert engine_flags(options) == [
        "--max-model-len", "64", "--engine-seed", "3", "--no-program-cache", "--forbid-compile",
        "--max-num-waiting", "none",
    ]  # fmt: skip


def test_startup_figures_are_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    imports = iter([0.3, 0.1, 0.2])
    tokens = iter([6.0, 3.0, 2.0, 9.0, 3.0, 1.0, 7.0, 3.0, 3.0])  # empty, not counted, filled
    monkeypatch.setattr("jaxllm.loading.hub.find_model", lambda *_, **__: None)
    monkeypatch.setattr(startup.processes, "import_seconds", lambda: next(imports))
    monkeypatch.setattr(startup.processes, "seconds_to_first_token", lambda *_: next(tokens))
    monkeypatch.setattr(startup, "first_answers", lambda *_: {"padding_share": 0.5})
    assert startup.bench_startup("m", 3, {}) == {
        "import_seconds": 0.2,
        "generate_first_token_seconds_empty_cache": 7.0,
        "generate_first_token_seconds_filled_cache": 2.0,
        "padding_share": 0.5,
        "runs": {
            "import_seconds": [0.3, 0.1, 0.2],
            "generate_first_token_seconds_empty_cache": [6.0, 9.0, 7.0],
            "generate_first_token_seconds_filled_cache": [2.0, 1.0, 3.0],
        },
    }


@pytest.mark.long
def test_startup_of_processes(cli: Cli, tiny_llama_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    code, out, err = cli(
        "bench", "startup", tiny_llama_folder, "--runs", 1, "--max-model-len", 64,
        "--max-num-seqs", 2, "--max-num-batched-tokens", 32, "--save-result", file,
    )  # fmt: skip
    assert (code, err) == (0, ""), err
    result = json.loads(file.read_text())
    for cache in ("empty_cache", "filled_cache"):
        assert result[f"generate_first_token_seconds_{cache}"] > result["import_seconds"] > 0
        ready = result[f"serve_ready_seconds_{cache}"]
        assert 0 < ready < result[f"serve_first_answer_seconds_{cache}"]
    assert "Idle share of time" in out
    assert 0 < result["padding_share"] < 1


def test_a_process_that_ends_early_is_one_line(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    code, out, err = cli("bench", "startup", tmp_path, "--runs", 1)
    assert (code, out) == (1, "")
    assert "jaxllm generate ended with status 1" in err.splitlines()[-1]
