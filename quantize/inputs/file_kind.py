"""What a file is that is not what its name says, and what its owner should do about it."""

from __future__ import annotations

from qtool.errors import InputRefused

_DISGUISES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself", "run `git lfs pull` in its folder"),
    (b"<!doctype html", "is an HTML page, probably a failed download", "download the file again"),
    (b"<html", "is an HTML page, probably a failed download", "download the file again"),
    (b"pk\x03\x04", "is a ZIP or PyTorch archive", "convert the model to safetensors"),
    (b"\x80\x02", "is a Python pickle, which qtool never opens", "convert the model to safetensors"),
    (b"\x80\x03", "is a Python pickle, which qtool never opens", "convert the model to safetensors"),
    (b"\x80\x04", "is a Python pickle, which qtool never opens", "convert the model to safetensors"),
    (b"\x80\x05", "is a Python pickle, which qtool never opens", "convert the model to safetensors"),
    (b"\x1f\x8b", "is compressed (gzip)", "unpack it first"),
    (b"\x28\xb5\x2f\xfd", "is compressed (zstd)", "unpack it first"),
    (b"\x89hdf\r\n", "is an HDF5 file", "convert the model to safetensors"),
)


def refuse_disguise(label: str, head: bytes) -> None:
    """Refuse a file whose first bytes say that it is something else.

    Args:
        label: how the message names it.
        head: its first bytes; 512 are enough.

    Raises:
        InputRefused: with the remedy that fits.
    """
    if not head:
        raise InputRefused(label, "is empty", "download the file again")
    start = head.lstrip().lower() if head.lstrip()[:1] == b"<" else head.lower()
    # A safetensors header may begin with these bytes by chance: its eighth byte is then 0, text has no 0 there.
    if len(head) > 8 and head[7] == 0 and head[8:9] == b"{":
        return
    for magic, why, remedy in _DISGUISES:
        if start.startswith(magic):
            raise InputRefused(label, why, remedy)
