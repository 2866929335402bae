"""What the integer products share beside kernels: tilings, operands, second-level scales."""

from __future__ import annotations

import pytest
import torch

from qtool.kernels.integer_gemm import second_level_scales, tilings
from qtool.kernels.integer_gemm.operands import checked
from qtool.kernels.integer_gemm.reference import exact_product
from qtool.kernels.pack import HalvesInt4, pack_int4

OPS = ("w4a8_gemm", "w8a8_gemm", "w4a4_gemm")
TARGETS = ("sm_80", "sm_89", "sm_90", "gfx942")


@pytest.mark.parametrize("op", OPS)
def test_every_target_form_and_batch_has_a_tiling(op: str) -> None:
    forms = ("channel",) if op == "w8a8_gemm" else ("channel", "integer", "float")
    for target in TARGETS:
        for form in forms:
            fitting = [
                tilings.row_for(op, target, form, (m, 4096, 4096))
                for m in (1, 16, 17, 64, 65, 5000)
            ]
            assert [row["block_m"] for row in fitting] == [16, 16, 32, 64, 128, 128]


@pytest.mark.parametrize(
    ("shape", "split"),
    [((16, 4096, 4096), 8), ((16, 4096, 14336), 8), ((9, 28672, 8192), 1), ((4096, 4096, 4096), 1), ((1, 128, 256), 1)],
)
def test_few_tiles_share_their_k_among_blocks_and_none_is_left_empty(
    shape: tuple[int, int, int], split: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tilings, "_multiprocessors", lambda device: 132)
    m, n, k = shape
    x, w = torch.empty((m, k), dtype=torch.int8), torch.empty((n, k), dtype=torch.int8)
    operands = checked(x, torch.ones(1), w, torch.ones(1), bias=None)
    tiling = tilings.choose_tiling("w8a8_gemm", operands, torch.device("cpu"))
    k_tiles = -(-k // 128)
    assert tiling.split_k == split
    assert -(-k_tiles // tiling.split_k) * (tiling.split_k - 1) < k_tiles


def test_second_level_scales_are_exact() -> None:
    integers = torch.tensor([[16, 1, 7], [1, 1, 1]], dtype=torch.uint8)
    rows = torch.tensor([0.5, 0.3])
    found = second_level_scales(integers * rows[:, None])
    assert found is not None and torch.equal(found[0], rows) and torch.equal(found[1], integers)


@pytest.mark.parametrize("row", [[1.0, 17.0], [1.0, 1.5], [1.0, 0.0], [0.0, 0.0], [1.0, torch.nan], [1.0, torch.inf]])
def test_other_scales_are_left_as_floats(row: list[float]) -> None:
    assert second_level_scales(torch.tensor([[1.0, 2.0], row])) is None


def test_an_exact_product_is_exact_beyond_24_bits() -> None:
    torch.manual_seed(0)
    x, w = torch.randint(-128, 128, (3, 5000)), torch.randint(-240, 241, (4, 5000))
    x[0], w[0] = -128, -240
    assert torch.equal(exact_product(x.to(torch.int8), w.to(torch.int16)), x @ w.T)


def test_sums_of_codes_are_found_where_they_are_read() -> None:
    torch.manual_seed(0)
    x, one = torch.randint(-8, 8, (3, 200), dtype=torch.int8), torch.ones(1)
    w = HalvesInt4.from_canonical(pack_int4(torch.zeros((5, 200), dtype=torch.uint8)), 200)
    for codes in (x, HalvesInt4.from_canonical(pack_int4((x + 8).to(torch.uint8)), 200)):
        found = checked(codes, one, w, one, bias=None, zero_point=torch.zeros(5, dtype=torch.uint8)).x_sums
        assert found is not None and torch.equal(found, x.sum(dim=1, dtype=torch.int32))
        zero = torch.zeros((5, 4), dtype=torch.uint8)
        assert checked(codes, one, w, one, bias=None, zero_point=zero, w_group_size=64).x_sums is None


def test_operands_know_what_changes_along_k() -> None:
    x, one = torch.zeros((3, 200), dtype=torch.int8), torch.ones(1)
    w = HalvesInt4.from_canonical(pack_int4(torch.zeros((5, 200), dtype=torch.uint8)), 200)
    groups = {"w_group_scale": torch.ones((5, 4), dtype=torch.uint8), "w_group_size": 64}
    assert checked(x, one, w, one, bias=None).form == "channel"
    assert checked(x, one, w, one, bias=None, **groups).form == "integer"
    assert checked(x, one, w, torch.ones(5, 4), bias=None, w_group_size=64).form == "float"
    assert checked(x, torch.ones(3, 2), w, one, bias=None, x_group_size=128).form == "float"
    zero = torch.zeros((5, 4), dtype=torch.uint8)
    assert checked(x, one, w, one, bias=None, zero_point=zero, w_group_size=64).form == "integer"
    with pytest.raises(ValueError, match="x_sums"):
        checked(x, one, w, one, bias=None, zero_point=zero[:, 0], x_sums=torch.zeros(4, dtype=torch.int32))
    long = torch.zeros((1, 131072), dtype=torch.int8)
    assert "131072 columns" in checked(long, one, long, one, bias=None).unsupported
    assert "96 columns" in checked(x, one, w, torch.ones(5, 3), bias=None, w_group_size=96).unsupported
