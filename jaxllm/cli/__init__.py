"""The command line: jaxllm generate, chat, models."""

from jaxllm.cli.command import main

__all__ = ["main"]
