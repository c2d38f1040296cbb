"""Kernels in C++ for the CPU, which XLA calls by name. Built with the package where there is a C++
compiler; without them everything runs on XLA's own code, more slowly."""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import jax

logger = logging.getLogger(__name__)

TARGETS = ("jaxllm_matmul_f32", "jaxllm_matmul_bf16", "jaxllm_attention", "jaxllm_reserve")


@cache
def is_available() -> bool:
    """Whether the kernels were built, and for this version of jaxlib. Registers them."""
    folder = Path(__file__).parent
    library = next((p for s in EXTENSION_SUFFIXES if (p := folder / f"kernels{s}").is_file()), None)
    if library is None:
        return False
    try:
        symbols = ctypes.cdll.LoadLibrary(str(library))
        for name in TARGETS:
            capsule = jax.ffi.pycapsule(getattr(symbols, name))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
    except Exception as error:  # of another jaxlib, of another processor, damaged
        logger.warning("the CPU kernels cannot be used, reinstall the package: %s", error)
        return False
    return True


def call(
    name: str,
    results: Any,
    *operands: Any,
    aliases: dict[int, int] | None = None,
    **attributes: Any,
) -> Any:
    """What a kernel computes. results: their shapes. aliases: operand's number -> result's, for
    what is updated in place."""
    return jax.ffi.ffi_call(name, results, input_output_aliases=aliases)(*operands, **attributes)
