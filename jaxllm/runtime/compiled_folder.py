"""A folder of compiled programs and the manifest that says what they are for.

Such files are code. They are loaded only from a folder that the operator names, that nobody else
can write to, and only while their hashes are those of its manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

from jaxllm.config import EngineConfig
from jaxllm.models.decoder import Model
from jaxllm.runtime.compilation import (
    deserialize,
    others_may_write,
    processor,
    program_shape,
    serialize,
    source_digest,
)
from jaxllm.runtime.programs import Program
from jaxllm.runtime.sharding import Placement
from jaxllm.runtime.step import StepOptions

MANIFEST = "manifest.json"
FORMAT = 1
LIMITS = ("block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens",
          "max_steps_per_dispatch", "num_speculative_tokens")  # fmt: skip


class CompiledFolderError(ValueError):
    """A folder of compiled programs cannot be used; says why and what would do."""


def describe(
    model: Model, config: EngineConfig, options: StepOptions, placement: Placement
) -> dict[str, Any]:
    """All that programs depend on, as a manifest has it."""
    devices = placement.devices
    return {
        "format": FORMAT,
        "versions": _versions(devices),
        "source": source_digest(),
        "device": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "number": len(devices),
            "processor": _hash(processor(devices[0])),
        },
        "model": _hash(repr(model.config)),
        "options": {
            **{name: getattr(config, name) for name in LIMITS},
            "dtype": model.dtype.name,
            "quantization": model.quantization,
            "kv_cache_dtype": model.kv_dtype.name,
            "layer_loop": model.layer_loop,
            "attention": options.attention or "the platform's best",
        },
        "num_blocks": config.num_blocks,
        "on_mesh": placement.mesh is not None,
    }


def write_program(folder: Path, number: int, program: Program, compiled: Any) -> dict[str, str]:
    """Stores a compiled program; returns its entry of the manifest."""
    content = serialize(compiled)
    name = f"{number:02d}-{str(program.name).replace(' ', '-')}.bin"
    (folder / name).write_bytes(content)
    return {"file": name, "sha256": _sha256(content), "shapes": program_shape(program)}


def write_manifest(
    folder: Path, description: Mapping[str, Any], programs: Mapping[str, dict[str, str]]
) -> None:
    """The last file to be written: a folder without it is not used."""
    content = {**description, "programs": programs}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


class CompiledFolder:
    """A folder whose manifest was read and whose files have its hashes. Raises CompiledFolderError
    for anything that does not fit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = self._read_manifest()
        for name, entry in self.manifest["programs"].items():
            self._content(name, entry)

    @property
    def on_mesh(self) -> bool:
        """Whether its programs take arrays on a mesh, even of one device."""
        return self.manifest["on_mesh"]

    def config(
        self, model: Model, smallest: EngineConfig, options: StepOptions, placement: Placement
    ) -> EngineConfig:
        """The limits with the pool that was compiled for; all else must be as it was then."""
        expected = describe(model, smallest, options, placement)
        # another device has other versions too, and is the reason to name
        for section in ("format", "device", "versions", "source", "model", "options", "on_mesh"):
            self._compare(section, expected[section])
        return replace(smallest, num_blocks=self.manifest["num_blocks"])

    def load(self, program: Program, devices: Sequence[jax.Device]) -> jax.stages.Compiled:
        """A compiled program, on the devices it is for."""
        entry = self.manifest["programs"].get(str(program.name))
        if entry is None:
            raise self._error(f"has no program {program.name}")
        if entry["shapes"] != program_shape(program):
            raise self._error(f"{program.name} was compiled for other shapes")
        content = self._content(str(program.name), entry)
        try:
            return deserialize(content, program, devices)
        except Exception as error:  # whatever jaxlib throws
            raise self._error(f"{entry['file']} cannot be loaded: {error}") from error

    def _content(self, name: str, entry: Mapping[str, str]) -> bytes:
        if Path(entry["file"]).name != entry["file"]:
            raise self._error(f"the file of {name} is outside the folder")
        try:
            content = (self.folder / entry["file"]).read_bytes()
        except OSError as error:
            raise self._error(f"{entry['file']} cannot be read: {error.strerror}") from error
        if _sha256(content) != entry["sha256"]:
            raise self._error(f"{entry['file']} is not the file of the manifest (its hash differs)")
        return content

    def _read_manifest(self) -> dict[str, Any]:
        path = self.folder / MANIFEST
        try:
            if others_may_write(self.folder):
                raise self._error("others may write to it, and its files are code; chmod go-w it")
            manifest = json.loads(path.read_bytes())
        except OSError as error:
            raise self._error(f"{MANIFEST} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            if isinstance(error, CompiledFolderError):
                raise
            raise self._error(f"{MANIFEST} is not valid JSON") from error
        if not _is_manifest(manifest):
            raise self._error(f"{MANIFEST} is not one of `jaxllm compile`")
        return manifest

    def _compare(self, section: str, expected: Any) -> None:
        found = self.manifest.get(section)
        if found == expected:
            return
        if isinstance(expected, dict) and isinstance(found, dict):
            for name, value in expected.items():
                if found.get(name) != value:
                    raise self._error(
                        f"{section}: {name} was {found.get(name)!r} and is {value!r} now"
                    )
        what = {
            "model": "it was compiled for another model",
            "source": "it was compiled by another state of jaxllm's source",
        }
        raise self._error(what.get(section, f"{section} was {found!r} and is {expected!r} now"))

    def _error(self, reason: str) -> CompiledFolderError:
        return CompiledFolderError(
            f"compiled programs in {self.folder}: {reason}; compile again with `jaxllm compile`, "
            f"or leave the folder out"
        )


def _is_manifest(manifest: Any) -> bool:
    """Whether it has the parts that are used before they are compared."""
    if not isinstance(manifest, dict) or not isinstance(manifest.get("programs"), dict):
        return False
    entries = manifest["programs"].values()
    parts = ("file", "sha256", "shapes")
    return (
        isinstance(manifest.get("on_mesh"), bool)
        and type(manifest.get("num_blocks")) is int
        and all(
            isinstance(entry, dict) and all(isinstance(entry.get(part), str) for part in parts)
            for entry in entries
        )
    )


def _versions(devices: Sequence[jax.Device]) -> dict[str, str]:
    """Of what compiles. A chip that is only described and one that is there have the same."""
    names = ["jaxllm", "jax", "jaxlib", "flax"]
    names += ["libtpu"] if devices[0].platform == "tpu" else []
    return {name: _version(name) for name in names}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:  # jaxllm, where it runs from its source
        return "none"


def _hash(text: str) -> str:
    return _sha256(text.encode())


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
