"""An import goes downward only, function-local ones included; `import jaxllm` is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOT_MODULE = "jaxllm"  # names parts of every floor up to 5, each loaded when it is used

# The longest name that a module starts with decides. DESIGN.md says the same in words.
FLOORS = {
    "pallas_kernels": 0,
    "jaxllm.config": 0,
    "jaxllm.sampling_params": 0,
    "jaxllm.beam_search_params": 0,
    "jaxllm.structured_outputs": 0,
    "jaxllm.request_error": 0,
    "jaxllm.pooling_params": 0,
    "jaxllm.outputs": 0,
    "jaxllm.engine_options": 0,
    "jaxllm.engine": 1,
    "jaxllm.runtime.kv_cache": 1,
    "jaxllm.runtime.sampler": 1,
    "jaxllm.runtime.ranking": 1,
    "jaxllm.runtime.sharding": 1,
    "jaxllm.runtime.huge_pages": 1,
    "jaxllm.models": 2,
    "jaxllm.quantization": 2,
    "jaxllm.loading": 2,
    "jaxllm.text": 2,
    "jaxllm.runtime": 3,
    "jaxllm.engine.engine": 4,
    "jaxllm.engine.intake": 4,
    "jaxllm.prompts": 5,
    "jaxllm.engine_setup": 5,
    "jaxllm.planning": 5,
    "jaxllm.compile_ahead": 5,
    "jaxllm.checkpoint": 5,
    "jaxllm.draft_setup": 5,
    "jaxllm.startup": 5,
    "jaxllm.llm": 5,
    "jaxllm.engine_thread": 5,
    "jaxllm.engine_mailbox": 5,
    "jaxllm.async_engine": 5,
    "jaxllm.bench": 6,
    "jaxllm.server": 6,
    "jaxllm.cli": 6,
    "scripts": 6,
}
# What a part must not import although its floor would allow it.
FORBIDDEN = {
    "jaxllm.engine": ("jax", "pallas_kernels", "jaxllm.runtime", "jaxllm.models", "jaxllm.loading"),
    "jaxllm.config": ("jax",),
    "jaxllm.sampling_params": ("jax",),
    "jaxllm.beam_search_params": ("jax",),
    "jaxllm.structured_outputs": ("jax",),
    "jaxllm.pooling_params": ("jax",),
    "jaxllm.outputs": ("jax",),
    "jaxllm.engine_options": ("jax",),
    "jaxllm.text": ("jax",),
    "jaxllm": ("torch",),
    "pallas_kernels": ("torch",),
    "scripts": ("torch",),
}
KERNELS_MAY_IMPORT = {"jax", "numpy", "pallas_kernels", *sys.stdlib_module_names}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path
    for folder in ("jaxllm", "pallas_kernels", "scripts")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def imports(name: str, source: str, is_package: bool) -> Iterator[str]:
    """The modules that a module's source imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".") + ["_"] * is_package
                base = ".".join([*parts[: -node.level], *([base] if base else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield full if full in MODULES else base


def imported_by(name: str) -> set[str]:
    path = MODULES[name]
    return set(imports(name, path.read_text(), path.name == "__init__.py"))


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def floor(module: str) -> int | None:
    """None for what is not ours or has no floor."""
    if module == ROOT_MODULE:
        return 5
    names = [name for name in FLOORS if is_in(module, name)]
    return FLOORS[max(names, key=len)] if names else None


def test_there_is_something_to_hold() -> None:
    assert {"jaxllm.engine.batch", "pallas_kernels.ragged_paged_attention.api"} <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downward(name: str) -> None:
    own = floor(name)
    assert own is not None, f"{name} has no floor: give it one here and in DESIGN.md"
    for imported in imported_by(name):
        other = floor(imported)
        assert other is None or other <= own, f"{name} (floor {own}) imports {imported} ({other})"


@pytest.mark.parametrize("name", MODULES)
def test_forbidden_imports(name: str) -> None:
    forbidden = {f for part, names in FORBIDDEN.items() if is_in(name, part) for f in names}
    bad = {i for i in imported_by(name) for f in forbidden if is_in(i, f)}
    assert not bad, f"{name} must not import {bad}"


@pytest.mark.parametrize("name", [name for name in MODULES if is_in(name, "pallas_kernels")])
def test_kernels_know_jax_and_numpy_only(name: str) -> None:
    assert {i.partition(".")[0] for i in imported_by(name)} <= KERNELS_MAY_IMPORT


def test_imports_are_found_wherever_they_stand() -> None:
    source = """
import os.path as p
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from jaxllm.engine import batch
def f():
    import torch.nn
    from . import sibling
    from ..other import thing
    from jaxllm import LLM
"""
    assert set(imports("jaxllm.runtime.step", source, False)) == {
        "os.path", "typing", "jaxllm.engine.batch", "torch.nn", "jaxllm.runtime", "jaxllm.other",
        "jaxllm",
    }  # fmt: skip
    assert set(imports("jaxllm.runtime", "from . import step", True)) == {"jaxllm.runtime.step"}


def test_importing_the_package_is_quick_and_light() -> None:
    program = """
import sys, time
import jaxllm
heavy = {"jax", "jaxlib", "transformers", "torch", "flax", "aiohttp", "gguf"} & set(sys.modules)
print(time.process_time(), *sorted(heavy))
"""
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        for _ in range(2)  # the first may have to read the files from the disk
    ]
    assert [run[1:] for run in runs] == [[], []]
    assert min(float(run[0]) for run in runs) < 0.5  # of the processor; about 0.05 alone
