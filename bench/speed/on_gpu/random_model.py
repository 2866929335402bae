"""Models of a published shape with random weights, made where they run: no download, and no float copy of the codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qtool.quantize.artifacts.cache_scheme import CacheScheme
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import LayerScheme
from qtool.quantize.artifacts.weights import FloatArray

COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama-3-8b": {
        **COMMON,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        **COMMON,
        "vocab_size": 320,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
}
HEAD = "lm_head"
STEPS_OF_A_SHIFT = 3  # shift scales are powers of two over so many octaves


def linears(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """[N, K] of every linear by module name, the head last."""
    d, width = int(config["hidden_size"]), int(config["intermediate_size"])
    head = d // int(config["num_attention_heads"])
    keys = int(config["num_key_value_heads"]) * head
    found: dict[str, tuple[int, int]] = {}
    for index in range(int(config["num_hidden_layers"])):
        block = f"model.layers.{index}"
        rows = {"q": d, "k": keys, "v": keys, "o": d}
        found |= {f"{block}.self_attn.{part}_proj": (n, d) for part, n in rows.items()}
        found |= {f"{block}.mlp.gate_proj": (width, d), f"{block}.mlp.up_proj": (width, d)}
        found[f"{block}.mlp.down_proj"] = (d, width)
    found[HEAD] = (int(config["vocab_size"]), d)
    return found


@cache
def numbers(shape: tuple[int, ...], size: float) -> FloatArray:
    """Normal numbers of this size, the same for every tensor of a shape: a model of them costs memory once."""
    some = np.random.default_rng(0).standard_normal(min(int(np.prod(shape)), 1 << 20)).astype(np.float32) * size
    return np.resize(some, shape)


class RandomModel:
    """A float model, a WeightSource."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = dict(config)
        self._shapes = self._all_shapes()

    @property
    def config(self) -> Mapping[str, Any]:
        """See WeightSource."""
        return self._config

    @property
    def digest(self) -> str:
        """See WeightSource."""
        return "0" * 64

    def names(self) -> Sequence[str]:
        """See WeightSource."""
        return sorted(self._shapes)

    def stored_dtype(self, name: str) -> str:
        """See WeightSource."""
        return "F32"

    def read(self, name: str) -> FloatArray:
        """See WeightSource; tensors of one shape share their memory."""
        shape = self._shapes[name]
        return np.ones(shape, np.float32) if len(shape) == 1 else numbers(shape, shape[1] ** -0.5)

    def read_rows(self, name: str, start: int, stop: int) -> FloatArray:
        """See WeightSource."""
        return self.read(name)[start:stop].copy()

    def _all_shapes(self) -> dict[str, tuple[int, ...]]:
        d = int(self._config["hidden_size"])
        found: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears(self._config).items()}
        found |= {"model.embed_tokens.weight": (int(self._config["vocab_size"]), d), "model.norm.weight": (d,)}
        for index in range(int(self._config["num_hidden_layers"])):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                found[f"model.layers.{index}.{norm}.weight"] = (d,)
        return found


class RandomCheckpoint(QuantizedCheckpoint):
    """A quantized checkpoint that no folder holds: codes and scales are drawn on the device when they are asked for.

    Args:
        config: of the model.
        scheme: of every linear but the head.
        head: of the head; None leaves it in float.
        device: where weights are made.
        kv: of the cache.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        scheme: LayerScheme,
        head: LayerScheme | None,
        device: torch.device,
        kv: CacheScheme | None = None,
    ) -> None:
        self.folder = Path("random")
        self._model, self._device, self._kv = RandomModel(config), device, kv
        self.shapes = {name: shape for name, shape in linears(config).items() if name != HEAD or head is not None}
        self.schemes = {name: head if name == HEAD and head is not None else scheme for name in self.shapes}

    @property
    def config(self) -> Mapping[str, Any]:
        """See QuantizedCheckpoint."""
        return self._model.config

    @property
    def kv(self) -> CacheScheme | None:
        """See QuantizedCheckpoint."""
        return self._kv

    @property
    def digest(self) -> str:
        """See QuantizedCheckpoint."""
        return self._model.digest

    def names(self) -> Sequence[str]:
        """See QuantizedCheckpoint."""
        return self._model.names()

    def stored_dtype(self, name: str) -> str:
        """See QuantizedCheckpoint."""
        return "F32"

    def read(self, name: str) -> FloatArray:
        """See QuantizedCheckpoint; of floats only."""
        return self._model.read(name)

    def transformed(self, module: str) -> bool:
        """See QuantizedCheckpoint."""
        return False

    def site(self, module: str) -> str:
        """See QuantizedCheckpoint."""
        return ""

    def quantized(self, module: str) -> QuantizedTensor:
        """See QuantizedCheckpoint. Codes of a module are the same whenever they are drawn."""
        scheme, (n, k) = self.schemes[module], self.shapes[module]
        draw = torch.Generator(self._device).manual_seed(sum(map(ord, module)))
        form = scheme.weight.format
        if form.kind == "float":
            wide = torch.randn(n, k, generator=draw, device=self._device) * 64
            codes = wide.clamp(-form.qmax, form.qmax).to(torch.float8_e4m3fn)
            size = 64.0
        else:
            # Neither the lowest code, which sign and magnitude do not have, nor one for zero twice.
            codes = torch.randint(
                1, form.max_code + 1, (n, k), generator=draw, device=self._device, dtype=torch.uint8
            )
            size = form.qmax * 3**-0.5
        groups = -(-k // (group_size_of(scheme.weight.granularity) or k))
        shifts = torch.randint(0, STEPS_OF_A_SHIFT + 1, (n, groups), generator=draw, device=self._device)
        scale = torch.exp2(-shifts.float()) if scheme.weight.scale != "float" else torch.ones(n, groups)
        scale = scale.to(self._device) * (k**-0.5 / size)
        return QuantizedTensor(codes=codes, scale=scale, zero_point=None, input_scale=None, scheme=scheme)
