"""A model's configuration without its weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from jaxllm.config import ModelError
from jaxllm.loading.read_config import read_model_config

QWEN = Path(__file__).parents[2] / "configs" / "models" / "qwen3-32b.json"


def test_a_file_and_a_folder_without_weights(tmp_path: Path) -> None:
    shutil.copy(QWEN, tmp_path / "config.json")
    found = read_model_config(str(QWEN))
    assert (found.num_layers, found.num_kv_heads, found.qk_norm) == (64, 8, True)
    assert read_model_config(str(tmp_path)) == found
    assert read_model_config(str(tmp_path / "config.json")) == found


def test_of_the_hub_only_the_configuration_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def download(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    shutil.copy(QWEN, tmp_path / "config.json")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert read_model_config("Qwen/Qwen3-32B", revision="main").num_layers == 64
    assert asked["name"] == "Qwen/Qwen3-32B"
    assert asked["revision"] == "main"
    assert asked["allow_patterns"] == ["config.json", "generation_config.json"]


@pytest.mark.parametrize("name", ["", "nowhere.json", "no such model"])
def test_a_name_of_nothing(name: str) -> None:
    with pytest.raises(ModelError, match="no model"):
        read_model_config(name)


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ModelError, match=r"x.json"):
        read_model_config(str(tmp_path / "x.json"))
