"""Engines on one workload, in turn: each round runs every engine's process once, so that a machine
that drifts does so for all. Prints the medians and what jaxllm's are to the others'.

    python scripts/compare_engines.py --rounds 3 --json figures.json \\
        jaxllm='python scripts/run_jaxllm.py' other='/path/python run_other.py'

A command prints one line RESULT {json} with startup, single, offline and peak_rss_mb, as
run_jaxllm.py does.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
from pathlib import Path
from typing import Any

from measuring import machine

FIGURES = {  # name -> (path in the result, whether more is better)
    "offline, output tokens/s": ("offline.out_tok_s.med", True),
    "one stream, ms a token": ("single.tpot_ms.med", False),
    "one stream, ms to the first token": ("single.ttft_ms.med", False),
    "process start to first token, s": ("startup.first_token_s", False),
    "peak resident memory, MB": ("peak_rss_mb", False),
}


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description="engines on one workload, in turn")
    parser.add_argument("engines", nargs="+", metavar="NAME=COMMAND", help="jaxllm among them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file for every result")
    args = parser.parse_args()
    commands = dict(engine.split("=", 1) for engine in args.engines if "=" in engine)
    if len(commands) != len(args.engines):
        parser.error("an engine is given as NAME=COMMAND, each name once")
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
    for number in range(args.rounds):
        for name, command in commands.items():
            results[name].append(run(command))
            print(f"round {number + 1}: {name} {results[name][-1].get('offline', '')}", flush=True)
            if args.json:
                args.json.write_text(json.dumps({"machine": machine(), "results": results}))
    table(results)


def run(command: str) -> dict[str, Any]:
    """What a command reports. It may set variables first, as a shell's commands do."""
    words = shlex.split(command)
    environment = dict(os.environ)
    while words and "=" in words[0]:
        name, value = words.pop(0).split("=", 1)
        environment[name] = value
    process = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True)
    lines = [line for line in process.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise SystemExit(f"{command!r} ended with status {process.returncode} and no RESULT")
    result: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return result


def table(results: dict[str, list[dict[str, Any]]]) -> None:
    """Medians over the rounds, lowest and highest; ratios are to the best of the others."""
    print("| | " + " | ".join(results) + " | jaxllm to the best other |")
    print("|---" * (len(results) + 2) + "|")
    for title, (path, more_is_better) in FIGURES.items():
        values = {name: figures(runs, path) for name, runs in results.items()}
        medians = {name: statistics.median(found) for name, found in values.items() if found}
        cells = [
            f"{medians[name]:.4g} ({min(found):.4g}-{max(found):.4g})" if found else ""
            for name, found in values.items()
        ]
        others = [value for name, value in medians.items() if name != "jaxllm"]
        ratio = ""
        if others and "jaxllm" in medians:
            best = max(others) if more_is_better else min(others)
            ratio = f"{medians['jaxllm'] / best:.2f}"
        print(f"| {title} | {' | '.join(cells)} | {ratio} |")


def figures(runs: list[dict[str, Any]], path: str) -> list[float]:
    """One figure of each run that has it."""
    found = []
    for run_result in runs:
        value: Any = run_result
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            found.append(float(value))
    return found


if __name__ == "__main__":
    main()
