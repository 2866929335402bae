"""What counts as better on held-out text."""

from __future__ import annotations

import pytest

from qtool.quantize.quantizers.held_out import HeldOutScores

BEFORE = HeldOutScores(kl_nats=(0.10, 0.10, 0.10), losses=(2.1, 2.2, 2.3))
NOISE = (0.02, 0.15, 0.12)  # less in the mean, by less than its error


@pytest.mark.parametrize(
    "kl, losses, better, proven",
    [
        ((0.08, 0.09, 0.085), (2.4, 2.5, 2.6), True, True),
        ((0.11, 0.12, 0.115), (1.9, 2.0, 2.1), False, False),
        (NOISE, (2.09, 2.18, 2.28), True, True),
        (NOISE, (2.2, 2.3, 2.4), False, False),
        (NOISE, (2.0, 2.1, 2.45), True, False),
        (BEFORE.kl_nats, BEFORE.losses, False, False),
    ],
    ids=["KL falls", "KL rises", "loss falls", "loss rises", "noise in both", "the same"],
)
def test_the_kl_decides_and_where_it_cannot_the_loss(kl: tuple, losses: tuple, better: bool, proven: bool) -> None:
    change = HeldOutScores(kl_nats=kl, losses=losses).against(BEFORE)
    assert (change.better, change.proven) == (better, proven)


@pytest.mark.parametrize("kl, better", [(0.09, True), (0.11, False), (0.1, False)])
def test_one_sequence_is_compared_as_it_is(kl: float, better: bool) -> None:
    before, now = (HeldOutScores(kl_nats=(value,), losses=(2.0,)) for value in (0.1, kl))
    assert now.against(before).better is now.against(before).proven is better
    assert str(now.against(before)).endswith("on one sequence")


def test_the_words_name_what_decided() -> None:
    fallen = HeldOutScores(kl_nats=(0.08, 0.09, 0.085), losses=(2.4, 2.5, 2.6))
    assert str(fallen.against(BEFORE)) == "KL -0.0150 ± 0.0029 nats"
    unclear = HeldOutScores(kl_nats=NOISE, losses=(2.2, 2.3, 2.4))
    assert str(unclear.against(BEFORE)) == "KL -0.0033 ± 0.0393 nats, loss +0.1000 ± 0.0000 nats"
