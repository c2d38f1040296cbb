"""jaxllm as one side of a comparison of engines: runs a driver's workload and prints its RESULT.

    BENCH_DIR=folder-with-workload.py BENCH_MODELS=... python scripts/run_jaxllm.py

The driver is a module `workload` with drive(engine, version, dtype, load, gen_one, gen_many), which
runners of other engines use too. DTYPE: bfloat16 (default) or float32. See compare_engines.py.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import Any

import jaxllm

DTYPE = os.environ.get("DTYPE", "bfloat16")


class Runner:
    """What the driver calls."""

    llm: jaxllm.LLM

    def __init__(self, model: str) -> None:
        self._model = model

    def load(self) -> None:
        """Until requests are taken; other programs may still be compiled."""
        self.llm = jaxllm.LLM(
            self._model,
            dtype=DTYPE,
            max_model_len=1024,
            max_num_seqs=64,
            enable_prefix_caching=False,
        )

    def one(self, prompt: list[int], num_tokens: int) -> tuple[float, float, list[int]]:
        """Seconds to the first token, seconds from there to the last, and the tokens."""
        started = time.time()
        first, ids = None, []
        for piece in self.llm.stream({"prompt_token_ids": prompt}, params(num_tokens)):
            first = first or time.time()
            ids += piece.token_ids
        assert first is not None
        return first - started, time.time() - first, ids

    def many(self, requests: list[dict[str, Any]]) -> list[list[int]]:
        """The tokens of each."""
        outputs = self.llm.generate(
            [{"prompt_token_ids": r["prompt"]} for r in requests],
            [params(r["n_out"]) for r in requests],
            use_tqdm=False,
        )
        return [list(output.outputs[0].token_ids) for output in outputs]


def params(num_tokens: int) -> jaxllm.SamplingParams:
    """Greedy, of exactly that length."""
    return jaxllm.SamplingParams(
        temperature=0.0, max_tokens=num_tokens, ignore_eos=True, detokenize=False
    )


def main() -> None:
    """Hands the runner to the driver."""
    sys.path.insert(0, os.environ.get("BENCH_DIR", "."))
    workload = importlib.import_module("workload")
    runner = Runner(workload.MODEL_HF)
    workload.drive(
        "jaxllm", jaxllm.__version__, DTYPE, runner.load, runner.one, runner.many,
        close=lambda: runner.llm.close(),
    )  # fmt: skip


if __name__ == "__main__":
    main()
