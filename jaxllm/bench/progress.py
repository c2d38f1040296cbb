"""A progress bar on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any


def shows_progress() -> bool:
    """Whether there is a terminal to show it on."""
    return sys.stderr is not None and sys.stderr.isatty()


@contextlib.contextmanager
def progress(total: int, what: str) -> Iterator[Callable[[], Any]]:
    """What is called when one of `total` is done. Shows nothing where stderr is no terminal."""
    if total < 2 or not shows_progress():
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=total, desc=what, file=sys.stderr) as bar:
        yield bar.update
