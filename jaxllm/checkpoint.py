"""A model's files, opened: its configuration, its tensors, its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.config import ModelConfig
from jaxllm.loading.config_json import generation_defaults, model_config_from_hf
from jaxllm.loading.gguf_source import GGUFFile
from jaxllm.loading.hub import find_model
from jaxllm.loading.load import check_num_layers, load_parameters, plan_leaves
from jaxllm.loading.safetensors_source import SafetensorsSource
from jaxllm.loading.source import TensorSource
from jaxllm.models.decoder import Model
from jaxllm.runtime.sharding import Placement
from jaxllm.text.tokenizer import Tokenizer, load_tokenizer_from_folder, load_tokenizer_from_gguf


@dataclass(frozen=True)
class Checkpoint:
    """An opened model, its weights not yet read."""

    config: ModelConfig
    source: TensorSource
    folder: Path | None
    gguf: GGUFFile | None

    @classmethod
    def open(cls, model_name: str, revision: str | None, cache_dir: Path) -> Checkpoint:
        """Finds a model's files, see `find_model`. Raises ModelError if they cannot be used."""
        files = find_model(model_name, revision=revision, cache_dir=cache_dir)
        if files.gguf is not None:
            gguf = GGUFFile(files.gguf)
            checkpoint = cls(gguf.config(), gguf.source(), None, gguf)
        else:
            folder = files.folder
            assert folder is not None
            config = model_config_from_hf(folder)
            checkpoint = cls(config, SafetensorsSource(folder), folder, None)
        check_num_layers(checkpoint.config, checkpoint.source)
        return checkpoint

    def check(self, model: Model) -> None:
        """Raises ModelError unless the files have all of the model's parameters."""
        plan_leaves(self.config, model.abstract_parameters(), self.source)

    def load(self, model: Model, placement: Placement) -> dict[str, Any]:
        """The model's parameters, on the devices."""

        def put(array: np.ndarray, path: tuple[Any, ...]) -> Any:
            return placement.put(model.stored(array, path), path[-1])

        return load_parameters(self.config, model.abstract_parameters(), self.source, put=put)

    def tokenizer(self, other: str | Path | None = None) -> Tokenizer:
        """The model's tokenizer, or that of another folder or file. Raises ModelError if there is
        none."""
        if other is not None:
            if Path(other).suffix == ".gguf":
                return load_tokenizer_from_gguf(GGUFFile(Path(other)).metadata)
            return load_tokenizer_from_folder(Path(other))
        if self.gguf is not None:
            return load_tokenizer_from_gguf(self.gguf.metadata)
        assert self.folder is not None
        return load_tokenizer_from_folder(self.folder)

    def default_sampling(self) -> dict[str, Any]:
        """What the model's makers recommend."""
        return {} if self.folder is None else generation_defaults(self.folder)
