"""A model on several devices: the same tokens as on one. The devices are parts of the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxllm import LLM

PROGRAM = """
import json, sys
from jaxllm import LLM, SamplingParams, draft_setup

draft_setup.draft_cost = lambda *_: 0.02  # in steps
folder, cache, dtype, more, *sizes = sys.argv[1:]
common = dict(temperature=0, max_tokens=12, ignore_eos=True)
params = [
    SamplingParams(**common),
    SamplingParams(**common, logprobs=3, prompt_logprobs=2),
    SamplingParams(**common, repetition_penalty=1.5, logit_bias={7: 2.0}),
    SamplingParams(**common | {"temperature": 1.0}, seed=5, top_k=9),
    SamplingParams(**common | {"temperature": 0.7}, seed=6, top_p=0.8),
]
prompts = [[5 + i] * (3 + 17 * i) for i in range(len(params))]
for size in map(int, sizes):
    options = dict(max_model_len=128, max_num_seqs=8, max_num_batched_tokens=64, cache_dir=cache,
                   dtype=dtype, compilation="on_demand", tensor_parallel_size=size,
                   **json.loads(more))
    with LLM(folder, **options) as llm:
        draft = llm._running.draft_runner
        for bucket in draft.programs.order[:2] if draft else ():
            draft._compiler.get(bucket)  # without them no drafts are made
        outputs = llm.generate(prompts, params, use_tqdm=False)
        runner = llm._running.runner
        tokens = [o.outputs[0].token_ids for o in outputs]
        chosen = {token: lp.logprob for row in outputs[1].outputs[0].logprobs
                  for token, lp in row.items()}
        pool = runner._state.kv_pool
        shares = [list(shard.data.shape) for shard in pool.addressable_shards]
        figures = dict(tokens=tokens, logprobs=chosen, pool=shares,
                       plan=llm._running.memory_plan.parameters,
                       accepted=sum(o.metrics.num_accepted_tokens for o in outputs),
                       loaded=runner.figures().num_loaded)
        print(json.dumps(figures))
"""


def run(folder: Path, cache: Path, dtype: str, *sizes: int, **options: Any) -> list[dict[str, Any]]:
    """What engines of so many devices answer, in a process that has four."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    child = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), str(cache), dtype, json.dumps(options),
         *map(str, sizes)],
        env=os.environ | {"XLA_FLAGS": flags}, capture_output=True, text=True, timeout=580,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-3000:]
    return [json.loads(line) for line in child.stdout.splitlines()]


@pytest.mark.long
def test_the_tokens_are_those_of_one_device(tiny_llama_folder: Path, tmp_path: Path) -> None:
    one, two, four = run(tiny_llama_folder, tmp_path, "float32", 1, 2, 4)
    for several in (two, four):
        assert several["tokens"] == one["tokens"]
        assert several["logprobs"] == pytest.approx(one["logprobs"], abs=1e-3)
    # 2 KV heads, so 4 in the pool: on four devices two of them share each
    assert [pool["pool"][0][3] for pool in (one, two, four)] == [4, 2, 2]
    assert [len(pool["pool"]) for pool in (one, two, four)] == [1, 2, 4]
    assert two["plan"] < 0.6 * one["plan"]
    assert four["plan"] < 0.4 * one["plan"]


@pytest.mark.long
def test_weights_and_cache_of_8_bits_are_divided(tiny_llama_folder: Path, tmp_path: Path) -> None:
    small = {"quantization": "int8", "kv_cache_dtype": "int8"}
    one, two, four = run(tiny_llama_folder, tmp_path, "float32", 1, 2, 4, **small)
    for several in (two, four):
        assert several["tokens"] == one["tokens"]
        assert several["logprobs"] == pytest.approx(one["logprobs"], abs=1e-3)
    assert [len(pool["pool"]) for pool in (one, two, four)] == [1, 2, 4]
    assert two["plan"] < 0.6 * one["plan"]


@pytest.mark.long
def test_programs_for_several_devices_are_loaded_again(
    tiny_llama_folder: Path, tmp_path: Path
) -> None:
    first, second = run(tiny_llama_folder, tmp_path, "bfloat16", 2, 2)
    assert first["loaded"] == 0
    assert second["loaded"] > 0
    assert second["tokens"] == first["tokens"]


@pytest.mark.long
def test_a_draft_model_shares_the_devices(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """The model itself, as if it were cheap; its drafts are right."""
    [one] = run(tiny_llama_folder, tmp_path, "float32", 1)
    draft = {"speculative": f"draft:{tiny_llama_folder}"}
    [two] = run(tiny_llama_folder, tmp_path, "float32", 2, **draft)
    assert two["tokens"] == one["tokens"]
    assert one["accepted"] == 0 < 10 < two["accepted"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 512}, "tensor_parallel_size 512 is more than the . devices"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be a positive integer, got 0"),
    ],
)
def test_a_number_of_devices_that_cannot_be(
    tiny_llama_folder: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        LLM(str(tiny_llama_folder), **options)
