"""The skinny product: the same as the wide one of its two factors, with operands in the stored dtype."""

from __future__ import annotations

import torch

from qtool.kernels.side_gemm import side_columns, side_gemm, side_output


def _random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_adds_the_product_of_both_factors() -> None:
    y, x, down, up = _random(2, 5, 7, seed=0), _random(2, 5, 12, seed=1), _random(12, 3, seed=2), _random(7, 3, seed=3)
    torch.testing.assert_close(side_gemm(y, x, down, up), y + x @ (down @ up.T))


def test_operands_are_rounded_to_the_stored_dtype() -> None:
    x = torch.tensor([[1.0 + 2.0**-9, 1.0]])
    identity = torch.eye(2)
    assert side_columns(x, identity, dtype=torch.bfloat16).tolist() == [[1.0, 1.0]]
    assert side_columns(x, identity, dtype=torch.float16).tolist() == x.tolist()
    assert side_output(x, identity, dtype=torch.bfloat16).tolist() == [[1.0, 1.0]]


def test_no_tokens() -> None:
    assert side_gemm(torch.zeros(0, 7), torch.zeros(0, 12), torch.zeros(12, 3), torch.zeros(7, 3)).shape == (0, 7)
