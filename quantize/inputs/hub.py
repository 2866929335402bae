"""Models and texts from the hub: weights as safetensors, and plain text. Code and pickles are never asked for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from qtool.errors import EnvironmentFault, InputRefused, UsageError

MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.jinja")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,95}(@[\w./-]{1,100})?", re.ASCII)
_DATASET = re.compile(r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,95})(/(?P<folder>[\w./-]{1,200}))?", re.ASCII)
_SPLIT_WORDS = {"calibration": ("train",), "scoring": ("validation", "valid", "test")}
_TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")


def is_hub_id(spec: str) -> bool:
    """True for `owner/name` and `owner/name@revision`."""
    return _HUB_ID.fullmatch(spec) is not None and ".." not in spec


def fetch_model(spec: str) -> Path:
    """Download a model's weights and text files, or find them in the hub's cache, and return their folder.

    Raises:
        EnvironmentFault: the hub cannot be reached, or does not give this model out.
    """
    name, _, revision = spec.partition("@")
    with _hub_errors(spec, "download the model elsewhere and give its folder"):
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(MODEL_FILES)))


def fetch_dataset_file(name: str, split: Literal["calibration", "scoring"]) -> Path:
    """Download one text file of a data set.

    Args:
        name: `owner/name` or `owner/name/folder` (a configuration's folder).
        split: "calibration" takes the first file of the train split, "scoring" of the validation or test split.

    Raises:
        UsageError: no such form of name, or no text file for that split.
        EnvironmentFault: the hub cannot be reached.
    """
    match = _DATASET.fullmatch(name)
    if match is None or ".." in name:
        raise UsageError(f"--dataset {name}", "is not owner/name or owner/name/folder", "check the name")
    with _hub_errors(name, "download the text elsewhere and give it with --text"):
        from huggingface_hub import HfApi, hf_hub_download

        files = sorted(HfApi().list_repo_files(match["id"], repo_type="dataset"))
        chosen = _choose(files, match["folder"] or "", split)
        if chosen is None:
            why = f"has no {', '.join(_TEXT_SUFFIXES)} file for the {split} split"
            raise UsageError(f"--dataset {name}", why, "name a folder of it, or give a file with --text")
        return Path(hf_hub_download(match["id"], chosen, repo_type="dataset"))


def _choose(files: list[str], folder: str, split: Literal["calibration", "scoring"]) -> str | None:
    here = [file for file in files if file.startswith(f"{folder}/" if folder else "")]
    texts = [file for file in here if file.endswith(_TEXT_SUFFIXES)]
    for word in _SPLIT_WORDS[split]:
        for file in texts:
            if word in file.rsplit("/", 1)[-1]:
                return file
    return None


@contextmanager
def _hub_errors(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except (UsageError, InputRefused):
        raise
    except ImportError:
        raise EnvironmentFault(what, "huggingface_hub is not installed", "pip install huggingface_hub") from None
    except Exception as error:  # the library raises its own, requests' and httpx's errors
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise EnvironmentFault(what, f"cannot be fetched from the hub ({reason[0]:.120})", remedy) from None
