"""jaxllm plan: bytes and bounds for chips that are not there."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jaxllm import planning
from jaxllm.cli import main
from jaxllm.cli.plan import as_json, as_text
from jaxllm.engine_options import EngineOptions
from jaxllm.loading.read_config import read_model_config
from jaxllm.planning import Bound, Plan, Planner
from jaxllm.runtime.chips import find_chip
from jaxllm.runtime.memory import StepMemory

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is made for Linux on x86-64 only"
)
MODELS = Path(__file__).parents[1] / "configs" / "models"
LLAMA = str(MODELS / "llama-3.1-8b.json")
LLAMA_PARAMETERS = 8_030_261_248  # 2 x 128256 x 4096, and 32 x 218,112,000, and 4096 (the norms)


class Uncompiled(Planner):
    """Instead of compiling, a step takes 1 GB of temporaries and sends as many bytes as it has
    tokens, and its products are 1e9 operations a token."""

    def _needs(self) -> planning.DeviceNeeds:
        plan = self._without_compiling()
        step = StepMemory(10**9, code=10**6)
        return planning.DeviceNeeds(plan.parameters, plan.state, plan.block, step)

    def _cost(self, bucket: Any) -> tuple[float, float]:
        return 1e9 * bucket.num_tokens, bucket.num_tokens


def plan_for(chip: str, num_chips: int, prompt_len: int = 1024, **options: Any) -> Plan:
    given = EngineOptions(dtype="bfloat16", max_num_seqs=64, **options)
    return Uncompiled(read_model_config(LLAMA), given, find_chip(chip), num_chips).plan(prompt_len)


def test_bytes_by_hand() -> None:
    plan = plan_for("v6e", 1, max_model_len=8192)
    assert plan.parameters == 2 * LLAMA_PARAMETERS
    assert plan.block == 32 * 32 * 2 * 8 * 128 * 2  # tokens x layers x (k, v) x heads x size x 2
    tables = 64 * 128256 * 8 + 64 * 4096 * 4 + 64 * 4
    assert plan.state == tables
    assert plan.temporaries == 10**9
    used = plan.parameters + tables + 10**9 + plan.programs + plan.reserve
    assert plan.pool == int(31.24 * 2**30) - used
    assert plan.fits
    for users in plan.users:
        assert users.in_memory == plan.pool // plan.block // (users.context // 32)
        assert users.at_once == min(64, users.in_memory)
    assert [users.context for users in plan.users] == [1024, 4096, 8192]


def test_a_pool_that_is_copied_is_said() -> None:
    plan = plan_for("v6e", 1, max_model_len=8192)
    for copied in (False, True):
        text = "\n".join(as_text("m", replace(plan, pool_is_copied=copied)))
        assert ("the compiled steps copy the block pool" in text) == copied
        assert as_json("m", replace(plan, pool_is_copied=copied))["pool_is_copied"] == copied


def test_eight_chips_share_weights_and_pool() -> None:
    one, eight = plan_for("v7x", 1, max_model_len=8192), plan_for("v7x", 4, max_model_len=8192)
    norms = (2 * 32 + 1) * 4096 * 2  # whole on each device
    assert (eight.parameters - norms) * 8 == 2 * LLAMA_PARAMETERS - norms
    assert one.block == 4 * eight.block  # of 2 devices and of 8
    assert one.state == eight.state


def test_bounds_by_hand() -> None:
    plan = plan_for("v6e", 1, max_model_len=8192)
    chip = find_chip("v6e")
    cached = 64 * 1024 * plan.block // 32
    read = plan.parameters - 128256 * 4096 * 2 + cached  # an embedding is looked up, not read
    token = plan.users[0].token
    assert token is not None
    assert token.memory == pytest.approx(read / chip.memory_bandwidth)
    attention = 4 * 32 * 32 * 128 * 64 * 1024
    assert token.compute == pytest.approx((64e9 + attention) / chip.flops)
    assert token.collectives == pytest.approx(64 / chip.link_bandwidth)
    assert (token.seconds, token.binds) == (token.memory, "memory")
    first = plan.first_token
    assert first is not None
    causal = 4 * 32 * 32 * 128 * 1024 * 1024 // 2
    assert first.compute == pytest.approx((1024e9 + causal) / chip.flops)
    assert plan.one_user is not None
    assert plan.one_user.seconds < token.seconds


def test_a_prompt_beyond_the_budget_takes_several_steps() -> None:
    short = plan_for("v6e", 1, 2048, max_model_len=8192).first_token
    long = plan_for("v6e", 1, 8192, max_model_len=8192).first_token
    assert short is not None
    assert long is not None
    assert long.compute > 4 * short.compute


def test_the_longest_of_the_three_binds() -> None:
    for bound, binds in (
        (Bound(3, 2, 1), "memory"), (Bound(1, 3, 2), "compute"), (Bound(1, 2, 3), "collectives"),
    ):  # fmt: skip
        assert (bound.seconds, bound.binds) == (3, binds)


def test_what_would_fit_is_said_and_does() -> None:
    """Llama in bfloat16 with its whole context on one v5e of 16 GB."""
    plan = plan_for("v5e", 1)
    assert not plan.fits
    assert plan.users == ()
    (chips,) = (text for text in plan.advice if text.startswith("--chips"))
    number = int(chips.split()[1])
    assert plan_for("v5e", number).fits
    assert not plan_for("v5e", number // 2).fits


def test_types_of_8_bits_that_would_fit_are_said_and_do() -> None:
    """15 GiB of weights and 1 GiB for a sequence on 15.75 GiB: half of the weights are enough, half
    of the pool is not. On v6e the whole context is too long, but in 8 bits."""
    plan = plan_for("v5e", 1, max_model_len=8192)
    assert not plan.fits
    assert "--quantization int8" in plan.advice
    assert not any("fp8" in text for text in plan.advice)
    int8 = plan_for("v5e", 1, max_model_len=8192, quantization="int8")
    assert int8.fits
    assert int8.block == plan.block
    assert "weights int8, KV cache bfloat16" in as_text("m", int8)
    plan = plan_for("v6e", 1)
    assert "--kv-cache-dtype fp8" in plan.advice
    fp8 = plan_for("v6e", 1, kv_cache_dtype="fp8")
    assert fp8.fits
    assert 2 * fp8.block == plan.block
    assert as_json("m", fp8)["kv_cache_dtype"] == "float8_e4m3fn"


def test_a_shorter_context_that_would_fit_is_said_and_does() -> None:
    plan = plan_for("v6e", 1)
    assert not plan.fits
    (shorter,) = (text for text in plan.advice if text.startswith("--max-model-len"))
    longest = int(shorter.split()[1])
    assert longest > 100_000
    assert plan_for("v6e", 1, max_model_len=longest).fits


def test_what_does_not_fit_is_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--chip", "v5e", "--json", "--max-num-seqs", "8"]
    assert main(["plan", str(MODELS / "qwen3-32b.json"), *flags]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["bytes_per_device"]["parameters"] > 65 * 10**9
    assert found["first_token"] is None
    assert "--chips 8" in found["advice"]
    assert main(["plan", str(MODELS / "qwen3-32b.json"), *flags[:2]]) == 1
    assert "fits: no" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([LLAMA, "--chip", "h100"], "chip must be one of"),
        ([LLAMA, "--chip", "v5e", "--chips", "3"], "chips must be one of 1, 2, 4"),
        ([LLAMA, "--chip", "v5e", "--prompt-len", "0"], "--prompt-len must be at least 1"),
        (
            [LLAMA, "--chip", "v5e", "--chips", "4", "--tensor-parallel-size", "2"],
            "contradict each other",
        ),
        ([LLAMA, "--chip", "v5e", "--chips", "64"], "64 devices cannot share the model"),
        (["nowhere.json", "--chip", "v5e"], "no model 'nowhere.json'"),
        ([LLAMA, "--chip", "v5e", "--speculative", "draft:x"], "does not count a draft model"),
        ([LLAMA], "--chip"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments]) in (1, 2)
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_a_real_plan_of_a_tiny_model(
    tiny_llama_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiled by libtpu, for two chips, so that there is something to send."""
    flags = ["--max-num-seqs", "8", "--max-num-batched-tokens", "32", "--dtype", "bfloat16"]
    command = ["plan", str(tiny_llama_folder), "--chip", "v6e", "--chips", "2", "--json", *flags]
    assert main(command) == 0
    output = capsys.readouterr()
    assert "compiling mixed 32x8 for 2 x v6e" in output.err
    plan = json.loads(output.out)
    assert plan["temporaries_from"] == "compiler"
    token = plan["users"][0]["token"]
    # two all-reduces of [8, 64] float32 or bfloat16 in each of 2 layers, and the logits
    assert token["collectives"] * find_chip("v6e").link_bandwidth >= 2 * 2 * 8 * 64 * 2
    assert token["memory"] > 0
    assert token["compute"] > 0
