"""Opening what the user points at: regular files only, never blocking on a pipe, never through a strange link."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from qtool.errors import EnvironmentFault, InputRefused
from qtool.quantize.inputs.file_kind import refuse_disguise

PIECE_BYTES = 64 * 2**20
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class RegularFile:
    """A file as it was when it was checked; reading it later makes sure that it is still the same one.

    Attributes:
        path: where it really lies, links resolved.
        label: how messages name it.
        size: bytes.
        identity: device, inode, size and modification time, compared at every read, stored nowhere.
    """

    path: Path
    label: str
    size: int
    identity: tuple[int, int, int, int]

    def read(self, start: int = 0, count: int | None = None) -> Bytes:
        """`count` bytes from `start` (all by default), in a fresh array that the caller owns.

        Raises:
            InputRefused: when the file changed since it was opened.
        """
        out = np.empty(self.size - start if count is None else count, dtype=np.uint8)
        self.read_into(out, start)
        return out

    def read_into(self, out: Bytes, start: int) -> None:
        """Fill `out` with the bytes from `start` on; see `read`."""
        descriptor = self._open_again()
        try:
            view, done = out.data, 0
            while done < len(out):
                got = os.preadv(descriptor, [view[done : done + PIECE_BYTES]], start + done)
                if got == 0:
                    raise self._changed()
                done += got
        finally:
            os.close(descriptor)

    def _open_again(self) -> int:
        descriptor = _open(self.path, self.label)
        if _identity(os.fstat(descriptor)) != self.identity:
            os.close(descriptor)
            raise self._changed()
        return descriptor

    def _changed(self) -> InputRefused:
        return InputRefused(self.label, "changed while it was being read", "leave it alone and run again")


def open_regular(path: Path, label: str | None = None) -> RegularFile:
    """Check that a path the user typed is a regular file. Links are followed: the user may type anything.

    Raises:
        InputRefused: it is missing, a pipe, a device, a folder, or a loop of links.
        EnvironmentFault: no permission.
    """
    label = label or str(path)
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise _cannot_open(label, error) from None
    descriptor = _open(real, label)
    try:
        status = os.fstat(descriptor)
    finally:
        os.close(descriptor)
    return RegularFile(real, label, status.st_size, _identity(status))


def open_member(folder: Path, name: str) -> RegularFile:
    """Check a file that belongs to a model's folder.

    A symbolic link may stay inside the folder, or lead from a hub cache's `snapshots/<revision>/` to the same
    model's `blobs/`; any other target could be someone else's file.

    Args:
        folder: the model's folder, links resolved.
        name: a plain file name.

    Raises:
        InputRefused: as `open_regular`, and for a link that leads elsewhere.
    """
    label = str(folder / name)
    file = open_regular(folder / name, label)
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parent.parent / "blobs")
    if not any(file.path.is_relative_to(place) for place in allowed):
        raise InputRefused(label, "is a symbolic link that leads out of the model's folder", "copy the file there")
    return file


def read_small(file: RegularFile, limit_bytes: int) -> bytes:
    """The whole file; refused before reading when it is larger than such a file can sensibly be, or in disguise."""
    if file.size > limit_bytes:
        why = f"has {file.size} bytes, more than the {limit_bytes} that such a file may have"
        raise InputRefused(file.label, why, "check the file")
    data = file.read().tobytes()
    refuse_disguise(file.label, data[:512])
    return data


def _open(path: Path, label: str) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise _cannot_open(label, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputRefused(label, "is not a regular file", "give a plain file")
    return descriptor


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _cannot_open(label: str, error: Exception) -> InputRefused | EnvironmentFault:
    code = getattr(error, "errno", None)
    if code in (errno.EACCES, errno.EPERM):
        return EnvironmentFault(label, "permission denied", "make it readable")
    if code in (errno.ENOENT, errno.ENOTDIR):
        return InputRefused(label, "does not exist", "check the path, or download the file again")
    if code == errno.ELOOP or isinstance(error, RuntimeError):
        return InputRefused(label, "is a loop of symbolic links", "copy the file there")
    return InputRefused(label, f"cannot be opened ({error})", "give a plain file")
