"""What libtpu is told, which it reads once, when it is loaded."""

from __future__ import annotations

import importlib.util
import mmap
import os
from pathlib import Path

# Products on v7x want bfloat16 weights in tiles of 16 rows, but a compiler assumes 8 of arguments,
# so it would lay out all weights anew in each step: 15 GB of temporaries for Llama 3.1 8B. With 8
# rows everywhere the products' estimates are the same.
FLAG = "xla_tpu_impure_use_large_2nd_minor_layout_for_x16"
VARIABLE = "LIBTPU_INIT_ARGS"


def set_flags() -> None:
    """Sets the flag in the environment, unless the user did, or where there is no libtpu or one
    that does not know it: it would end the process."""
    given = os.environ.get(VARIABLE, "")
    if FLAG not in given and _is_known(FLAG):
        os.environ[VARIABLE] = f"{given} --{FLAG}=false".strip()


def _is_known(flag: str) -> bool:
    spec = importlib.util.find_spec("libtpu")
    if spec is None or not spec.submodule_search_locations:
        return False
    library = Path(spec.submodule_search_locations[0]) / "libtpu.so"
    if not library.is_file():
        return False
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as content:
        return content.find(flag.encode()) >= 0
