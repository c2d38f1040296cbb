"""The command line: jaxllm generate, chat, serve, models."""

from jaxllm.cli.command import main

__all__ = ["main"]
