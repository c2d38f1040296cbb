"""What a command is to do: a configuration file's tables, then the flags, which win."""

from __future__ import annotations

import argparse
import os
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_origin

from jaxllm.cli.flags import ENGINE, SAMPLING, kinds
from jaxllm.engine_options import EngineOptions
from jaxllm.sampling_params import SamplingParams

MODEL_KEYS = ("name", "revision", "tokenizer", "dtype")  # all but the name are EngineOptions


class UsageError(ValueError):
    """The command line, a configuration file or the input is wrong."""


@dataclass(frozen=True)
class Settings:
    """A model's name and the options that were given; what is not given is left out."""

    model: str | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)
    sampling: Mapping[str, Any] = field(default_factory=dict)

    def engine_options(self, **defaults: Any) -> EngineOptions:
        """Raises ValueError for what does not fit."""
        return EngineOptions(**{**defaults, **self.engine})


def read_settings(
    namespace: argparse.Namespace, environment: Mapping[str, str] = os.environ
) -> Settings:
    """Flags over the configuration file over JAXLLM_CACHE. Everything that can be is checked here,
    before a model is loaded. Raises UsageError or ValueError."""
    path = namespace.config
    config = Settings() if path is None else read_config(Path(path))
    engine = {**config.engine, **ENGINE.given(namespace)}
    sampling = {**config.sampling, **SAMPLING.given(namespace)}
    if environment.get("JAXLLM_CACHE"):
        engine.setdefault("cache_dir", environment["JAXLLM_CACHE"])
    if engine.get("cache_dir") is not None:
        engine["cache_dir"] = Path(os.path.expanduser(engine["cache_dir"]))
    model = config.model if namespace.model is None else namespace.model
    if model is None:
        raise UsageError("which model? give MODEL, or --config FILE with a name under [model]")
    settings = Settings(model, engine, sampling)
    settings.engine_options()
    SamplingParams.from_dict(sampling)
    return settings


def read_config(path: Path) -> Settings:
    """A TOML file with the tables [model], [engine] and [sampling]. Raises UsageError naming the
    file and the key that is unknown or of the wrong type."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # not TOML, or not UTF-8
        raise UsageError(f"{path}: is not valid TOML: {error}") from error
    engine_keys = [name for name in ENGINE.options() if name not in MODEL_KEYS]
    known = {"model": MODEL_KEYS, "engine": engine_keys, "sampling": tuple(SAMPLING.options())}
    _check_keys(path, "table", content, known)
    for name, keys in known.items():
        if not isinstance(content.setdefault(name, {}), dict):
            raise UsageError(f"{path}: {name} must be a table, [{name}]")
        _check_keys(path, f"key in [{name}]", content[name], keys)
    model = dict(content["model"])
    name = model.pop("name", None)
    if name is not None and not isinstance(name, str):
        raise UsageError(f"{path}: name in [model] must be a string, got {name!r}")
    settings = Settings(name, {**model, **content["engine"]}, content["sampling"])
    _check_types(path, settings.engine)
    try:
        settings.engine_options()
        SamplingParams.from_dict(settings.sampling)
    except ValueError as error:
        raise UsageError(f"{path}: {error}") from error
    return settings


def _check_keys(path: Path, what: str, content: Mapping[str, Any], known: Collection[str]) -> None:
    for name in content:
        if name not in known:
            raise UsageError(f"{path}: unknown {what}: {name!r}; known: {', '.join(known)}")


def _check_types(path: Path, engine: Mapping[str, Any]) -> None:
    """Of texts and switches; EngineOptions checks its numbers."""
    hints = ENGINE.options()
    for name, value in engine.items():
        allowed = {get_origin(kind) or kind for kind in kinds(hints[name])}
        for kind, what in ((bool, "true or false"), (str, "a string")):
            if kind in allowed and not isinstance(value, kind):
                raise UsageError(f"{path}: {name} must be {what}, got {value!r}")
        if int in allowed and (not isinstance(value, int) or isinstance(value, bool)):
            raise UsageError(f"{path}: {name} must be an integer, got {value!r}")
