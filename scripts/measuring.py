"""What the measuring scripts share: the machine's description and the form of a report."""

from __future__ import annotations

import json
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


def machine() -> Figures:
    """What the figures depend on."""
    import psutil

    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count() or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def report(results: dict[str, Figures], file: Path | None) -> None:
    """Prints figures as a table and as JSON, which also goes into the file if there is one."""
    for name, figures in results.items():
        for key, value in figures.items():
            shown = f"{value:.3f}" if isinstance(value, float) else value
            print(f"{name:8} {key:26} {shown}")
    text = json.dumps(results, indent=1)
    print(text)
    if file:
        file.write_text(text + "\n")
