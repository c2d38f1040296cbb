"""Builds the CPU kernels where there is a C++ compiler. Everything else is in pyproject.toml."""

import sys
from pathlib import Path

import jaxlib
from setuptools import Extension, setup

NATIVE = Path("pallas_kernels/native")
FLAGS = ["-std=gnu++17", "-O3", "-Wno-psabi", "-Wno-attributes"]

setup(
    ext_modules=[
        Extension(
            "pallas_kernels.native.kernels",
            sources=[str(NATIVE / "kernels.cc")],
            depends=[str(path) for path in sorted(NATIVE.glob("*.h"))],
            include_dirs=[str(Path(jaxlib.__file__).parent / "include")],
            extra_compile_args=[] if sys.platform == "win32" else FLAGS,
            language="c++",
            optional=True,  # without a compiler, XLA's own code does everything
        )
    ]
)
