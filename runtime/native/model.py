"""A checkpoint in transformers' network, its blocks replaced by ours: embedding, blocks, norm, head."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qtool.errors import UsageError
from qtool.kernels.quantize_activation import RmsNorm, prepare_rows
from qtool.quantize.artifacts.cache_scheme import CacheScheme
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.network import EMBEDDING, HEAD, load_network
from qtool.quantize.artifacts.weights import WeightSource
from qtool.runtime.native.attention import Attention
from qtool.runtime.native.block import Block, Norm
from qtool.runtime.native.cache import LayerCache, layer_cache
from qtool.runtime.native.linear import NativeLinear, on_device
from qtool.runtime.native.merge import Given
from qtool.runtime.native.readers import Readers
from qtool.runtime.native.step import Step

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
REMEDY = "use --runtime reference"
# Those whose cosines and sines are a function of the position alone.
ROTARY = ("default", "linear", "llama3", "yarn")


class NativeModel:
    """The network on a device.

    Args:
        source: a checkpoint, or a float model.
        device: of all weights and caches.
        dtype: of activations and float weights.
        max_length: positions that there are cosines and caches for.

    Raises:
        UsageError: for a family or rotary positions without a native form.
    """

    def __init__(self, source: WeightSource, device: torch.device, dtype: torch.dtype, max_length: int) -> None:
        check_native(source.config)
        self.device, self.dtype, self.max_length = device, dtype, max_length
        checkpoint = source if isinstance(source, QuantizedCheckpoint) else None
        self.kv: CacheScheme | None = None if checkpoint is None else checkpoint.kv
        network: Any = load_network(source, skip=_skipped(checkpoint))
        self.config: Any = network.config
        parts = _Parts(checkpoint, network, device, dtype)
        self.blocks = [parts.block(index, layer, self.kv) for index, layer in enumerate(network.model.layers)]
        self._final_norm = parts.norm(network.model.norm)
        self.head = Readers([parts.given(HEAD)], dtype, torch.float32)
        # A tied head's rows are the embedding's, in codes too.
        self._table = None if self.config.tie_word_embeddings else parts.moved(network.model.embed_tokens.weight)
        positions = torch.arange(max_length)[None]
        tables = network.model.rotary_emb(torch.zeros(1), positions)
        self._cos, self._sin = (table[0].to(device) for table in tables)

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.config.vocab_size)

    @property
    def recordable(self) -> bool:
        """Whether a decoding step knows all it needs on the device; one cache is read sequence by sequence."""
        return self.kv is None or not (self.kv.before_bias and self.kv.past_only)

    def caches(self, batch: int, length: int | None = None) -> list[LayerCache]:
        """Empty caches of so many sequences of so many positions, `max_length` for None; one a layer."""
        heads, head_dim = int(self.config.num_key_value_heads), self.blocks[0].attention.head_dim
        shape = (batch, heads, length or self.max_length, head_dim)
        return [layer_cache(self.kv, shape, self.dtype, self.device) for _ in self.blocks]

    def logits(self, ids: Tensor, step: Step, caches: list[LayerCache]) -> Tensor:
        """ids int64 [M] to float32 [M, V]; stores their keys and values."""
        x, norm = self._through_blocks(self.embedded(ids), step, caches)
        (logits,) = self.head(x, norm, step.requests)
        return logits

    def hidden(self, x: Tensor, step: Step, caches: list[LayerCache]) -> Tensor:
        """Embeddings [M, d] to what the head reads, [M, d] behind the last norm; stores their keys and values."""
        out, norm = self._through_blocks(x, step, caches)
        return prepare_rows(out, self.dtype, source=norm)

    def _through_blocks(self, x: Tensor, step: Step, caches: list[LayerCache]) -> tuple[Tensor, RmsNorm]:
        residual = torch.zeros_like(x)
        rope = self._cos[step.positions], self._sin[step.positions]
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, residual, rope, cache, step)
        return x, self._final_norm.of(residual)

    def operations(self) -> Mapping[str, int]:
        """How many linears run which kernel, merged ones counted once."""
        return Counter(linear.product.op for linear in self._linears())

    def dequantized(self) -> Mapping[str, int]:
        """Why linears run dequantized, and how many."""
        return Counter(linear.reason for linear in self._linears() if linear.reason)

    def _linears(self) -> list[NativeLinear]:
        readers = [reader for block in self.blocks for reader in block.readers()] + [self.head]
        return [linear for reader in readers for linear in reader.linears]

    def embedded(self, ids: Tensor) -> Tensor:
        """Token ids int64 [M] to their embeddings [M, d]."""
        if self._table is not None:
            return self._table[ids]
        return self.head.linears[0].product.rows(ids).to(self.dtype)


def check_native(config: Mapping[str, Any]) -> None:
    """Refuse what this runtime has no form of.

    Raises:
        UsageError: for a family, activation or rotary positions.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UsageError(f"--runtime native: {family}", f"runs {', '.join(FAMILIES)}", REMEDY)
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise UsageError("--runtime native", f"no {config['hidden_act']} in our kernels", REMEDY)
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROTARY:
        raise UsageError("--runtime native", f"rotary positions {kind} change with the length", REMEDY)


def _skipped(checkpoint: QuantizedCheckpoint | None) -> frozenset[str]:
    """Tensors that stay on the meta device: quantized ones are codes, and a tied quantized head is the embedding."""
    if checkpoint is None:
        return frozenset()
    names = {f"{module}.weight" for module in checkpoint.schemes}
    if checkpoint.tied and HEAD in checkpoint.schemes:
        names = (names - {f"{HEAD}.weight"}) | {f"{EMBEDDING}.weight"}
    return frozenset(names)


class _Parts:
    """Takes a loaded network apart."""

    def __init__(
        self, checkpoint: QuantizedCheckpoint | None, network: Any, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._checkpoint, self._network = checkpoint, network
        self._device, self._dtype = device, dtype

    def moved(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._device, self._dtype)

    def given(self, module: str) -> Given:
        linear: nn.Linear = self._network.get_submodule(module)
        bias = None if linear.bias is None else self.moved(linear.bias)
        if self._checkpoint is not None and module in self._checkpoint.schemes:
            return Given(name=module, weight=on_device(self._checkpoint.quantized(module), self._device), bias=bias)
        return Given(name=module, weight=self.moved(linear.weight), bias=bias)

    def norm(self, module: Any) -> Norm:
        return Norm(gain=self.moved(module.weight), epsilon=float(module.variance_epsilon))

    def block(self, index: int, layer: Any, kv: CacheScheme | None) -> Block:
        name = f"model.layers.{index}"
        projections = [self.given(f"{name}.self_attn.{part}_proj") for part in "qkv"]
        key_bias = projections[1].bias
        before_bias = kv is not None and kv.before_bias
        if before_bias:
            q, k, v = projections
            projections = [q, Given(name=k.name, weight=k.weight, bias=None), v]
        return Block(
            attention_norm=self.norm(layer.input_layernorm),
            projections=Readers(projections, self._dtype),
            attention=self._attention(layer.self_attn, key_bias if before_bias else None, kv),
            output=self._readers(f"{name}.self_attn", "o_proj"),
            mlp_norm=self.norm(layer.post_attention_layernorm),
            gate_up=self._readers(f"{name}.mlp", "gate_proj", "up_proj"),
            down=self._readers(f"{name}.mlp", "down_proj"),
        )

    def _readers(self, parent: str, *names: str) -> Readers:
        return Readers([self.given(f"{parent}.{name}") for name in names], self._dtype)

    def _attention(self, module: Any, key_bias: Tensor | None, kv: CacheScheme | None) -> Attention:
        window = getattr(module, "sliding_window", getattr(self._network.config, "sliding_window", None))
        norms: list[RmsNorm | None] = [
            self.norm(getattr(module, part)).of(None) if hasattr(module, part) else None
            for part in ("q_norm", "k_norm")
        ]
        return Attention(
            head_dim=int(module.head_dim),
            scale=float(module.scaling),
            window=window,
            query_norm=norms[0],
            key_norm=norms[1],
            key_bias=key_bias,
            codes_before_bias=kv.key_codes if kv is not None and key_bias is not None else None,
        )
