"""Exact byte ranges of a file. Not mapped: mapped pages would count as this process's memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from jaxllm.config import ModelError


def read_bytes(path: Path, offset: int, num_bytes: int) -> np.ndarray:
    """num_bytes of the file from offset on, uint8; raises ModelError if the file ends before."""
    data = np.empty(num_bytes, np.uint8)
    view = data.data
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while view:
                count = file.readinto(view)
                if not count:
                    raise ModelError(f"{path}: the file ends early; fetch it again")
                view = view[count:]
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from error
    return data
