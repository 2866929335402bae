"""Site transforms: the float product stays what it was, second moments follow, directions do what they are for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qtool.errors import InputRefused
from qtool.kernels.hadamard import hadamard_plan
from qtool.quantize.transforms import in_rows
from qtool.quantize.transforms.block_hadamard import BlockHadamard, block_for
from qtool.quantize.transforms.directions import leading_directions, second_moment_of
from qtool.quantize.transforms.divide_channels import DivideChannels
from qtool.quantize.transforms.quad import quad, widen_residual
from qtool.quantize.transforms.site_transform import SiteTransform
from qtool.quantize.transforms.table import SITE_TRANSFORMS, site_transform_from

WIDTH = 192


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _inputs(width: int = WIDTH) -> Tensor:
    """[2, 50, width]: a few loud channels and one massive token."""
    x = _random(2, 50, width)
    x[..., :5] *= 30
    x[0, 0] *= 500
    return x


MAKERS: dict[str, Callable[[int], SiteTransform]] = {
    "block": lambda k: BlockHadamard.random(k, seed=1, stream="site"),
    "whole": lambda k: BlockHadamard.random(k, seed=1, stream="site", block=hadamard_plan(k).block),
    "quad": lambda k: quad(second_moment_of(_inputs(k)), 8, seed=1, stream="site"),
    "quad of normalised rows": lambda k: quad(second_moment_of(_inputs(k), normalised=True), 8, seed=1, stream="site"),
    "divide": lambda k: DivideChannels(factors=_random(k, seed=3).abs() + 0.1),
}


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("width", [192, 96, 80])
def test_the_float_product_stays_what_it_was(name: str, width: int) -> None:
    transform = MAKERS[name](width)
    x, weight = _inputs(width).double(), _random(40, width, seed=5)
    main, side = transform.input(x.float())
    main_weight, side_weight = transform.weight(weight)
    assert main.shape[-1] == main_weight.shape[-1] == transform.main_width
    y = main.double() @ main_weight.double().T
    if side is not None and side_weight is not None:
        assert side.shape[-1] == side_weight.shape[-1] == transform.side_width
        y = y + side.double() @ side_weight.double().T
    expected = x @ weight.double().T
    # Row by row: a massive token must not hide the others' errors.
    assert float(((y - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < 2e-6
    assert (side is None) == (side_weight is None) == (transform.side_width == 0)


@pytest.mark.parametrize("name", MAKERS)
def test_second_moments_follow_without_new_data(name: str) -> None:
    transform, x = MAKERS[name](WIDTH), _inputs()
    found = transform.second_moment(second_moment_of(x))
    expected = second_moment_of(transform.input(x)[0])
    assert float((found - expected).norm() / expected.norm()) < 1e-4  # what float32 inputs leave of a massive token
    assert found.dtype == torch.float64


@pytest.mark.parametrize("name", MAKERS)
def test_second_moments_may_be_transformed_in_their_place(name: str) -> None:
    transform, given = MAKERS[name](WIDTH), second_moment_of(_inputs())
    kept, taken = given.clone(), given.clone()
    found = transform.second_moment(kept)
    assert torch.equal(kept, given)
    in_place = transform.second_moment(taken, inplace=True)
    assert in_place.data_ptr() == taken.data_ptr()
    assert torch.equal(in_place, found)


@pytest.mark.parametrize("pieces", [7, WIDTH, 40 * WIDTH])
def test_large_matrices_in_pieces_are_what_they_are_in_one(pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    transform, x, weight = MAKERS["quad"](WIDTH), _inputs(), _random(50, WIDTH, seed=5)
    moment, whole = transform.second_moment(second_moment_of(x)), transform.weight(weight)
    monkeypatch.setattr(in_rows, "ELEMENTS", pieces)
    torch.testing.assert_close(transform.second_moment(second_moment_of(x)), moment, rtol=1e-9, atol=1e-9)
    assert torch.equal(moment, moment.T) or float((moment - moment.T).abs().max()) < 1e-9 * float(moment.abs().max())
    for found, expected in zip(transform.weight(weight), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", MAKERS)
def test_stored_and_read_back_it_is_the_same_function(name: str) -> None:
    transform, x = MAKERS[name](WIDTH), _inputs()
    again = site_transform_from(transform.header(), transform.to_tensors())
    assert torch.equal(again.input(x)[0], transform.input(x)[0])
    assert type(again) is SITE_TRANSFORMS[transform.header()["kind"]]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputRefused, match="unknown"):
        site_transform_from({"kind": "quat"}, {})


def test_quad_takes_the_loud_channels_out() -> None:
    x = _random(400, WIDTH)
    x[:, :5] *= 30
    main, side = quad(second_moment_of(x), 8, seed=0, stream="s").input(x)
    assert side is not None
    assert float(main.square().sum()) < 1.02 * float(x[:, 5:].square().sum())
    assert float(main.abs().amax(dim=-1).max()) < 6


def test_a_massive_token_owns_a_direction_unless_rows_are_normalised() -> None:
    x = _random(400, WIDTH)
    x[:, :3] *= 5
    x[0] = 0
    x[0, 100] = 1e4
    plain = leading_directions(second_moment_of(x), 1)
    normalised = leading_directions(second_moment_of(x, normalised=True), 3)
    assert float(plain[100, 0].abs()) > 0.99
    assert float(normalised[:3].norm() ** 2) > 2.8


def test_directions_are_orthonormal_ordered_and_signed() -> None:
    moment = second_moment_of(_inputs())
    p = leading_directions(moment, 16)
    torch.testing.assert_close(p.T @ p, torch.eye(16, dtype=torch.float64))
    energy = (p * (moment @ p)).sum(dim=0)
    assert torch.equal(energy.sort(descending=True).values, energy)
    assert bool((p.gather(0, p.abs().argmax(dim=0, keepdim=True)) > 0).all())
    assert torch.equal(p, leading_directions(moment, 16))


@pytest.mark.parametrize("rank", [0, WIDTH + 1])
def test_ranks_that_do_not_fit_are_refused(rank: int) -> None:
    with pytest.raises(InputRefused, match="not between 1 and the width"):
        quad(second_moment_of(_inputs()), rank, seed=0, stream="s")


def test_a_second_moment_that_is_not_finite_is_refused() -> None:
    moment = second_moment_of(_inputs())
    moment[0, 0] = float("nan")
    with pytest.raises(InputRefused, match="not finite"):
        leading_directions(moment, 4)


def test_blocks_are_the_widest_that_divide() -> None:
    assert [block_for(k) for k in (576, 1536, 96, 80)] == [64, 64, 32, 16]
    with pytest.raises(InputRefused, match="does not divide by 16"):
        block_for(100)


def test_sites_with_one_seed_have_different_signs() -> None:
    a, b = (BlockHadamard.random(WIDTH, seed=0, stream=s).signs for s in ("a", "b"))
    assert not torch.equal(a, b)


def _norm(h: Tensor, width: int) -> Tensor:
    """RMSNorm without a gain; `width` is what the mean square divides by."""
    return h / (h.square().sum(dim=-1, keepdim=True) / width + 1e-5).sqrt()


def _two_layers(h: Tensor, layers: list[tuple[Tensor, Tensor]], head: Tensor, width: int) -> Tensor:
    for reader, writer in layers:
        h = h + torch.tanh(_norm(h, width) @ reader.T) @ writer.T
    return _norm(h, width) @ head.T


def test_the_published_form_is_exact_on_two_layers() -> None:
    d, r, f = 64, 8, 96
    tokens = torch.arange(30).reshape(2, 15)
    embedding, head = _random(30, d, seed=1), _random(30, d, seed=2)
    layers = [(_random(f, d, seed=i), _random(d, f, seed=i + 10)) for i in (3, 4)]
    wide = widen_residual(second_moment_of(embedding), r, seed=0)
    assert wide.q.shape == (d, r + d)
    torch.testing.assert_close(wide.q @ wide.q.T, torch.eye(d))
    widened = [(wide.reader(a), wide.writer(b)) for a, b in layers]
    assert widened[0][0].shape == (f, r + d)
    assert widened[0][1].shape == (r + d, f)
    expected = _two_layers(embedding[tokens], layers, head, d)
    found = _two_layers(wide.rows(embedding)[tokens], widened, wide.reader(head), d)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    wrong = _two_layers(wide.rows(embedding)[tokens], widened, wide.reader(head), r + d)
    assert float((wrong - expected).abs().max()) > 1e-2
    # The first r columns hold the leading directions' share of every token.
    h = _random(1, 15, d, seed=9)
    p = leading_directions(second_moment_of(embedding), r).float()
    torch.testing.assert_close(wide.rows(h)[..., :r].norm(dim=-1), (h @ p).norm(dim=-1))
    torch.testing.assert_close(wide.writer_bias(h[0, 0]), wide.rows(h)[0, 0])


def test_the_published_form_wants_a_power_of_two() -> None:
    with pytest.raises(InputRefused, match="power of two"):
        widen_residual(second_moment_of(_inputs()), 12, seed=0)
