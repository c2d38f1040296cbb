"""jaxllm serve: the HTTP server."""

from __future__ import annotations

import argparse
import asyncio
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.cli.flags import SERVER, kinds
from jaxllm.cli.settings import Settings, UsageError, read_settings
from jaxllm.server.options import ServerOptions

if TYPE_CHECKING:
    from jaxllm.async_engine import AsyncEngine

# Of a configuration file's [sampling]: what makes no default for requests of others.
NOT_DEFAULTS = ("n", "best_of", "seed", "logprobs", "prompt_logprobs", "detokenize")


def run(arguments: argparse.Namespace) -> int:
    """Serves until it is told to stop. Everything that can be is checked before a model is
    loaded."""
    settings = read_settings(arguments)
    for name in settings.sampling:
        if name in NOT_DEFAULTS:
            raise UsageError(f"{name} under [sampling] cannot be a default of the server")
    options = _server_options(arguments)
    from jaxllm.server.logs import configure_logging
    from jaxllm.server.serve import serve

    configure_logging(options.log_format, logging.DEBUG if arguments.debug else logging.INFO)
    assert settings.model is not None
    asyncio.run(serve(options, lambda: _start(settings), settings.model))
    return 0


def _server_options(arguments: argparse.Namespace) -> ServerOptions:
    hints = SERVER.options()
    given = SERVER.given(arguments)
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = tuple(value)
        elif Path in kinds(hints[name]):
            given[name] = Path(value).expanduser()
    return ServerOptions(**given)


def _start(settings: Settings) -> AsyncEngine:
    """An engine whose default sampling is the model's, then the operator's."""
    from jaxllm.async_engine import AsyncEngine
    from jaxllm.startup import start_engine

    assert settings.model is not None
    running = start_engine(settings.model, settings.engine_options())
    defaults = {**running.default_sampling, **settings.sampling}
    return AsyncEngine.from_running(replace(running, default_sampling=defaults))
