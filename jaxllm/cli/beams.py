"""The flags of beam search."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from jaxllm.beam_search_params import MAX_BEAM_WIDTH, BeamSearchParams
from jaxllm.cli.settings import UsageError

EARLY_STOPPING: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of a command that can search."""
    group = parser.add_argument_group("beam search")
    group.add_argument(
        "--beam-width",
        type=int,
        metavar="N",
        help=f"find the likeliest answers with so many beams, up to {MAX_BEAM_WIDTH}; --n says how "
        "many are written",
    )
    group.add_argument(
        "--length-penalty",
        type=float,
        metavar="X",
        help="an answer's log-probability is divided by its length to this power; 1 by default",
    )
    group.add_argument(
        "--early-stopping",
        choices=EARLY_STOPPING,
        help="end once N answers have ended (true), when a running one cannot become better by a "
        "guess (false, the default), or at all (never)",
    )


def beam_options(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Those of BeamSearchParams that were given; None without a beam width. Raises UsageError."""
    given: dict[str, Any] = {}
    if arguments.length_penalty is not None:
        given["length_penalty"] = arguments.length_penalty
    if arguments.early_stopping is not None:
        given["early_stopping"] = EARLY_STOPPING[arguments.early_stopping]
    if arguments.beam_width is None:
        for name in given:
            raise UsageError(f"--{name.replace('_', '-')} needs --beam-width")
        return None
    if arguments.stream:
        raise UsageError("--stream cannot be combined with --beam-width")
    return {"beam_width": arguments.beam_width, **given}


def search_params(
    beams: Mapping[str, Any], sampling: Mapping[str, Any], options: Mapping[str, Any]
) -> BeamSearchParams:
    """The search for one prompt. sampling: the command's options; options: the prompt's own. Raises
    ValueError for those that a search has no use for."""
    return BeamSearchParams.from_dict({"n": 1, **sampling, **options, **beams})
