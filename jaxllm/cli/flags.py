"""Flags made from the fields of SamplingParams, EngineOptions and ServerOptions."""

from __future__ import annotations

import argparse
import json
import types
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from jaxllm.engine_options import EngineOptions
from jaxllm.sampling_params import MAX_LOGPROBS, SamplingParams
from jaxllm.server.options import ServerOptions
from jaxllm.structured_outputs import StructuredOutputsParams

SAMPLING_HELP = {
    "n": "answers to each prompt",
    "best_of": "compute so many answers, and take the n likeliest",
    "presence_penalty": "against tokens that the answer has, -2 to 2",
    "frequency_penalty": "against tokens in proportion to their count in the answer, -2 to 2",
    "repetition_penalty": "divides the logits of tokens of prompt and answer; 1 is none",
    "temperature": "0 always takes the most likely token",
    "top_p": "draw from the most likely tokens that make up this probability",
    "top_k": "draw from this many most likely tokens; 0: from all",
    "min_p": "draw from tokens at least this likely, relative to the most likely",
    "seed": "the same seed gives the same answer",
    "stop": "end the answer at this text; may be repeated",
    "stop_token_ids": "end the answer at these tokens: 5,17",
    "include_stop_str_in_output": "keep the text that ended the answer",
    "ignore_eos": "go on after the end of the answer",
    "max_tokens": "longest answer in tokens; none: as long as the context allows",
    "min_tokens": "shortest answer in tokens",
    "logprobs": f"also this many of the likeliest tokens' log-probabilities, up to {MAX_LOGPROBS}",
    "prompt_logprobs": "the same for the prompt's tokens",
    "detokenize": "turn token ids into text",
    "skip_special_tokens": "leave special tokens out of the text",
    "logit_bias": "added to logits: 5:1.5,17:-100",
    "allowed_token_ids": "draw from these tokens only: 5,17",
    "banned_token_ids": "never draw these tokens: 5,17",
    "structured_outputs": 'form of the answer, as JSON: {"json": SCHEMA}, {"regex": "[0-9]+"}, '
    '{"choice": ["yes", "no"]}, {"grammar": LARK} or {"json_object": true}',
}
ENGINE_HELP = {
    "tokenizer": "folder or .gguf file of another tokenizer",
    "revision": "branch, tag or commit of a model of the Hugging Face hub",
    "dtype": "auto, bfloat16 or float32; auto: float32 for a float32 checkpoint, else bfloat16",
    "quantization": "int8: weights of 8 bits",
    "kv_cache_dtype": "auto (dtype), int8, fp8 (or fp8_e4m3) or fp8_e5m2",
    "max_model_len": "longest sequence, prompt and answer, in tokens; default: the model's",
    "max_num_seqs": "most sequences computed at once",
    "max_num_batched_tokens": "token budget of a step",
    "block_size": "tokens of a block of the KV cache",
    "kv_cache_memory_bytes": "size of the KV cache on each device; default: what memory allows",
    "tensor_parallel_size": "devices that share the model",
    "enable_prefix_caching": "share the cached beginnings of prompts",
    "scheduling_policy": "fcfs, or priority (a smaller priority runs earlier)",
    "max_num_waiting": "most sequences that wait in the engine's queue",
    "seed": "of what is drawn for requests without a seed",
    "overlap": "prepare a step while the one before it runs",
    "max_steps_per_dispatch": "most tokens of an answer that are computed at a time",
    "speculative": "ngram: verify several tokens a step, guessed from what came before; "
    "draft:MODEL: guessed by a smaller model",
    "num_speculative_tokens": "most tokens of an answer that a step verifies",
    "forbid_compile": "a compilation after warm-up is an error",
    "compiled": "folder of programs made by jaxllm compile; they are code, so one that you trust",
    "compilation": "background, ahead (before the start) or on_demand",
    "attention": "implementation of attention; default: the platform's best",
    "layer_loop": "auto, packed, switch or scan",
    "cache_dir": "folder of fetched models and compiled programs (or set JAXLLM_CACHE)",
    "profile_dir": "folder for a trace of the run (timeline.json, and JAX's profile)",
    "program_cache": "keep compiled programs on disk",
}
SERVER_HELP = {
    "host": "address to listen at; 0.0.0.0 for all of the machine's",
    "port": "0: any that is free",
    "served_model_name": "what clients call the model; may be repeated",
    "api_key": "clients must give it; may be repeated (others of the machine may see it: better "
    "a file)",
    "api_key_file": "file of keys, one a line",
    "max_queued_requests": "answers that may wait for others; more are refused with 429",
    "request_timeout": "seconds until a request ends with the reason timeout; none: never",
    "drain_seconds": "how long running requests may go on after SIGTERM",
    "tls_cert": "file of the certificate chain, PEM",
    "tls_key": "file of its private key, PEM",
    "cors_origin": "origin whose pages may call the server, * for all; may be repeated",
    "max_body_bytes": "largest body of a request",
    "max_headers": "most headers of a request",
    "max_header_bytes": "longest header",
    "max_json_depth": "deepest nesting of a body",
    "max_completions": "most answers of a request: prompts x n",
    "max_total_tokens": "most tokens of a request: prompts x n x max_tokens",
    "max_stop_strings": "most stop strings of a request",
    "max_stop_chars": "longest stop string",
    "max_logit_bias": "most entries of logit_bias or stop_token_ids",
    "header_timeout": "seconds in which headers must have come",
    "body_timeout": "seconds in which a body must have come",
    "write_timeout": "seconds after which a stream that its client does not read is cut off",
    "keep_alive_seconds": "a stream silent for so long gets a comment",
    "hang_seconds": "a step that takes longer counts as hung, and /health says so",
    "log_format": "text or json",
    "metrics_prefix": "jaxllm, or vllm for its dashboards",
    "tool_call_parser": "auto (by the chat template), none, or a parser's name",
    "reasoning_parser": "auto (by the chat template), none, or a parser's name",
}
FLAG_NAMES = {
    ("engine", "seed"): "--engine-seed",  # --seed is a request's
    ("engine", "profile_dir"): "--profile",
}
NOT_FLAGS = ("output_kind",)  # --stream decides


@dataclass(frozen=True)
class Table:
    """A table of options: its name in a configuration file and its dataclass."""

    name: str
    dataclass: type
    help: Mapping[str, str]

    def options(self) -> dict[str, Any]:
        """Type hints by name."""
        hints = get_type_hints(self.dataclass)
        names = [f.name for f in fields(self.dataclass) if f.name not in NOT_FLAGS]
        return {name: hints[name] for name in names}

    def add_flags(self, parser: argparse.ArgumentParser, skip: Collection[str] = ()) -> None:
        """A flag for each option. One that is not given leaves no trace in the namespace."""
        group = parser.add_argument_group(f"{self.name} options")
        for name, hint in self.options().items():
            if name not in skip:
                flag = FLAG_NAMES.get((self.name, name), "--" + name.replace("_", "-"))
                group.add_argument(
                    flag,
                    dest=f"{self.name}.{name}",
                    default=argparse.SUPPRESS,
                    help=self.help[name].replace("%", "%%"),
                    **_argument(hint),
                )

    def given(self, namespace: argparse.Namespace) -> dict[str, Any]:
        """What the user gave as flags."""
        prefix = f"{self.name}."
        items = vars(namespace).items()
        return {name.removeprefix(prefix): v for name, v in items if name.startswith(prefix)}


ENGINE = Table("engine", EngineOptions, ENGINE_HELP)
SAMPLING = Table("sampling", SamplingParams, SAMPLING_HELP)
SERVER = Table("server", ServerOptions, SERVER_HELP)


def kinds(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type hint: int | None is int and NoneType."""
    return get_args(hint) if get_origin(hint) is types.UnionType else (hint,)


def _argument(hint: Any) -> dict[str, Any]:
    """How argparse reads an option of this type."""
    alternatives = kinds(hint)
    origins = {get_origin(kind) or kind for kind in alternatives}
    if bool in origins:
        return {"action": argparse.BooleanOptionalAction}
    if Mapping in origins:
        return {"type": _bias, "metavar": "ID:BIAS,..."}
    if StructuredOutputsParams in origins:
        return {"type": _json_object, "metavar": "JSON"}
    if tuple in origins:
        return {"action": "append", "metavar": "NAME"}
    if Sequence in origins:
        if str in origins:
            return {"action": "append", "metavar": "TEXT"}
        return {"type": _token_ids, "metavar": "ID,..."}
    for kind, metavar in ((int, "N"), (float, "X")):
        if kind in origins:
            return {"type": _number(kind, type(None) in origins), "metavar": metavar}
    return {"type": str, "metavar": "PATH" if Path in origins else "NAME"}


def _number(kind: type, optional: bool) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        try:
            return kind(text)
        except ValueError:
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {what}, got {text!r}") from None

    return parse


def _token_ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be token ids separated by commas, got {text!r}"
        ) from None


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"must be a JSON object, got {text!r:.80}")
    return value


def _bias(text: str) -> dict[int, float]:
    try:
        pairs = [part.split(":") for part in text.split(",")]
        return {int(token_id): float(bias) for token_id, bias in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be pairs of token id and number such as 5:1.5,17:-100, got {text!r}"
        ) from None
