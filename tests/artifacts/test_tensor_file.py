"""Safetensors files written piece by piece are the files that safetensors writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qtool.quantize.artifacts.tensor_file import DTYPE_NAMES, Streamed, row_pieces, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for index, dtype in enumerate(DTYPE_NAMES):
        for name in (f"b.{index}", f"a.{index}.é"):
            values = torch.randint(0, 100, (3 + index, 5), generator=generator)
            found[name] = values.to(torch.float32).to(dtype)
    return {**found, "scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "row": torch.arange(3.0)}


def test_the_bytes_are_those_of_safetensors(tmp_path: Path) -> None:
    write_tensors(tensors(), tmp_path / "ours")
    save_file(tensors(), tmp_path / "theirs")
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("rows", [1, 2, 100])
def test_pieces_make_the_same_file(tmp_path: Path, rows: int) -> None:
    streamed = {
        name: Streamed(dtype=t.dtype, shape=tuple(t.shape), pieces=lambda t=t: t.split(rows))
        for name, t in tensors().items()
        if t.dim() == 2 and t.numel()
    }
    write_tensors({**tensors(), **streamed}, tmp_path / "pieces")
    write_tensors(tensors(), tmp_path / "whole")
    assert (tmp_path / "pieces").read_bytes() == (tmp_path / "whole").read_bytes()
    assert load_file(tmp_path / "pieces")["b.0"].shape == (3, 5)


def test_pieces_that_are_not_the_whole_are_refused(tmp_path: Path) -> None:
    short = Streamed(dtype=torch.float32, shape=(4, 2), pieces=lambda: [torch.zeros(3, 2)])
    with pytest.raises(AssertionError):
        write_tensors({"a": short}, tmp_path / "short")


def test_rows_in_pieces() -> None:
    assert list(row_pieces((7, 4), large=28)) == [slice(0, 7)]
    assert list(row_pieces((7, 4), large=27, piece=13)) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert list(row_pieces((2, 4), large=1, piece=1)) == [slice(0, 1), slice(1, 2)]
    assert list(row_pieces((5,), large=4, piece=2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]
