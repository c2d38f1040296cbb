"""All programs of an engine compiled into a folder, for this machine or for chips elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jaxllm.config import ModelConfig
from jaxllm.engine_options import EngineOptions
from jaxllm.engine_setup import build_model, smallest_config, step_options, with_pool
from jaxllm.runtime.compilation import Compiler
from jaxllm.runtime.compiled_folder import describe, write_manifest, write_program
from jaxllm.runtime.programs import StepPrograms
from jaxllm.runtime.sharding import Placement


def compile_ahead(
    config: ModelConfig,
    options: EngineOptions,
    placement: Placement,
    folder: Path,
    *,
    device_memory: int | None,
    progress: Callable[[str], None],
) -> int:
    """Compiles and stores every program; returns how many. device_memory: bytes, where the devices
    are not there to be asked. Raises ValueError for options that do not fit and for a folder that
    has something in it."""
    if options.draft_model:
        raise ValueError(
            "speculative: programs for a draft model cannot be compiled ahead; leave it out, or "
            "use 'ngram'"
        )
    model = build_model(config, options, placement)
    smallest = smallest_config(model, options, placement)
    _make(folder)
    compiler = Compiler(None, placement=placement)
    try:
        progress(f"sizing the block pool for {placement}")
        full = with_pool(smallest, model, options, placement, compiler, device_memory)
        programs = StepPrograms(model, full, placement, step_options(options, placement))
        entries = {}
        every = programs.all()
        for program in every:
            compiler.submit(program)
        for number, program in enumerate(every):
            progress(f"compiling {program.name} ({number + 1} of {len(every)})")
            compiled = compiler.get(program.name)
            entries[str(program.name)] = write_program(folder, number, program, compiled)
    finally:
        compiler.close()
    write_manifest(folder, describe(model, full, programs.options, placement), entries)
    return len(entries)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
        is_empty = not any(folder.iterdir())
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be used: {error.strerror}") from error
    if not is_empty:
        raise ValueError(f"--out {folder} is not empty; give a new folder")
