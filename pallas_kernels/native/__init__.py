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

# Sets of instructions that the kernels are compiled for, the best first.
VARIANTS = ("amx", "avx512bf16", "avx512", "avx2", "baseline")
TARGETS = ("jaxllm_matmul_f32", "jaxllm_matmul_bf16", "jaxllm_attention", "jaxllm_reserve")


@cache
def is_available() -> bool:
    """Whether the kernels were built, and for this version of jaxlib. Registers them."""
    if _path() is None:
        return False
    try:
        for name in TARGETS:
            capsule = jax.ffi.pycapsule(getattr(_library(), name))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
        logger.info("the CPU kernels use %s instructions", variant())
    except Exception as error:  # of another jaxlib, of another processor, damaged
        logger.warning("the CPU kernels cannot be used, reinstall the package: %s", error)
        return False
    return True


def variant() -> str:
    """The name of the instruction set in use. Needs `is_available()`."""
    function = _library().jaxllm_variant
    function.restype = ctypes.c_char_p
    return str(function().decode())


def use_variant(name: str) -> None:
    """Makes the kernels use another one than the best, to compare them. Needs `is_available()`.
    Raises ValueError for one that the processor lacks."""
    function = _library().jaxllm_use_variant
    function.restype = ctypes.c_bool
    if not function(name.encode()):
        raise ValueError(f"the processor has no {name}, or the kernels have no such variant")


def _path() -> Path | None:
    folder = Path(__file__).parent
    paths = (folder / f"kernels{suffix}" for suffix in EXTENSION_SUFFIXES)
    return next((path for path in paths if path.is_file()), None)


def _library() -> ctypes.CDLL:
    return ctypes.cdll.LoadLibrary(str(_path()))


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
