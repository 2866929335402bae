"""Leading directions of wide second moments: Lanczos finds what a whole decomposition finds, or steps aside."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.quantize.transforms import directions
from qtool.quantize.transforms.directions import (
    USUAL_RANK,
    WIDE,
    leading_directions,
    second_moment_of,
    with_fixed_signs,
)

RANK = 16


def _moment(tokens: int, *, decay: float = 0.5, massive: float = 1.0) -> Tensor:
    """Of inputs whose channels mix and whose spectrum falls with a power of the index; one token may be massive."""
    generator = torch.Generator().manual_seed(3)
    scale = torch.arange(1, WIDE + 1, dtype=torch.float64) ** -decay
    x = torch.randn(tokens, WIDE, generator=generator, dtype=torch.float64) * scale
    x[0] *= massive
    return second_moment_of(x.roll(7, dims=1) + x.flip(1))


def _channels_times(moment: Tensor, factor: float) -> Tensor:
    scale = torch.ones(WIDE, dtype=torch.float64)
    scale[:8] = factor
    return scale[:, None] * moment * scale


def _whole(moment: Tensor) -> Tensor:
    return with_fixed_signs(torch.linalg.eigh(moment).eigenvectors[:, -RANK:].flip(1))


@pytest.mark.parametrize(
    "moment",
    [_moment(4096), _moment(4096, decay=0.0), _moment(4096, massive=300.0), _channels_times(_moment(4096), 100.0)],
    ids=["falling", "flat", "massive token", "planted channels"],
)
def test_lanczos_finds_the_directions_of_a_whole_decomposition(moment: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _whole(moment)
    monkeypatch.setattr(torch.linalg, "eigh", lambda *_: pytest.fail("a whole decomposition of a wide moment"))
    found = leading_directions(moment, RANK)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.T @ found, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(found, leading_directions(moment.clone(), RANK))


@pytest.mark.parametrize(
    "moment",
    [_moment(3), _moment(USUAL_RANK - 1), torch.zeros(WIDE, WIDE).double(), torch.eye(WIDE).double()],
    ids=["3 tokens", "too few tokens", "zeros", "identity"],
)
def test_where_directions_are_not_unique_a_whole_decomposition_gives_the_same_bytes_again(moment: Tensor) -> None:
    found = leading_directions(moment, RANK)
    assert torch.equal(found, _whole(moment))
    assert torch.equal(found, leading_directions(moment.clone(), RANK))


@pytest.mark.parametrize("rank", [8, USUAL_RANK, WIDE // 8, WIDE // 8 + 1])
def test_any_rank_gives_that_many_largest_first(rank: int) -> None:
    moment = _moment(4096)
    found = leading_directions(moment, rank)
    energy = (found * (moment @ found)).sum(dim=0)
    assert found.shape == (WIDE, rank)
    torch.testing.assert_close(energy, torch.linalg.eigvalsh(moment)[-rank:].flip(0), rtol=1e-9, atol=0)


def test_a_direction_does_not_depend_on_the_rank_asked_for() -> None:
    moment = _moment(4096)
    wide = leading_directions(moment.clone(), USUAL_RANK)
    assert torch.equal(leading_directions(moment.clone(), 8), wide[:, :8])


def test_a_matrix_that_arpack_refuses_is_decomposed_whole() -> None:
    assert directions._by_lanczos(torch.zeros(WIDE, WIDE, dtype=torch.float64), RANK) is None
