"""Artifact folders: written whole or not at all, and re-checked before use.

An output is staged in a hidden sibling folder, every file is synced, the manifest goes in last, and one rename
makes it visible. A kill at any moment leaves either nothing under the output's name or the complete artifact.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qtool.errors import EnvironmentFault, InputRefused, UsageError
from qtool.quantize.artifacts.manifest import MANIFEST, FileRecord, Kind, Manifest, hash_file, read_manifest

JOURNAL = "journal"  # the folder in a staging folder that outlives an interrupted run (see `journal`)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class Staging:
    """A folder being filled. `path` is where files go; `commit` makes it the artifact."""

    def __init__(self, path: Path, output: Path) -> None:
        self.path = path
        self.output = output
        self.manifest: Manifest | None = None

    def commit(self, manifest: Manifest) -> Manifest:
        """Record every staged file in the manifest, sync all of it, and rename the folder to its final name. A journal
        is no part of the artifact and goes last."""
        names = [name for name in _file_names(self.path) if not name.startswith(f"{JOURNAL}/")]
        records = {name: _sync_and_hash(self.path / name) for name in names}
        complete = manifest.model_copy(update={"files": records})
        write_file(self.path / MANIFEST, complete.to_bytes())
        shutil.rmtree(self.path / JOURNAL, ignore_errors=True)
        self._reveal()
        self.manifest = complete
        return complete

    def publish(self) -> None:
        """The same for a folder that is no artifact, such as a report: no manifest."""
        for name in _file_names(self.path):
            _sync_and_hash(self.path / name)
        self._reveal()

    def _reveal(self) -> None:
        _sync_folders(self.path)
        if self.output.exists():
            raise UsageError(self.output, "appeared while this command ran", "choose another output")
        os.rename(self.path, self.output)
        sync_folder(self.output.parent)


def check_output(output: Path) -> None:
    """Refuse an output that exists (exit 2) or whose parent cannot be written (exit 4), before any work is done."""
    if output.exists() or output.is_symlink():
        raise UsageError(output, "already exists and is never overwritten", "choose another output or remove it")
    parent = output.absolute().parent
    if not parent.is_dir():
        raise EnvironmentFault(parent, "is not a folder", "create it first")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise EnvironmentFault(parent, "is not writable", "choose another output")


def check_free_space(output: Path, estimate_bytes: int) -> None:
    """Refuse (exit 4) when the disk holds less than the estimate and a margin of 5 %."""
    free = shutil.disk_usage(output.absolute().parent).free
    need = int(estimate_bytes * 1.05)
    if free < need:
        raise EnvironmentFault(output, f"needs {need / 1e9:.1f} GB, {free / 1e9:.1f} GB free", "make room")


@contextmanager
def stage(output: Path, *, estimate_bytes: int = 0, keep: bool = False) -> Iterator[Staging]:
    """Stage an artifact that will be called `output`.

    The staging folder is `.NAME.partial` beside it, locked so that two runs never share it. Leaving the block
    without `commit` (an error, an interrupt) removes it, but with `keep` the journal in it stays for the next run.

    Raises:
        UsageError: the output exists.
        EnvironmentFault: no permission, no space, or another run is writing the same output.
    """
    output = output.absolute()
    check_output(output)
    check_free_space(output, estimate_bytes)
    path = output.parent / f".{output.name}.partial"
    with _translate_os_errors(output):
        descriptor = _lock(path)
        try:
            _empty(path, but=JOURNAL if keep else "")
            yield Staging(path, output)
        finally:
            if _same_folder(descriptor, path):
                _leave(path, keep)
            os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Write a whole file and sync it; a full disk is an error here, not a loss later."""
    with path.open("wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def sync_file(path: Path) -> None:
    """Sync a file that was written by other means than `write_file`."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_artifact(folder: Path, *, kind: Kind | None = None, verify: bool = True) -> Manifest:
    """Check an artifact before use and return its manifest.

    Args:
        folder: the artifact.
        kind: the kind it must be.
        verify: also re-hash every file.

    Raises:
        InputRefused: wrong kind, or a file that is missing, extra, or changed since it was written.
    """
    if not folder.is_dir():
        raise UsageError(folder, "is not a folder", "give a folder that qtool wrote")
    manifest = read_manifest(folder)
    if kind is not None and manifest.kind != kind:
        raise InputRefused(folder, f"is a {manifest.kind}, not a {kind}", f"give a {kind}")
    present = set(_file_names(folder)) - {MANIFEST}
    for name in sorted(set(manifest.files) | present):
        if name not in present:
            raise InputRefused(folder / name, "is missing", "copy or export the artifact again")
        if name not in manifest.files:
            raise InputRefused(folder / name, "is not part of this artifact", "remove it")
        if verify and hash_file(folder / name) != manifest.files[name]:
            raise InputRefused(folder / name, "changed since it was written", "copy or export the artifact again")
    return manifest


def _file_names(folder: Path) -> list[str]:
    names = []
    for root, folders, files in os.walk(folder):
        folders.sort()
        names += [str((Path(root) / name).relative_to(folder)) for name in files]
        for name in (*files, *folders):
            if (Path(root) / name).is_symlink():
                raise InputRefused(Path(root) / name, "is a symbolic link", "an artifact holds plain files only")
    return sorted(names)


def _sync_and_hash(path: Path) -> FileRecord:
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)
    sync_file(path)
    return hash_file(path)


def _sync_folders(path: Path) -> None:
    for root, _, _ in os.walk(path):
        sync_folder(Path(root))


def sync_folder(path: Path) -> None:
    """Sync a folder's own entries."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(path: Path) -> int:
    while True:
        path.mkdir(exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise EnvironmentFault(path, "another run is writing this output", "wait for it") from None
        if _same_folder(descriptor, path):
            return descriptor
        os.close(descriptor)  # a finished run renamed its folder between our mkdir and our lock


def _same_folder(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path, follow_symlinks=False)
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _leave(path: Path, keep: bool) -> None:
    if keep and (path / JOURNAL).is_dir() and any((path / JOURNAL).iterdir()):
        _empty(path, but=JOURNAL)
    else:
        shutil.rmtree(path, ignore_errors=True)


def _empty(path: Path, *, but: str = "") -> None:
    for entry in path.iterdir():
        if entry.name == but:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@contextmanager
def _translate_os_errors(output: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise EnvironmentFault(output, "the disk is full", "make room and run the same command again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise EnvironmentFault(error.filename or output, "permission denied", "choose another output") from error
        raise
