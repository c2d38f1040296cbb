"""The size of the block pool on an accelerator, which is stood in for."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jaxllm.engine_options import EngineOptions
from jaxllm.engine_setup import build_model, smallest_config, with_pool
from jaxllm.loading.read_config import read_model_config
from jaxllm.runtime.chips import described_devices, find_chip
from jaxllm.runtime.programs import Program
from jaxllm.runtime.sharding import Placement, device_bytes

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is made for Linux on x86-64 only"
)
LLAMA = Path(__file__).parents[1] / "configs" / "models" / "llama-3.1-8b.json"
PARAMETERS = 2 * 8_030_261_248
BLOCK = 32 * 32 * 2 * 8 * 128 * 2
TABLES = 64 * 128256 * 8 + 64 * 4096 * 4 + 64 * 4
SMALL = LLAMA.with_name("smollm2-135m.json")
SMALL_PARAMETERS = 2 * 134_515_008
SMALL_BLOCK = 32 * 30 * 2 * 3 * 64 * 2
SMALL_TABLES = 64 * 49152 * 8 + 64 * 576 * 4 + 64 * 4
GB = 10**9


class StandIn:
    """A compiler whose programs say what they would take: a step 1 GB (2 GB if it only decodes) of
    temporaries, 1 MB of code, and arguments with 1 MB of padding."""

    def __init__(self) -> None:
        self.programs: dict[Any, Program] = {}
        self.measured: list[str] = []

    def submit(self, program: Program) -> None:
        self.programs[program.name] = program
        self.measured.append(str(program.name))

    def forget(self, name: Any) -> None:
        del self.programs[name]

    def get(self, name: Any) -> Any:
        program = self.programs[name]
        is_pool = name == "pool"
        state = program.key[0] if is_pool else program.arguments[:2]
        analysis = SimpleNamespace(
            temp_size_in_bytes=0 if is_pool else (2 if "decode" in name else 1) * GB,
            output_size_in_bytes=device_bytes(state) if is_pool else 10,
            alias_size_in_bytes=0 if is_pool else 10,
            generated_code_size_in_bytes=10**6,
            argument_size_in_bytes=0 if is_pool else device_bytes(state) + 10**6,
        )
        return SimpleNamespace(memory_analysis=lambda: analysis)


def sized(num_chips: int, *, with_draft: bool = False, **options: Any) -> tuple[Any, StandIn]:
    given = EngineOptions(dtype="bfloat16", max_model_len=8192, max_num_seqs=64, **options)
    placement = Placement.on(described_devices(find_chip("v6e"), num_chips), on_mesh=True)
    model = build_model(read_model_config(str(LLAMA)), given, placement)
    smallest, compiler = smallest_config(model, given, placement), StandIn()
    compiler_: Any = compiler
    draft = build_model(read_model_config(str(SMALL)), given, placement) if with_draft else None
    return with_pool(smallest, model, given, placement, compiler_, 32 * GB, draft), compiler


def test_the_pool_is_what_is_left_by_the_compilers_figures() -> None:
    config, compiler = sized(1)
    num_programs = len(config_buckets(config)) + 2
    left = 32 * GB - 32 * GB // 25 - PARAMETERS - 10**6 - TABLES - 2 * GB - num_programs * 10**6
    assert config.num_blocks == left // BLOCK
    assert compiler.measured == [
        "pool", "mixed 2048x64, smallest pool", "decode 64x64, smallest pool",
        "decode 8x8, smallest pool",
    ]  # fmt: skip
    assert not compiler.programs, "what was only measured is dropped"


def test_a_draft_model_leaves_less_for_two_pools() -> None:
    config, compiler = sized(1, with_draft=True, speculative="draft:small")
    num_programs = 2 * (len(config_buckets(config)) + 2)
    others = PARAMETERS + TABLES + SMALL_PARAMETERS + SMALL_TABLES + 2 * 10**6
    left = 32 * GB - 32 * GB // 25 - others - 2 * GB - num_programs * 10**6
    assert config.num_blocks == left // (BLOCK + SMALL_BLOCK)
    assert len(compiler.measured) == 2 * 4
    given = {"kv_cache_memory_bytes": 2 * GB, "speculative": "draft:small"}
    config, _ = sized(1, with_draft=True, **given)
    assert config.num_blocks == 2 * GB // (BLOCK + SMALL_BLOCK)


def config_buckets(config: Any) -> tuple[Any, ...]:
    from jaxllm.runtime.buckets import plan_buckets

    return plan_buckets(config.max_num_seqs, config.max_num_batched_tokens, on_cpu=False)


def test_what_the_user_says_is_not_measured() -> None:
    config, compiler = sized(1, kv_cache_memory_bytes=2 * GB)
    assert config.num_blocks == 2 * GB // BLOCK
    assert compiler.measured == []


def test_a_pool_on_several_devices_holds_more() -> None:
    one, eight = sized(1)[0], sized(8)[0]
    most = 64 * 8192 // 32  # of what all sequences need
    assert one.num_blocks < most
    assert eight.num_blocks == most
    assert replace(eight, num_blocks=1024) == replace(one, num_blocks=1024)


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize(("chip", "block_size"), [("v5e", 32), ("v6e", 32), ("v7x", 64)])
def test_blocks_suit_the_chip(chip: str, block_size: int, kv_cache_dtype: str) -> None:
    placement = Placement.on(described_devices(find_chip(chip), 1)[:1], on_mesh=True)
    given = EngineOptions(max_model_len=2048, kv_cache_dtype=kv_cache_dtype)
    model = build_model(read_model_config(str(LLAMA)), given, placement)
    assert smallest_config(model, given, placement).block_size == block_size
