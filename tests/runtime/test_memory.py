"""The arithmetic of memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest

from jaxllm.config import ModelConfig, RopeConfig
from jaxllm.runtime import memory
from jaxllm.runtime.kv_cache import abstract_pool, block_bytes
from jaxllm.runtime.memory import (
    GIB,
    MemoryPlan,
    StepMemory,
    device_memory,
    host_memory,
    host_pool_budget,
    left_for_pool,
    num_pool_blocks,
    reserve,
)

CONFIG = ModelConfig("LlamaForCausalLM", 100, 16, 32, 3, 4, 2, 8, 64, 1e-5, RopeConfig())


class Device(SimpleNamespace):
    """As much of a jax.Device as is asked."""

    def memory_stats(self) -> dict[str, int] | None:
        return self.stats


def device(platform: str, stats: dict[str, int] | None) -> Any:
    return Device(platform=platform, stats=stats)


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        (1000, 10),  # ten blocks of 100 bytes
        (1099, 10),
        (10**9, 2 * 7),  # two sequences of 100 tokens need 7 blocks of 16 tokens each
        (700, 7),
    ],
)
def test_blocks_of_a_budget(budget: int, expected: int) -> None:
    assert num_pool_blocks(budget, 100, 16, 2, 100) == expected


@pytest.mark.parametrize(("budget", "tokens"), [(699, 6 * 16), (50, 0), (-5000, 0)])
def test_a_pool_too_small_for_one_sequence(budget: int, tokens: int) -> None:
    expected = f"holds {tokens} tokens, but one sequence of max_model_len 100 needs .* GiB; lower"
    with pytest.raises(ValueError, match=expected) as caught:
        num_pool_blocks(budget, 100, 16, 2, 100)
    assert "-" not in str(caught.value)  # no negative sizes


def test_error_of_a_small_pool_says_how_many_gib() -> None:
    with pytest.raises(ValueError, match=r"gets 1\.50 GiB.*needs 2\.00 GiB.*kv_cache_memory_bytes"):
        num_pool_blocks(int(1.5 * GIB), GIB // 4, 16, 4, 128)


def test_what_is_left_for_the_pool() -> None:
    step = StepMemory(temporaries=10, code=3)
    left = left_for_pool(1000, parameters=300, state=20, step=step, num_programs=5)
    assert left == 1000 - 40 - 300 - 20 - 10 - 5 * 3  # 4 % are left alone
    assert reserve(1000) == 40


def test_memory_of_an_accelerator() -> None:
    assert device_memory(device("tpu", {"bytes_limit": 1000})) == 1000


@pytest.mark.parametrize("stats", [None, {}])
def test_a_device_that_hides_its_memory(stats: dict[str, int] | None) -> None:
    with pytest.raises(ValueError, match="kv_cache_memory_bytes"):
        device_memory(device("gpu", stats))


def test_cpu_budget_is_a_share_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "host_memory", lambda: 8 * GIB)
    assert host_pool_budget() == 2 * GIB


def test_results_that_are_new_count_among_the_temporaries() -> None:
    def step(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
        return x.at[0].set(1), jnp.sort(y * 2)

    vector = jax.ShapeDtypeStruct((1 << 16,), jnp.float32)
    compiled = jax.jit(step, donate_argnums=0).lower(vector, vector).compile()
    analysis = compiled.memory_analysis()
    found = StepMemory.of(compiled)
    assert found.temporaries - analysis.temp_size_in_bytes in range(4 << 16, (4 << 16) + 100)
    assert found.code == analysis.generated_code_size_in_bytes


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("memory.max", "4096\n", 4096),
        ("memory.max", "max\n", None),
        ("memory.max", str(2**62), None),  # a limit above the machine's memory is none
        ("memory/memory.limit_in_bytes", "8192\n", 8192),
        ("other", "1", None),
    ],
)
def test_host_memory_heeds_the_control_group(
    tmp_path: Path, name: str, content: str, expected: int | None
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(content)
    assert host_memory(tmp_path) == (expected or psutil.virtual_memory().total)


def test_plan_adds_up() -> None:
    plan = MemoryPlan(4 * GIB, 2 * GIB, GIB, GIB // 2, 2 * GIB, GIB // 4, 3 * GIB)
    assert plan.total == int(12.75 * GIB)
    assert str(plan) == (
        "12.75 GiB = parameters 4.00 + block pool 2.00 + sampling state 1.00 + temporaries 0.50"
        " + programs 2.00 + draft model 3.00 + process 0.25"
    )
    assert str(MemoryPlan(1, 1, 1, 1)).endswith("temporaries 0.00")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float16])
@pytest.mark.parametrize("platform", ["cpu", "tpu", "gpu"])
def test_bytes_of_a_block_are_those_of_the_pool(dtype: Any, platform: str) -> None:
    pool = abstract_pool(CONFIG, 7, 16, dtype, platform)
    assert pool.shape == ((3, 7, 2, 1, 256) if platform == "tpu" else (3, 7, 16, 4, 8))
    size = int(np.prod(pool.shape)) * pool.dtype.itemsize
    assert size == 7 * block_bytes(CONFIG, 16, dtype)
    stored_as_bits = platform == "cpu" and dtype == jnp.bfloat16
    assert pool.dtype == (jnp.uint16 if stored_as_bits else jnp.dtype(dtype))


def test_process_bytes_grow_with_what_is_held() -> None:
    """In a process of its own: in this one, others' memory may be given back meanwhile."""
    program = """
import numpy as np
from jaxllm.runtime import memory
before = memory.process_bytes()
held = np.ones(64 << 20, np.uint8)
print((memory.process_bytes() - before) / held.nbytes)
"""
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert 0.9 < float(ran.stdout) < 1.5


@pytest.mark.parametrize(("num_tokens", "num_seqs"), [(8, 8), (64, 8)])
def test_estimated_temporaries_bound_a_feed_forward_and_logits(
    num_tokens: int, num_seqs: int
) -> None:
    width, hidden, vocab_size = 16, 32, 100

    def part_of_step(x: jax.Array, up: jax.Array, down: jax.Array, head: jax.Array) -> jax.Array:
        gated = jax.nn.silu(x @ up) * (x @ up)
        return jax.nn.softmax((gated @ down)[:num_seqs] @ head)

    shapes = [(num_tokens, width), (width, hidden), (hidden, width), (width, vocab_size)]
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    analysis = jax.jit(part_of_step).lower(*args).compile().memory_analysis()
    assert analysis.temp_size_in_bytes > 0
    estimate = StepMemory.estimated(CONFIG, num_tokens, num_seqs)
    assert estimate.temporaries > analysis.temp_size_in_bytes
