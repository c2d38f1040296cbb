"""The engine over the TPU's kernel and pool, in the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jaxllm import LLM, SamplingParams

PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22], [40, 41, 42]]


@pytest.mark.long
def test_the_kernel_gives_the_tokens_of_the_xla_path(
    tiny_llama_folder: Path, tiny_llm: dict[str, Any]
) -> None:
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    options = {
        **tiny_llm, "forbid_compile": False, "compilation": "on_demand", "max_num_seqs": 2,
        "max_num_batched_tokens": 32, "max_model_len": 64,
    }  # fmt: skip
    tokens = {}
    for attention in ("xla", "tpu_interpret"):
        # a program that calls back into Python cannot be stored
        own = {**options, "attention": attention, "program_cache": attention == "xla"}
        with LLM(tiny_llama_folder, **own) as llm:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
            tokens[attention] = [output.outputs[0].token_ids for output in outputs]
    assert tokens["tpu_interpret"] == tokens["xla"]
