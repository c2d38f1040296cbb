"""The command line: jaxllm generate, chat, serve, bench, models."""

from jaxllm.cli.command import main

__all__ = ["main"]
