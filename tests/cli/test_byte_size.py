"""Numbers of bytes on the command line."""

from __future__ import annotations

import pytest

from qtool.cli.byte_size import ByteSize
from qtool.errors import UsageError


@pytest.mark.parametrize(
    ("text", "count"),
    [("80MB", 80_000_000), ("1.5 gb", 1_500_000_000), ("64MiB", 64 * 2**20), ("512", 512), ("2kb", 2000), (7, 7)],
)
def test_sizes(text: str | int, count: int) -> None:
    assert ByteSize().convert(text, None, None) == count


@pytest.mark.parametrize("text", ["", "MB", "-1MB", "1MBB", "1,5GB", "ten"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="no number of bytes"):
        ByteSize().convert(text, None, None)
