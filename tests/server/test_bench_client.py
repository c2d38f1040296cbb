"""jaxllm bench against our own server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from server_on_a_thread import RunningServer

from jaxllm.cli import main


@pytest.mark.parametrize("endpoint", ["/v1/completions", "/v1/chat/completions"])
def test_bench_serve_on_our_server(server: RunningServer, tmp_path: Path, endpoint: str) -> None:
    """Its figures are what the engine counted itself."""
    server.wait_idle()
    before = server.engine.running.engine.stats()
    file = tmp_path / "result.json"
    flags = (
        f"--base-url {server.base_url} --endpoint {endpoint} --num-prompts 12 --ignore-eos "
        f"--random-input-len 20 --random-output-len 10 --max-concurrency 4 --save-result {file}"
    )
    assert main(["bench", "serve", *flags.split()]) == 0
    server.wait_idle()
    after = server.engine.running.engine.stats()
    result: dict[str, Any] = json.loads(file.read_text())
    assert (result["model_id"], result["completed"], result["failed"]) == ("tiny", 12, 0)
    assert result["output_lens"] == [10] * 12
    counted = after.num_prompt_tokens - before.num_prompt_tokens
    of_the_test_request = counted - result["total_input_tokens"]
    lens = result["input_lens"]
    assert 0.5 * min(lens) <= of_the_test_request <= 2 * max(lens)
    generated = after.num_generation_tokens - before.num_generation_tokens
    assert result["total_output_tokens"] + 10 == generated
    if "chat" not in endpoint:
        assert lens == [20] * 12  # token ids of its /tokenize
        assert of_the_test_request == 20
    assert 0 < result["padding_share"] < 1
    assert 0 < result["idle_share"] < 1
    assert max(result["timeline"]["kv_cache_usage_perc"]) <= 1
    assert result["mean_ttft_ms"] < result["mean_e2el_ms"]


def test_multi_turn_on_our_server(server: RunningServer, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    flags = (
        f"--base-url {server.base_url} --endpoint /v1/chat/completions --num-prompts 2 "
        f"--dataset-name multi-turn --multi-turn-num-turns 3 --multi-turn-input-len 4 "
        f"--multi-turn-output-len 6 --save-result {file}"
    )
    assert main(["bench", "serve", *flags.split()]) == 0
    result = json.loads(file.read_text())
    assert (result["completed"], result["errors"]) == (6, [""] * 6)
    first, second = result["input_lens"][:3], result["input_lens"][3:]
    assert first == sorted(set(first))  # each turn's prompt is longer
    assert second == sorted(set(second))
