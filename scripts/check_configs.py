"""Compiles steps of configs/ for TPUs that are not there, without weights, and compares them with
figures of before: an error if one no longer compiles, if its temporaries grow by more than 10 %, or
if the block pool is copied where it was not.

    python scripts/check_configs.py            # what CI compiles, a minute or two
    python scripts/check_configs.py --all      # every configuration on every chip that holds it
    python scripts/check_configs.py --all --refresh    # write the figures anew
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jaxllm.cli.settings import read_config
from jaxllm.engine_setup import build_model, smallest_config, step_options
from jaxllm.loading.read_config import read_model_config
from jaxllm.runtime.chips import described_devices, find_chip
from jaxllm.runtime.compilation import lower
from jaxllm.runtime.cost import compile_for_text, copies
from jaxllm.runtime.memory import StepMemory
from jaxllm.runtime.programs import StepPrograms
from jaxllm.runtime.sharding import Placement, device_bytes

CONFIGS = Path(__file__).parents[1] / "configs"
FIGURES = CONFIGS / "compiled.json"
GROWTH = 1.1  # of temporaries
NUM_BLOCKS = 2048  # enough that a copy of the pool shows among the temporaries


@dataclass(frozen=True)
class Setup:
    """A configuration, the model it is for, and the chips that are to hold it."""

    config: str
    model: str
    num_devices: int
    chips: tuple[str, ...]


SETUPS = (
    Setup("llama-3-8b-v6e", "llama-3.1-8b", 1, ("v6e", "v7x")),
    Setup("llama-3-8b-v5e", "llama-3.1-8b", 1, ("v5e",)),
    Setup("llama-3-8b-v5e-8", "llama-3.1-8b", 8, ("v5e", "v6e", "v7x")),
    Setup("qwen3-32b-v6e-8", "qwen3-32b", 8, ("v6e", "v5e", "v7x")),
    Setup("smollm2-135m-v5e", "smollm2-135m", 1, ("v5e", "v6e", "v7x")),
)
KINDS = ("decode", "mixed")  # the smallest of the one, the largest of the other
IN_CI = (
    "smollm2-135m-v5e v5e decode",
    "smollm2-135m-v5e v7x decode",
    "llama-3-8b-v5e v5e decode",  # 8 bits
)


def names() -> list[str]:
    """Every program that can be checked: configuration, chip, kind."""
    return [f"{s.config} {chip} {kind}" for s in SETUPS for chip in s.chips for kind in KINDS]


def measure(name: str) -> dict[str, Any]:
    """Compiles one program and says what it takes of a device, in bytes."""
    config, chip_name, kind = name.split()
    (setup,) = (s for s in SETUPS if s.config == config)
    made = programs(setup, chip_name)
    decode = min((b for b in made.buckets if b.decode_only), key=lambda b: b.num_seqs)
    bucket = decode if kind == "decode" else made.largest_bucket
    _, lowered = lower(made.step(bucket), made.placement)
    compiled, hlo = compile_for_text(lowered)
    pool: Any = made.state.kv_pool
    aliased = compiled.memory_analysis().alias_size_in_bytes
    return {
        "bucket": str(bucket),
        "temporaries": StepMemory.of(compiled).temporaries,
        "pool_is_copied": copies(hlo, pool) or aliased < device_bytes(pool),
    }


def programs(setup: Setup, chip_name: str, **changes: Any) -> StepPrograms:
    """Those of a configuration on a chip. changes: of its engine options."""
    chip = find_chip(chip_name)
    devices = described_devices(chip, max(1, setup.num_devices // chip.devices_per_chip))
    placement = Placement.on(devices[: setup.num_devices], on_mesh=True)
    options = replace(read_config(CONFIGS / f"{setup.config}.toml").engine_options(), **changes)
    config = read_model_config(str(CONFIGS / "models" / f"{setup.model}.json"))
    model = build_model(config, options, placement)
    limits = replace(smallest_config(model, options, placement), num_blocks=NUM_BLOCKS)
    return StepPrograms(model, limits, placement, step_options(options, placement))


def problem(figures: Mapping[str, Any], before: Mapping[str, Any] | None) -> str | None:
    """What is worse than before, if anything."""
    if before is None:
        return "has no figures yet; run with --refresh"
    if figures["pool_is_copied"] and not before["pool_is_copied"]:
        return "copies the block pool"
    if figures["temporaries"] > GROWTH * before["temporaries"]:
        return (
            f"needs {figures['temporaries']:,} bytes of temporaries, not {before['temporaries']:,}"
        )
    return None


def check(
    chosen: list[str],
    stored: Mapping[str, Any],
    measured: Callable[[str], dict[str, Any]] = measure,
) -> tuple[dict[str, Any], int]:
    """The figures of each program, and how many have a problem."""
    found, num_problems = {}, 0
    for name in chosen:
        started = time.monotonic()
        try:
            found[name] = measured(name)
            wrong = problem(found[name], stored.get(name))
        except Exception as error:  # the compiler's own words are the result
            wrong = f"does not compile: {str(error)[:300]}"
        num_problems += wrong is not None
        seconds = time.monotonic() - started
        print(f"{name}: {wrong or 'as before'} ({seconds:.0f} s)", flush=True)
    return found, num_problems


def write(figures: Mapping[str, Any]) -> None:
    """The file of figures, a line each."""
    lines = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(figures[name])}" for name in sorted(figures)
    )
    FIGURES.write_text("{\n" + lines + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--all", action="store_true", help="every configuration and chip")
    parser.add_argument("--only", default="", metavar="TEXT", help="those whose name has this")
    parser.add_argument("--refresh", action="store_true", help="write the figures")
    arguments = parser.parse_args()
    everything = names() if arguments.all else IN_CI
    chosen = [name for name in everything if arguments.only in name]
    stored = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    found, num_problems = check(chosen, stored)
    if arguments.refresh:
        write({**stored, **found})
        return int(len(found) < len(chosen))
    return int(num_problems > 0)


if __name__ == "__main__":
    sys.exit(main())
