"""Texts are read strictly: exit code 2 for a path, 3 for a content, with the byte and line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qtool.errors import QtoolError
from qtool.quantize.inputs import read_text

CONTENTS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "blank": (b" \n\t\r\n", "blank"),
    "latin-1": (b"good\nbad \xe9\n", "byte 9, line 2"),
    "latin-1 after a mark": (b"\xef\xbb\xbfgood\nbad \xe9\n", "byte 12, line 2"),
    "cut in a character": ("good é".encode()[:-1], "not UTF-8"),
    "UTF-16": ("text".encode("utf-16"), "UTF-16"),
    "zero byte": (b"a\nb\0c", "zero byte at 3, line 2"),
    "gzip": (b"\x1f\x8b\x08aaaa", "compressed"),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_refused_contents(name: str, tmp_path: Path) -> None:
    data, words = CONTENTS[name]
    (tmp_path / "t.txt").write_bytes(data)
    with pytest.raises(QtoolError, match=words) as caught:
        read_text(tmp_path / "t.txt")
    assert caught.value.exit_code == 3


def test_refused_paths(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / "missing", tmp_path, tmp_path / "pipe", tmp_path / "loop", Path("/dev/zero")):
        with pytest.raises(QtoolError) as caught:
            read_text(path)
        assert caught.value.exit_code == 2


def test_text_comes_back_as_it_is(tmp_path: Path) -> None:
    text = "one\r\ntwo é\u2028 three\n"
    (tmp_path / "t").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_text(tmp_path / "t") == text
