"""Attention of the rows of a step over a layer's cache: a kernel for one token each, torch's for more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from qtool.kernels.quantize_activation import RmsNorm, prepare_rows
from qtool.quantize.artifacts.cache_scheme import CacheCodes
from qtool.quantize.artifacts.quantized_cache import codes_and_back
from qtool.runtime.native.cache import LayerCache
from qtool.runtime.native.step import Step

Rope = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One layer's attention, between its projections.

    Attributes:
        head_dim: c.
        scale: of q · k.
        window: only so many last positions are seen; None: all.
        query_norm, key_norm: of the heads, or None.
        key_bias: [H_kv · c] of a key projection whose bias is added here, behind codes that stand before it; else None.
        codes_before_bias: of those keys.
    """

    head_dim: int
    scale: float
    window: int | None
    query_norm: RmsNorm | None
    key_norm: RmsNorm | None
    key_bias: Tensor | None = None
    codes_before_bias: CacheCodes | None = None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, rope: Rope, cache: LayerCache, step: Step) -> Tensor:
        """q [M, H · c], k and v [M, H_kv · c], rope's cosines and sines [M, c]: to [M, H · c]."""
        query = rotate_positions(self._heads(q, self.query_norm), rope)
        float_key = self._heads(k if self.key_bias is None else k + self.key_bias, self.key_norm)
        key = rotate_positions(float_key, rope)
        own: Tensor | None = None
        if self.codes_before_bias is not None and self.key_bias is not None:
            coded = codes_and_back(self._heads(k, None), self.codes_before_bias) + self._heads(self.key_bias, None)
            own, key = step.padded(key).transpose(1, 2), rotate_positions(coded.to(k.dtype), rope)
        query, key, value = (step.padded(x).transpose(1, 2) for x in (query, key, self._heads(v, None)))
        asked, stored_key, value = cache.write(query, key, value, step)
        own_key = stored_key if own is None else own
        if step.single and (found := cache.decode(asked[:, :, 0], step, self.scale, self.window)) is not None:
            return found.flatten(1)
        out = asked.new_zeros(asked.shape)
        assert step.spans is not None
        for row, (first, count) in enumerate(step.spans):
            new = slice(None, count)
            exact = (own_key[row, :, new], value[row, :, new]) if cache.own_exact else None
            out[row, :, new] = self._prefill(asked[row, :, new], *cache.read(row, first + count), first, exact)
        return step.packed(out.transpose(1, 2)).flatten(1)

    def _heads(self, rows: Tensor, norm: RmsNorm | None) -> Tensor:
        heads = rows.reshape(*rows.shape[:-1], -1, self.head_dim)
        return heads if norm is None else prepare_rows(heads, heads.dtype, source=norm)

    def _prefill(
        self, query: Tensor, key: Tensor, value: Tensor, first: int, exact: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """One sequence: queries [H, T, c] at positions from `first` on, keys and values of all positions so far. By
        itself, so that no other sequence's length is padded into it."""
        mask = None
        if first or exact is not None or self.window is not None:
            mask = self._seen(first, query.shape[1], query.device)
        if exact is not None:
            assert mask is not None
            own = torch.eye(query.shape[1], dtype=torch.bool, device=query.device)
            mask = torch.cat((mask.tril(first - 1), own), dim=-1)
            key, value = torch.cat((key, exact[0]), dim=1), torch.cat((value, exact[1]), dim=1)
        found: Tensor = scaled_dot_product_attention(
            query[None],
            key[None],
            value[None],
            attn_mask=mask,
            is_causal=mask is None and query.shape[1] > 1,
            scale=self.scale,
            enable_gqa=True,
        )
        return found[0]

    def _seen(self, first: int, tokens: int, device: torch.device) -> Tensor:
        """[T, first + T]: which position each of the last T tokens sees."""
        seen = torch.ones(tokens, first + tokens, dtype=torch.bool, device=device).tril(first)
        return seen if self.window is None else seen.triu(first - self.window + 1)


def rotate_positions(heads: Tensor, rope: Rope) -> Tensor:
    """The rotary positions of [M, heads, c], in float32."""
    cos, sin = (part[:, None] for part in rope)
    wide = heads.to(torch.float32)
    low, high = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-high, low), dim=-1) * sin).to(heads.dtype)
