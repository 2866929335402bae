"""The hub, played by a module of our own: what is asked for, what comes back, and what a dead network says."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from qtool.errors import EnvironmentFault, InputRefused, UsageError
from qtool.quantize.inputs import dataset_text, open_model
from qtool.quantize.inputs.hub import is_hub_id


class Hub(types.ModuleType):
    """A stand-in for huggingface_hub that notes how it is called."""

    def __init__(self, folder: Path, error: Exception | None = None, files: tuple[str, ...] = ()) -> None:
        super().__init__("huggingface_hub")
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.folder, self.error, self.files = folder, error, files
        self.HfApi = lambda: types.SimpleNamespace(list_repo_files=self._list)

    def snapshot_download(self, name: str, **options: Any) -> str:
        self.calls.append((name, options))
        if self.error is not None:
            raise self.error
        return str(self.folder)

    def hf_hub_download(self, name: str, file: str, **options: Any) -> str:
        self.calls.append((f"{name}:{file}", options))
        return str(self.folder / file)

    def _list(self, name: str, **options: Any) -> list[str]:
        if self.error is not None:
            raise self.error
        return list(self.files)


@pytest.fixture
def in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.mark.usefixtures("in_empty_folder")
def test_a_model_is_asked_for_without_code_or_pickles(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tiny_folder.path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    model = open_model("owner/name@v1.0")
    assert model.digest == open_model(str(tiny_folder.path)).digest
    ((name, options),) = hub.calls
    assert name == "owner/name" and options["revision"] == "v1.0"
    assert set(options["allow_patterns"]) == {"*.safetensors", "*.json", "*.txt", "*.jinja"}


@pytest.mark.usefixtures("in_empty_folder")
def test_a_dead_network_is_an_environment_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path, ConnectionError("no route\nto host")))
    with pytest.raises(EnvironmentFault, match="download the model elsewhere and give its folder"):
        open_model("owner/name")
    with pytest.raises(EnvironmentFault, match="--text"):
        dataset_text("owner/name", "scoring")


def test_a_folder_of_that_name_wins(tiny_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_folder.path.parent.parent)
    hub = Hub(tiny_folder.path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    assert open_model(f"{tiny_folder.path.parent.name}/model").names()
    assert hub.calls == []


@pytest.mark.parametrize("spec", ["a/b/c", "a", "/a/b", "a/../b", "../a", "a/b@../c", "a b/c", "-a/b", "a/b.py\n"])
def test_what_is_no_hub_id(spec: str) -> None:
    assert not is_hub_id(spec)


FILES = ("README.md", "code.py", "raw/train-0.parquet", "raw/train.jsonl", "raw/validation.txt", "v2/test.jsonl")


@pytest.mark.parametrize(
    ("name", "split", "file"),
    [
        ("o/n", "scoring", "raw/validation.txt"),
        ("o/n/v2", "scoring", "v2/test.jsonl"),
        ("o/n/raw", "calibration", "raw/train-0.parquet"),
    ],
)
def test_the_file_of_a_split(name: str, split: Any, file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in FILES:
        (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / "raw/validation.txt").write_text("plain text")
    (tmp_path / "v2/test.jsonl").write_text('{"text": "line one"}\n\n{"text": "line two", "id": 3}\n')
    hub = Hub(tmp_path, files=FILES)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    if file.endswith(".parquet"):
        monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
        with pytest.raises(EnvironmentFault, match="pyarrow"):
            dataset_text(name, split)
    else:
        assert dataset_text(name, split) == ("plain text" if file.endswith(".txt") else "line one\nline two")
    assert hub.calls == [(f"o/n:{file}", {"repo_type": "dataset"})]


def test_a_split_without_a_file_and_rows_without_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path, files=("train.jsonl",)))
    (tmp_path / "train.jsonl").write_text(json.dumps({"label": 1}) + "\n")
    with pytest.raises(UsageError, match="scoring split"):
        dataset_text("o/n", "scoring")
    with pytest.raises(InputRefused, match="column"):
        dataset_text("o/n", "calibration")
    with pytest.raises(UsageError, match="owner/name"):
        dataset_text("o", "calibration")
