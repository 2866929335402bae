"""Attention over a quantized key-value cache, in torch: what a low-bit cache computes, without storing it.

The codes of a token depend on that token alone, so keys and values taken to codes and back whenever they are attended
to are what a runtime reads out of its cache: one function is calibrated, scored in one pass and decoded with. Keys and
values themselves stay in float here, and every step quantizes all of them again.
"""

from __future__ import annotations

import sys
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qtool.errors import UsageError
from qtool.kernels.hadamard import apply, hadamard_plan
from qtool.kernels.quantize_kv import dequantize_kv, quantize_kv_fp8, quantize_kv_int
from qtool.quantize.artifacts.attention_function import named_attention, register_attention
from qtool.quantize.artifacts.cache_scheme import CacheCodes, CacheScheme


def quantize_cache(network: PreTrainedModel, scheme: CacheScheme) -> None:
    """Let every attention of the network read keys and values through the cache's codes, from now on.

    Args:
        network: any family with attention; its linears may be replaced later.
        scheme: checked against the network's config (`CacheScheme.check_model`).

    Raises:
        UsageError: for a network without attention.
    """
    before = network.config._attn_implementation
    if before is None:
        raise UsageError("kv", f"{network.config.model_type} has no key-value cache", "remove it")
    attention = _attention(scheme, before)
    if scheme.before_bias:
        for module in network.modules():
            if hasattr(module, "k_proj"):
                module.register_forward_pre_hook(attention.watch_keys, with_kwargs=True)
    network.config._attn_implementation = attention.name


def codes_and_back(x: Tensor, codes: CacheCodes) -> Tensor:
    """Keys or values [..., c] as they come out of the cache, in x's dtype."""
    group = codes.group_size or x.shape[-1]
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // group, group)
    if codes.format == "fp8_e4m3":
        stored = quantize_kv_fp8(groups)
    else:
        stored = quantize_kv_int(groups, bits=codes.bits, symmetric=codes.symmetric)
    values = dequantize_kv(stored).to(x.dtype).reshape(x.shape)
    # Whoever trains weights through the cache gets the gradient of the keys and values themselves.
    return x + (values - x).detach() if x.requires_grad else values


@cache
def _attention(scheme: CacheScheme, before: str) -> _CachedAttention:
    return _CachedAttention(scheme, before)


class _CachedAttention:
    """The attention function of one scheme, for every network; it registers itself.

    Args:
        scheme: of the cache.
        before: the name of the attention function that computes on what comes out of the cache.
    """

    def __init__(self, scheme: CacheScheme, before: str) -> None:
        self.name = f"qtool_{str(scheme).replace(' ', '_')}_{before}"
        self._scheme = scheme
        self._before = before
        self._watched: WeakSet[nn.Module] = WeakSet()
        # Of keys quantized before the bias: the float keys of the call in hand, and its cosines and sines.
        self._own: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
        self._positions: WeakKeyDictionary[nn.Module, tuple[Tensor, Tensor]] = WeakKeyDictionary()
        register_attention(self.name, self, masks_like=before)

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        scheme, tokens = self._scheme, query.shape[2]
        if scheme.rotate:
            plan = hadamard_plan(query.shape[-1])
            query, key = apply(query, plan), apply(key, plan)
        stored_key = key if scheme.before_bias else codes_and_back(key, scheme.key_codes)
        stored_value = codes_and_back(value, scheme.value_codes)
        if scheme.past_only:
            own = self._own_keys(module, query) if scheme.before_bias else key[:, :, -tokens:]
            mask = _past_and_own(mask, tokens, key.shape[2], key.device)
            key = torch.cat((stored_key, own), dim=2)
            value = torch.cat((stored_value, value[:, :, -tokens:]), dim=2)
        else:
            key, value = stored_key, stored_value
        return named_attention(self._before, module)(module, query, key, value, mask, **kwargs)

    def watch_keys(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Quantize what leaves the attention's k_proj, whichever module that is by now (a forward pre-hook)."""
        self._positions[module] = kwargs["position_embeddings"]
        linear: Any = module.k_proj
        if linear not in self._watched:
            linear.register_forward_hook(partial(self._quantize_keys, module))
            self._watched.add(linear)

    def _quantize_keys(self, module: Any, linear: Any, args: tuple[Any, ...], keys: Tensor) -> Tensor:
        if self._scheme.past_only:
            self._own[module] = keys
        heads = (keys - linear.bias).reshape(*keys.shape[:-1], -1, module.head_dim)
        return codes_and_back(heads, self._scheme.key_codes).flatten(-2) + linear.bias

    def _own_keys(self, module: Any, query: Tensor) -> Tensor:
        family: Any = sys.modules[type(module).__module__]
        keys = self._own.pop(module)
        heads = keys.reshape(*keys.shape[:-1], -1, module.head_dim).transpose(1, 2)
        own: Tensor = family.apply_rotary_pos_emb(query, heads, *self._positions.pop(module))[1]
        return own


def _past_and_own(mask: Tensor | None, tokens: int, keys: int, device: torch.device) -> Tensor:
    """The mask [b or 1, 1, tokens, keys + tokens] under which each of the last `tokens` tokens sees earlier keys among
    the first `keys` columns and its own key among the last."""
    own = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril().triu()
    last = torch.nn.functional.pad(own, (keys - tokens, 0))
    if mask is None:
        mask = torch.ones(tokens, keys, dtype=torch.bool, device=device).tril(keys - tokens)[None, None]
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        return torch.cat((mask & ~last, own.expand(*mask.shape[:2], -1, -1)), dim=-1)
    never = torch.finfo(mask.dtype).min
    own_mask = torch.zeros_like(own, dtype=mask.dtype).masked_fill(~own, never)
    return torch.cat((mask.masked_fill(last, never), own_mask.expand(*mask.shape[:2], -1, -1)), dim=-1)
