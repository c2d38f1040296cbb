"""What a kernel is compiled for, and what was measured there."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax


def device_kind() -> str:
    """JAX's name of the device that the program being traced is for, such as "TPU v6 lite".

    That is the device of the abstract mesh where there is one, which may be a chip that is only
    described, and else the default device.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    return described.device_kind if described is not None else jax.devices()[0].device_kind


@cache
def tuned_sizes(folder: Path, device_kind: str) -> dict[str, Any]:
    """The tile sizes that were measured on such a device, by a kernel's own names of problems;
    nothing where none was."""
    path = folder / f"{device_kind}.json"
    return json.loads(path.read_text()) if path.is_file() else {}
