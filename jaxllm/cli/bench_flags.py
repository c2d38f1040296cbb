"""The flags that the benchmarks share, under the names of `vllm bench` where it has them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

DATASETS = ("random", "sharegpt", "prefix-repetition", "multi-turn", "trace")
ENDPOINTS = ("/v1/completions", "/v1/chat/completions")
# name: default, help; of WorkloadOptions, each for one of the datasets
LENGTHS = {
    "random_input_len": (1024, "random: tokens of a prompt after the prefix"),
    "random_output_len": (128, "random: tokens of an answer"),
    "random_prefix_len": (0, "random: tokens that all prompts begin with"),
    "sharegpt_output_len": (None, "sharegpt: tokens of an answer; default: the file's answer"),
    "prefix_repetition_prefix_len": (256, "prefix-repetition: tokens of a prefix"),
    "prefix_repetition_suffix_len": (256, "prefix-repetition: tokens after it"),
    "prefix_repetition_num_prefixes": (10, "prefix-repetition: different prefixes"),
    "prefix_repetition_output_len": (128, "prefix-repetition: tokens of an answer"),
    "multi_turn_num_turns": (4, "multi-turn: questions of a conversation"),
    "multi_turn_input_len": (64, "multi-turn: tokens of a question"),
    "multi_turn_output_len": (64, "multi-turn: tokens of an answer"),
}
WORKLOAD = (
    "dataset_name", "dataset_path", "num_prompts", "seed", "random_range_ratio", "trace_time_unit",
    *LENGTHS,
)  # fmt: skip


def add_dataset_flags(parser: argparse.ArgumentParser, datasets: Sequence[str] = DATASETS) -> None:
    """The workload."""
    group = parser.add_argument_group("workload options")
    group.add_argument("--dataset-name", choices=datasets, default="random")
    group.add_argument(
        "--dataset-path", metavar="FILE",
        help="sharegpt: JSON; trace: JSON lines with timestamp, output_length, and input_length "
        "(and hash_ids) or prompt",
    )  # fmt: skip
    group.add_argument(
        "--num-prompts", type=int, default=1000, metavar="N",
        help="requests (multi-turn: conversations; trace: at most)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is drawn")
    group.add_argument(
        "--random-range-ratio", type=float, default=0.0, metavar="X",
        help="random: lengths are uniform in [(1 - X) len, (1 + X) len]",
    )  # fmt: skip
    for name, (default, what) in LENGTHS.items():
        if what.partition(":")[0] in datasets:
            flag = "--" + name.replace("_", "-")
            group.add_argument(flag, type=int, default=default, metavar="N", help=what)
    if "trace" in datasets:
        group.add_argument(
            "--trace-time-unit", choices=("s", "ms"), default="s", help="of the timestamps"
        )


def add_server_flags(parser: argparse.ArgumentParser) -> None:
    """The server, the requests and what is computed of their times."""
    group = parser.add_argument_group("server options")
    group.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="URL")
    group.add_argument("--model", metavar="NAME", help="default: the first of /v1/models")
    group.add_argument("--endpoint", choices=ENDPOINTS, default=ENDPOINTS[0])
    group.add_argument(
        "--header", action="append", metavar="NAME=VALUE",
        help="such as Authorization=Bearer KEY; may be repeated",
    )  # fmt: skip
    group.add_argument(
        "--tokenizer", metavar="MODEL",
        help="folder, .gguf file or name of a model whose token ids prompts are drawn from; "
        "default: what the server's /tokenize makes of common words, else words",
    )  # fmt: skip
    group.add_argument(
        "--vocab-size", type=int, metavar="N", help="instead: token ids below this number"
    )
    group.add_argument("--temperature", type=float, metavar="X", help="default: the server's")
    group.add_argument(
        "--ignore-eos", action="store_true", help="answers as long as the workload says"
    )
    add_dataset_flags(parser)
    group = parser.add_argument_group("figures")
    group.add_argument(
        "--burstiness", type=float, default=1.0, metavar="X",
        help="shape of the gamma distribution of the gaps; 1: Poisson, less: in bursts",
    )  # fmt: skip
    group.add_argument(
        "--goodput", nargs="+", metavar="NAME:MS", help="limits: ttft:200 tpot:50 e2el:2000"
    )
    group.add_argument("--metric-percentiles", default="99", metavar="P,...")
    group.add_argument("--label", metavar="TEXT", help="kept in the result")


def add_output_flags(parser: argparse.ArgumentParser, plots: bool = True) -> None:
    """Where results go."""
    group = parser.add_argument_group("output options")
    group.add_argument("--save-result", "--output-json", metavar="FILE", help="the result as JSON")
    group.add_argument(
        "--compare", nargs="+", metavar="FILE", help="earlier results, shown beside this one"
    )
    if plots:
        group.add_argument(
            "--plot", metavar="DIR", help="pictures, PNG and SVG; needs matplotlib (jaxllm[bench])"
        )


def numbers(flag: str, text: str | None, kind: type) -> list[Any]:
    """1,2,inf as numbers. Raises ValueError."""
    if text is None:
        return []
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "integers" if kind is int else "numbers"
        raise ValueError(f"{flag} must be {what} separated by commas, got {text!r}") from None
