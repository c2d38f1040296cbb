"""A model's configuration without its weights."""

from __future__ import annotations

import os
from pathlib import Path

from jaxllm.config import ModelConfig, ModelError
from jaxllm.loading.config_json import model_config_from_hf
from jaxllm.loading.gguf_source import GGUFFile
from jaxllm.loading.hub import download, find_model, is_repository

CONFIG_FILES = ["config.json", "generation_config.json"]


def read_model_config(
    name: str, *, revision: str | None = None, cache_dir: Path | None = None
) -> ModelConfig:
    """The configuration of a folder with a config.json, of such a file, of a .gguf file, of a
    built-in model, or of org/name, of which only the configuration is fetched. Raises ModelError
    when there is none."""
    path = Path(os.path.expanduser(name))
    if name and path.suffix == ".json" and os.path.isfile(path):
        return model_config_from_hf(path)
    if name and os.path.isdir(path) and (path / "config.json").is_file():
        return model_config_from_hf(path)
    if is_repository(name):
        return model_config_from_hf(download(name, revision, CONFIG_FILES))
    files = find_model(name, revision=revision, cache_dir=cache_dir)
    if files.gguf is None:
        raise ModelError(f"{name}: has no config.json")
    return GGUFFile(files.gguf).config()
