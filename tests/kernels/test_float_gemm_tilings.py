"""Every product that a float kernel takes has a tile, and K is cut as far as the device has multiprocessors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qtool.kernels import fp8_gemm, w4a16_gemm, w4afp8_gemm
from qtool.kernels.float_gemm import TILE_K, choose_tiling, tilings

TABLES = {
    "fp8_gemm": (fp8_gemm.CONFIGS, ("row", "fast", "block"), (89, 90, 100)),
    "w4afp8_gemm": (w4afp8_gemm.CONFIGS, ("row", "group"), (89, 90, 100)),
    "w4a16_gemm": (w4a16_gemm.CONFIGS, ("row", *w4a16_gemm.FORMS.values(), "group"), (80, 86, 89, 90, 100)),
}
CASES = [(table, form, least) for table, forms, all_ in TABLES.values() for form in forms for least in all_]


@pytest.mark.parametrize(("configs", "form", "capability"), CASES)
def test_every_product_has_a_tile(
    monkeypatch: pytest.MonkeyPatch, configs: Path, form: str, capability: int
) -> None:
    monkeypatch.setattr(tilings, "capability_of", lambda device: capability)
    for m in (1, 16, 17, 64, 65, 4096):
        for n, k in ((4096, 4096), (28672, 8192), (7, 3)):
            tiling = choose_tiling(configs, form, torch.device("cpu"), m, n, k)
            tiles = -(-n // tiling.tile_n) * -(-m // tiling.tile_m)
            assert 1 <= tiling.parts <= max(1, -(-k // TILE_K) // 4)
            assert tiling.parts == 1 or tiles * tiling.parts <= 3 * tilings.H200_PROCESSORS


@pytest.mark.parametrize(("found", "taken"), [((8, 6), 86), ((9, 0), 90), ((10, 0), 100), ((12, 0), 89), ((12, 1), 89)])
def test_gpus_of_little_shared_memory_take_older_rows(
    monkeypatch: pytest.MonkeyPatch, found: tuple[int, int], taken: int
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    capability_of = tilings.capability_of.__wrapped__  # without its cache
    assert capability_of(torch.device("cuda")) == taken
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert capability_of(torch.device("cuda")) == 80


def test_few_tokens_fill_the_device_and_many_are_not_cut() -> None:
    cpu = torch.device("cpu")
    few = choose_tiling(w4afp8_gemm.CONFIGS, "row", cpu, 1, 4096, 4096)
    assert (few.tile_m, few.tile_n, few.parts) == (16, 128, 8)
    assert choose_tiling(w4afp8_gemm.CONFIGS, "row", cpu, 4096, 4096, 4096).parts == 1


def test_a_form_without_a_row_is_named() -> None:
    with pytest.raises(LookupError, match=r"fp8_gemm/configs\.json has no tile for group"):
        choose_tiling(fp8_gemm.CONFIGS, "group", torch.device("cpu"), 1, 128, 128)
