"""What a long command has finished, kept beside its output until that is committed, so that a rerun continues.

A step's files are written and synced under new names before the journal lists them with their sha256, and files that
are no longer needed are removed after it: a kill at any moment leaves a journal whose files are all there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtool.errors import UsageError
from qtool.quantize.artifacts.manifest import hash_file
from qtool.quantize.artifacts.store import JOURNAL, sync_folder, write_file

LIST = "journal.json"


class Journal:
    """The finished steps of one run.

    Args:
        staging: the folder that becomes the output (`store.stage` with keep=True).
        fingerprint: everything that decides the result, as one hash.
        restart: drop what another run left.

    Attributes:
        steps: what `append` was told about each finished step.
        note: what a user should know about what was found; empty when nothing was.

    Raises:
        UsageError: the folder holds the work of a run with another fingerprint.
    """

    def __init__(self, staging: Path, fingerprint: str, *, restart: bool = False) -> None:
        self._folder = staging / JOURNAL
        self._fingerprint = fingerprint
        self.steps: list[Any] = []
        self.note = ""
        self._files: dict[str, str] = {}
        if restart:
            shutil.rmtree(self._folder, ignore_errors=True)
        if (self._folder / LIST).is_file():
            self._read()
        self._folder.mkdir(exist_ok=True)
        self._drop({entry.name for entry in self._folder.iterdir()} - {LIST, *self._files})

    def append(self, step: Any, files: Mapping[str, bytes], *, drop: Sequence[str] = ()) -> None:
        """Record a finished step.

        Args:
            step: anything that JSON holds.
            files: new names to contents.
            drop: names of earlier files that are no longer needed.
        """
        for name, data in files.items():
            write_file(self._folder / name, data)
            self._files[name] = hash_file(self._folder / name).sha256
        for name in drop:
            del self._files[name]
        self.steps.append(step)
        content = {"fingerprint": self._fingerprint, "steps": self.steps, "files": self._files}
        write_file(self._folder / f"{LIST}.new", json.dumps(content).encode())
        (self._folder / f"{LIST}.new").replace(self._folder / LIST)
        sync_folder(self._folder)
        self._drop(drop)

    def read(self, name: str) -> bytes:
        """A file of a finished step."""
        return (self._folder / name).read_bytes()

    def close(self) -> None:
        """Remove the journal: the output is complete."""
        shutil.rmtree(self._folder)

    def _read(self) -> None:
        try:
            content = json.loads((self._folder / LIST).read_bytes())
            fingerprint, steps, files = content["fingerprint"], list(content["steps"]), dict(content["files"])
        except (ValueError, KeyError, TypeError):
            self.note = "the work of an interrupted run cannot be read and was dropped"
            return
        if fingerprint != self._fingerprint:
            why = "holds the work of an interrupted run with another model, text or option"
            raise UsageError(self._folder.parent, why, "repeat that command, or discard its work with --restart")
        for name, sha256 in files.items():
            path = self._folder / name
            if not path.is_file() or path.is_symlink() or hash_file(path).sha256 != sha256:
                self.note = "the work of an interrupted run is damaged and was dropped"
                return
        self.steps, self._files = steps, files

    def _drop(self, names: Sequence[str] | set[str]) -> None:
        for name in names:
            (self._folder / name).unlink()

