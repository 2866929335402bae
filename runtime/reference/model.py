"""The reference network and its session."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.network import EMBEDDING, HEAD, load_network, replace_module
from qtool.quantize.artifacts.quantized_cache import quantize_cache
from qtool.quantize.artifacts.quantized_linear import QuantizedLinear
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.weights import FloatArray, WeightSource
from qtool.runtime.session import IntArray, check_tokens

NOISE = 1e-6


def load_reference(source: WeightSource) -> PreTrainedModel:
    """The network of a float model, or of a checkpoint with its quantized linears and its cache's codes in place.

    A quantized linear's float weight is never read. A tied quantized head serves the embedding too: its rows are
    dequantized, as the exported graph's lookup does.
    """
    if not isinstance(source, QuantizedCheckpoint):
        return load_network(source)
    shared = source.tied and HEAD in source.schemes
    skip = {f"{module}.weight" for module in source.schemes}
    if shared:
        skip = (skip - {f"{HEAD}.weight"}) | {f"{EMBEDDING}.weight"}
    network = load_network(source, skip=frozenset(skip))
    for module in source.schemes:
        weight = source.quantized(module)
        replace_module(network, module, partial(_quantized, weight))
    if shared:
        embedding = network.get_submodule(EMBEDDING)
        embedding._parameters["weight"] = network.lm_head.weight
    if source.kv is not None:
        quantize_cache(network, source.kv)
    return network


def _quantized(weight: QuantizedTensor, linear: nn.Module) -> QuantizedLinear:
    return QuantizedLinear(weight, linear.bias)  # type: ignore[arg-type]


def _kind(source: WeightSource) -> str:
    if not isinstance(source, QuantizedCheckpoint):
        return "float32"
    weights = "quantized" if source.schemes else "float32"
    return weights if source.kv is None else f"{weights}, {source.kv}"


def _float_cache(config: Any) -> DynamicCache:
    return DynamicCache(config=config)


class ReferenceSession:
    """`Session` over the eager network, any batch, on the CPU.

    Args:
        source: a float model or a checkpoint.
        new_cache: makes an empty cache from the network's config; None for one of floats, or of the checkpoint's codes.
    """

    def __init__(self, source: WeightSource, *, new_cache: Callable[[Any], DynamicCache] | None = None) -> None:
        self._make_cache = new_cache or _float_cache
        self._network: Any = load_reference(source)
        self._description = f"torch reference, {_kind(source)}"
        self._noise: torch.Generator | None = None
        self._seed: int | None = None
        self.reset()

    @property
    def vocab_size(self) -> int:
        """See Session."""
        return int(self._network.config.vocab_size)

    @property
    def max_length(self) -> int | None:
        """See Session; the cache grows."""
        return None

    @property
    def description(self) -> str:
        """See Session."""
        return self._description

    def perturbed(self, seed: int) -> ReferenceSession:
        """The same network, its embedding outputs multiplied by 1 + 1e-6 × normal noise.

        Rounding to 8 bits is chaotic: this noise flips a few roundings and the blocks amplify them. The distance
        between the two sessions is what no runtime can be asked to beat.
        """
        other = self.over(self._make_cache)
        other._description = f"{self._description}, noise {seed}"
        other._seed = seed
        other.reset()
        return other

    def over(self, new_cache: Callable[[Any], DynamicCache]) -> ReferenceSession:
        """The same network over caches that this makes of its config."""
        other = object.__new__(ReferenceSession)
        other._network, other._make_cache = self._network, new_cache
        other._description, other._seed = self._description, None
        other.reset()
        return other

    def prefill(self, tokens: IntArray) -> FloatArray:
        """See Session."""
        check_tokens(tokens, dims=2, vocab_size=self.vocab_size)
        return self._forward(tokens)

    def decode(self, tokens: IntArray) -> FloatArray:
        """See Session."""
        check_tokens(tokens, dims=1, vocab_size=self.vocab_size)
        return self._forward(tokens[:, None])[:, 0]

    def reset(self) -> None:
        """See Session."""
        self.cache = self.new_cache()
        self._noise = None if self._seed is None else torch.Generator().manual_seed(self._seed)

    def new_cache(self) -> DynamicCache:
        """An empty cache of this session's kind."""
        return self._make_cache(self._network.config)

    def close(self) -> None:
        """See Session."""
        self._network = None
        self.cache = DynamicCache()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _forward(self, tokens: IntArray) -> FloatArray:
        with torch.inference_mode():
            hidden: Tensor = self._network.get_input_embeddings()(torch.from_numpy(tokens))
            if self._noise is not None:
                hidden = hidden * (1 + NOISE * torch.randn(hidden.shape, generator=self._noise))
            out = self._network(inputs_embeds=hidden, past_key_values=self.cache, use_cache=True)
            logits: FloatArray = out.logits.to(torch.float32).numpy()
        return logits
