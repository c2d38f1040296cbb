"""jaxllm compile: all programs of an engine into a folder, which --compiled then uses."""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxllm.cli.plan import add_chip_flags, chosen_chips, progress, read_model
from jaxllm.cli.settings import UsageError, read_settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What only this command has."""
    add_chip_flags(parser, required=False)
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder for the programs")


def run(arguments: argparse.Namespace) -> int:
    """Compiles for this machine's devices, or for the chips that are named."""
    settings = read_settings(arguments)
    options = settings.engine_options()
    if options.compiled is not None:
        raise UsageError("compiled in [engine] is for programs that are there already")
    if arguments.chip is None and arguments.chips is not None:
        raise UsageError("--chips needs --chip; without it give --tensor-parallel-size")
    from jaxllm.compile_ahead import compile_ahead
    from jaxllm.runtime.chips import described_devices
    from jaxllm.runtime.sharding import Placement
    from jaxllm.startup import real_placement

    config = read_model(settings, options)
    device_memory = None
    if arguments.chip is None:
        placement = real_placement(options.tensor_parallel_size)
    else:
        chip, num_chips = chosen_chips(arguments, options.tensor_parallel_size)
        placement = Placement.on(described_devices(chip, num_chips), on_mesh=True)
        device_memory = chip.memory
    folder = Path(arguments.out).expanduser()
    count = compile_ahead(
        config, options, placement, folder, device_memory=device_memory, progress=progress
    )
    print(f"{count} programs for {placement} in {folder}")
    return 0
