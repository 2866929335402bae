"""A quantized checkpoint, opened: quantized tensors, and what stayed in float (docs/formats.md §checkpoint)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from qtool.errors import InputRefused
from qtool.kernels.pack import unpack_int4
from qtool.quantize.artifacts.cache_scheme import CacheScheme
from qtool.quantize.artifacts.checkpoint_writer import SHARD
from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.manifest import Manifest
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import LayerScheme
from qtool.quantize.artifacts.store import open_artifact
from qtool.quantize.artifacts.stored_scale import STORED_SCALES
from qtool.quantize.artifacts.weights import FloatArray
from qtool.quantize.transforms.low_rank import LowRank
from qtool.quantize.transforms.site_transform import SiteTransform
from qtool.quantize.transforms.table import site_transform_from


class QuantizedCheckpoint:
    """A checkpoint opened for reading, every byte checked against its manifest. It is a WeightSource too:
    `names` and `read` cover all tensors, quantized ones dequantized.

    Args:
        folder: with its shards.
        verify: check the files' sha256.
        details: a CheckpointWriter's, of a checkpoint that has no manifest yet; None: read the manifest.
    """

    def __init__(self, folder: Path, *, verify: bool = True, details: Mapping[str, Any] | None = None) -> None:
        self.folder = folder
        if details is None:
            self.manifest = open_artifact(folder, kind="checkpoint", verify=verify)
        else:
            self.manifest = Manifest(kind="checkpoint", details=dict(details))
        details = self.manifest.details
        self.schemes: dict[str, LayerScheme] = {
            name: LayerScheme.from_json(layer["scheme"]) for name, layer in details["quantized"].items()
        }
        self.shapes: dict[str, tuple[int, int]] = {
            name: (int(layer["shape"][0]), int(layer["shape"][1])) for name, layer in details["quantized"].items()
        }
        self._details: Mapping[str, Any] = details["quantized"]
        self._floats: dict[str, str] = dict(details["float"])
        self._files: dict[str, Path] = self._index()
        self._check_names()

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's config.json."""
        config: Mapping[str, Any] = self.manifest.details["config"]
        return config

    @property
    def kv(self) -> CacheScheme | None:
        """What the key-value cache stores; None: floats."""
        stored = self.manifest.details.get("kv")
        return None if stored is None else CacheScheme.model_validate(stored)

    @property
    def digest(self) -> str:
        """The manifest's digest, which covers every byte."""
        return self.manifest.digest

    @property
    def tied(self) -> bool:
        """True when the head is the embedding; a quantized head's codes then serve both."""
        return bool(self.config.get("tie_word_embeddings", False))

    def names(self) -> Sequence[str]:
        """All tensor names of the float model, sorted."""
        return sorted([*self._floats, *(self._float_name(m) for m in self.schemes)])

    def stored_dtype(self, name: str) -> str:
        """See WeightSource; quantized weights dequantize to F32."""
        return self._floats.get(name, "F32")

    def read(self, name: str) -> FloatArray:
        """See WeightSource."""
        if name in self._floats:
            array: FloatArray = self._tensor(name).to(torch.float32).numpy()
            return array
        module = next(m for m in self.schemes if self._float_name(m) == name)
        return np.ascontiguousarray(self.quantized(module).effective().numpy())

    def read_rows(self, name: str, start: int, stop: int) -> FloatArray:
        """See WeightSource; a quantized tensor is dequantized as a whole."""
        if name not in self._floats:
            return np.ascontiguousarray(self.read(name)[start:stop])
        with safe_open(self._files[name], framework="pt") as file:
            rows: Tensor = file.get_slice(name)[start:stop]
        array: FloatArray = rows.to(torch.float32).numpy()
        return array

    def quantized(self, module: str) -> QuantizedTensor:
        """One quantized linear by module name, for example "model.layers.3.mlp.down_proj" or "lm_head".

        Raises:
            InputRefused: for shapes that do not match the manifest, or scales that are not finite and positive.
        """
        scheme, (n, k) = self.schemes[module], self.shapes[module]
        codes = self._tensor(f"{module}.codes")
        four_bit = scheme.weight.format.bits == 4
        group = group_size_of(scheme.weight.granularity) or k
        form, groups = STORED_SCALES[scheme.weight.scale], -(-k // group)
        shapes = form.shapes(n, groups)
        stored = {name: self._tensor(f"{module}.{name}") for name in shapes}
        fits = all(tuple(stored[name].shape) == shape for name, shape in shapes.items())
        if not fits or tuple(codes.shape) != (n, -(-k // 2) if four_bit else k):
            raise InputRefused(f"{self.folder}: {module}", "shapes do not match the manifest", "quantize again")
        if four_bit:
            codes = unpack_int4(codes, columns=k)
        scale, factor = form.read(stored, groups)
        if not bool(torch.isfinite(scale).all()) or not bool((scale > 0).all()):
            raise InputRefused(f"{self.folder}: {module}.scale", "is not finite and positive", "quantize again")
        return QuantizedTensor(
            codes=codes,
            scale=scale,
            zero_point=self._optional(f"{module}.zero_point"),
            input_scale=self._optional(f"{module}.input_scale"),
            scheme=scheme,
            low_rank=self.low_rank(module),
            scale_factor=factor,
            **self._site_fields(module),
        )

    def transformed(self, module: str) -> bool:
        """True for a linear that has a transform or a side product beside its codes."""
        return "transform" in self._details[module] or "low_rank" in self._details[module]

    def site(self, module: str) -> str:
        """The name of the transformed input that a linear reads; "" for a float linear or a plain input."""
        return str(self._details.get(module, {}).get("transform", {}).get("site", ""))

    def site_transform(self, module: str) -> tuple[str, SiteTransform] | None:
        """The name of the input that a linear reads and what is done to it, None where nothing is."""
        stored = self._details[module].get("transform")
        if stored is None:
            return None
        tensors = {key: self._tensor(f"{stored['site']}.{key}") for key in stored["tensors"]}
        return str(stored["site"]), site_transform_from(stored["header"], tensors)

    def side(self, module: str) -> Tensor | None:
        """The side part [N, r] of a linear's weight, float32, None where its transform has none."""
        return self._tensor(f"{module}.side").to(torch.float32) if f"{module}.side" in self._files else None

    def low_rank(self, module: str) -> LowRank | None:
        """The correction of what rounding did to a linear's weight."""
        if "low_rank" not in self._details[module]:
            return None
        up, down = (self._tensor(f"{module}.low_rank_{part}").to(torch.float32) for part in ("up", "down"))
        return LowRank(up=up, down=down)

    def _site_fields(self, module: str) -> dict[str, Any]:
        found = self.site_transform(module)
        return {} if found is None else {"site": found[0], "transform": found[1], "side": self.side(module)}

    def _float_name(self, module: str) -> str:
        tied_head = module == "lm_head" and self.tied
        return "model.embed_tokens.weight" if tied_head else f"{module}.weight"

    def _tensor(self, name: str) -> Tensor:
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _optional(self, name: str) -> Tensor | None:
        return self._tensor(name) if name in self._files else None

    def _index(self) -> dict[str, Path]:
        index: dict[str, Path] = {}
        for path in sorted(self.folder.glob(SHARD.replace("{:05d}", "*"))):
            with safe_open(path, framework="pt") as file:
                index |= dict.fromkeys(file.keys(), path)
        return index

    def _check_names(self) -> None:
        wanted = set(self._floats)
        for module, scheme in self.schemes.items():
            scales = STORED_SCALES[scheme.weight.scale].shapes(*self.shapes[module])
            wanted |= {f"{module}.codes", *(f"{module}.{name}" for name in scales)}
            if not scheme.weight.symmetric:
                wanted.add(f"{module}.zero_point")
            if scheme.input is not None and not scheme.input.dynamic:
                wanted.add(f"{module}.input_scale")
            if "low_rank" in self._details[module]:
                wanted |= {f"{module}.low_rank_up", f"{module}.low_rank_down"}
            if (stored := self._details[module].get("transform")) is not None:
                wanted |= {f"{stored['site']}.{key}" for key in stored["tensors"]}
                if stored["side_width"]:
                    wanted.add(f"{module}.side")
        for name in sorted(wanted ^ set(self._files)):
            raise InputRefused(f"{self.folder}: {name}", "is missing or extra", "quantize again")
