"""What a long command has finished, kept beside its output until that is committed, so that a rerun continues.

A step's files are written and synced under new names before the journal lists them with their sha256, and files that
are no longer needed are removed after it: a kill at any moment leaves a journal whose files are all there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qtool.errors import UsageError
from qtool.quantize.artifacts.manifest import hash_file
from qtool.quantize.artifacts.store import JOURNAL, sync_file, sync_folder, write_file

LIST = "journal.json"


class Journal:
    """The finished steps of one run.

    Args:
        staging: the folder that becomes the output (`store.stage` with keep=True).
        fingerprint: everything that decides the result, as one hash.
        restart: drop what another run left.

    Attributes:
        folder: where its files lie; what is not listed there when a run begins is removed.
        steps: what `append` was told about each finished step.
        note: what a user should know about what was found; empty when nothing was.

    Raises:
        UsageError: the folder holds the work of a run with another fingerprint.
    """

    def __init__(self, staging: Path, fingerprint: str, *, restart: bool = False) -> None:
        self.folder = staging / JOURNAL
        self._fingerprint = fingerprint
        self.steps: list[Any] = []
        self.note = ""
        self._files: dict[str, str] = {}
        if restart:
            shutil.rmtree(self.folder, ignore_errors=True)
        if (self.folder / LIST).is_file():
            self._read()
        self.folder.mkdir(exist_ok=True)
        self._drop({entry.name for entry in self.folder.iterdir()} - {LIST, *self._files})

    def append(
        self, step: Any, files: Mapping[str, bytes], *, written: Sequence[str] = (), drop: Sequence[str] = ()
    ) -> None:
        """Record a finished step.

        Args:
            step: anything that JSON holds.
            files: new names to contents.
            written: new names that the caller has already written into `folder`, for contents too large to hold.
            drop: names of earlier files that are no longer needed.
        """
        for name, data in files.items():
            write_file(self.folder / name, data)
        for name in written:
            sync_file(self.folder / name)
        for name in (*files, *written):
            self._files[name] = hash_file(self.folder / name).sha256
        for name in drop:
            del self._files[name]
        self.steps.append(step)
        content = {"fingerprint": self._fingerprint, "steps": self.steps, "files": self._files}
        write_file(self.folder / f"{LIST}.new", json.dumps(content).encode())
        (self.folder / f"{LIST}.new").replace(self.folder / LIST)
        sync_folder(self.folder)
        self._drop(drop)

    def read(self, name: str) -> bytes:
        """A file of a finished step."""
        return (self.folder / name).read_bytes()

    def release(self, names: Sequence[str]) -> None:
        """Give files of finished steps to the output. The journal keeps them too, until the output is committed, where
        the file system can have one file in two folders."""
        for name in names:
            try:
                os.link(self.folder / name, self.folder.parent / name)
            except OSError:
                os.rename(self.folder / name, self.folder.parent / name)

    def close(self) -> None:
        """Remove the journal: the output is complete."""
        shutil.rmtree(self.folder)

    def _read(self) -> None:
        try:
            content = json.loads((self.folder / LIST).read_bytes())
            fingerprint, steps, files = content["fingerprint"], list(content["steps"]), dict(content["files"])
        except (ValueError, KeyError, TypeError):
            self.note = "the work of an interrupted run cannot be read and was dropped"
            return
        if fingerprint != self._fingerprint:
            why = "holds the work of an interrupted run with another model, text or option"
            raise UsageError(self.folder.parent, why, "repeat that command, or discard its work with --restart")
        for name, sha256 in files.items():
            path = self.folder / name
            if not path.is_file() or path.is_symlink() or hash_file(path).sha256 != sha256:
                self.note = "the work of an interrupted run is damaged and was dropped"
                return
        self.steps, self._files = steps, files

    def _drop(self, names: Sequence[str] | set[str]) -> None:
        for name in names:
            (self.folder / name).unlink()

