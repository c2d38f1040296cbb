"""Peak memory against what the engine says at start-up that it will use."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

PROGRAM = """
import json, re, sys
from pathlib import Path
from jaxllm import LLM, SamplingParams

llm = LLM(sys.argv[1], max_model_len=512, max_num_seqs=8, max_num_batched_tokens=64,
          compilation="on_demand", program_cache=False)
plan = llm._running.memory_plan
params = SamplingParams(temperature=1, max_tokens=8, ignore_eos=True)
llm.generate([[5 + i] * 40 for i in range(8)], params, use_tqdm=False)
assert llm.engine.scheduler.num_preemptions == 0
peak = re.findall(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[0]
print(json.dumps({"pool": plan.pool, "plan": plan.total, "peak": int(peak) << 10}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's VmHWM")
def test_peak_memory_is_what_was_planned(tiny_llama_folder: Path, tmp_path: Path) -> None:
    """With a pool that weighs more than the interpreter and its libraries: a copy of it, or one
    that the plan forgets, is seen."""
    save_model_with_large_pool(tmp_path, tiny_llama_folder)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    child = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(child.stdout)
    assert found["pool"] > 0.5 * found["plan"]
    assert 0.8 < found["peak"] / found["plan"] < 1.25


def save_model_with_large_pool(folder: Path, tokenizer_folder: Path) -> None:
    """10 layers x 2 x 16 heads x 128 floats: 160 KiB a token."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=10,
        num_attention_heads=16, num_key_value_heads=16, head_dim=128, max_position_embeddings=512,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_folder / name, folder / name)
