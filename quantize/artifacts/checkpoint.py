"""The quantized checkpoint: integer or FP8 codes with their scales, and everything that stayed in float.

One canonical form on disk (docs/formats.md §checkpoint); kernel and graph layouts are made when it is loaded.
Integer codes are unsigned, value = scale × (code − zero_point), with the zero point fixed at the middle code
(8 or 128) when the weight is symmetric. 4-bit codes are packed two to a byte along K, low nibble first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from qtool.errors import InputRefused
from qtool.kernels.dequantize_weight import dequantize_weight
from qtool.kernels.pack import pack_int4, unpack_int4
from qtool.quantize.artifacts.cache_scheme import CacheScheme
from qtool.quantize.artifacts.formats import FP4_E2M1
from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.manifest import Manifest
from qtool.quantize.artifacts.scheme import LayerScheme
from qtool.quantize.artifacts.store import open_artifact
from qtool.quantize.artifacts.stored_scale import STORED_SCALES
from qtool.quantize.artifacts.tensor_file import Streamed, row_pieces, write_tensors
from qtool.quantize.artifacts.weights import FloatArray, WeightSource
from qtool.quantize.transforms.low_rank import LowRank
from qtool.quantize.transforms.site_transform import SiteTransform
from qtool.quantize.transforms.table import site_transform_from

SHARD = "tensors-{:05d}.safetensors"
TORCH_DTYPES: dict[str, torch.dtype] = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class QuantizedTensor:
    """One linear's weight.

    Attributes:
        codes: [N, K]; uint8 for integer formats (0…15 or 0…255) and FP4 bit patterns, float8_e4m3fn for FP8.
        scale: [N, G] float32, finite and positive; G = ceil(K / group_size), or 1 per channel.
        scale_factor: [N, 1] float32, what the scales are multiples of in some formats (stored_scale.py), else None.
        zero_point: [N, G] uint8 for asymmetric integer weights, else None.
        input_scale: a float32 scalar for static per-tensor activations, else None.
        scheme: what the codes mean and what is done to the layer's input.
        transform: what is done to the input before it is quantized; the codes then stand for the weight's main part.
        site: the name of the input that `transform` belongs to; linears that read one input share both.
        side: the weight's side part [N, r] float32 (float16 values), where the transform has one.
        low_rank: a 16-bit correction of what rounding did to the codes' weight.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    input_scale: Tensor | None
    scheme: LayerScheme
    transform: SiteTransform | None = None
    site: str = ""
    side: Tensor | None = None
    low_rank: LowRank | None = None
    scale_factor: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def plain(self) -> bool:
        """True when the product is the codes' alone: no transform, no side product."""
        return self.transform is None and self.low_rank is None

    def effective(self) -> Tensor:
        """The float weight [N, K] that the layer multiplies its untransformed, unquantized input with."""
        weight = self.dequantize()
        if self.low_rank is not None:
            weight = weight + self.low_rank.up @ self.low_rank.down
        if self.transform is None:
            return weight
        main, side = self.transform.input(torch.eye(weight.shape[1]))
        weight = weight @ main.T
        return weight if side is None or self.side is None else weight + self.side @ side.T

    def dequantize(self) -> Tensor:
        """The weight the codes stand for, [N, K] float32; of the main part where there is a transform."""
        fmt = self.scheme.weight.format
        return dequantize_weight(
            self.codes,
            self.scale,
            self.zero_point,
            group_size=group_size_of(self.scheme.weight.granularity),
            zero_code=fmt.zero_code if fmt.kind == "int" else 0,
            e2m1=fmt is FP4_E2M1,
        )

    @property
    def stored_bits(self) -> int:
        """Bits on disk, scales, zero points and side products counted; the transform is the site's, not counted."""
        return 8 * sum(t.numel() * t.element_size() for t in self.to_tensors("w").values())

    @property
    def transform_bits(self) -> int:
        """Bits on disk of the site's transform, which all linears of the site share."""
        stored = {} if self.transform is None else self.transform.to_tensors()
        return 8 * sum(t.numel() * t.element_size() for t in stored.values())

    def to_tensors(self, module: str) -> dict[str, Tensor]:
        """The canonical tensors, named `{module}.codes`, `.scale` (or STORED_SCALES' names), `.zero_point`, …"""
        four_bit = self.scheme.weight.format.bits == 4
        scales = STORED_SCALES[self.scheme.weight.scale].write(self.scale, self.scale_factor)
        tensors = {
            f"{module}.codes": pack_int4(self.codes) if four_bit else self.codes,
            **{f"{module}.{name}": tensor for name, tensor in scales.items()},
        }
        if self.zero_point is not None:
            tensors[f"{module}.zero_point"] = self.zero_point
        if self.input_scale is not None:
            tensors[f"{module}.input_scale"] = self.input_scale
        if self.side is not None:
            tensors[f"{module}.side"] = self.side.to(torch.float16)
        if self.low_rank is not None:
            tensors[f"{module}.low_rank_up"] = self.low_rank.up.to(torch.float16)
            tensors[f"{module}.low_rank_down"] = self.low_rank.down.to(torch.float16)
        return tensors


def float_tensor(source: WeightSource, name: str, shape: Sequence[int]) -> Tensor | Streamed:
    """A float tensor in the dtype that holds it exactly, as it is stored; a large one is read while it is written."""
    dtype, pieces = TORCH_DTYPES[source.stored_dtype(name)], list(row_pieces(shape))
    if len(pieces) == 1:
        return torch.from_numpy(source.read(name)).to(dtype)

    def rows() -> Iterator[Tensor]:
        for piece in pieces:
            yield torch.from_numpy(source.read_rows(name, piece.start, piece.stop)).to(dtype)

    return Streamed(dtype=dtype, shape=tuple(shape), pieces=rows)


class CheckpointWriter:
    """Writes a checkpoint's tensors into a staging folder, one numbered shard per call, so that a stage holds one
    decoder block at a time. `details` is what the manifest needs to know of them."""

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder = folder
        self._config = dict(config)
        self._shards = 0
        self._quantized: dict[str, dict[str, Any]] = {}
        self._floats: dict[str, str] = {}

    def add(
        self, quantized: Mapping[str, QuantizedTensor], floats: Mapping[str, Tensor | Streamed]
    ) -> dict[str, Any]:
        """Write one shard. Keys are module names (quantized) and tensor names (floats, in their stored dtype).

        Returns:
            What `restore` wants, for a later run that finds the shard written.
        """
        tensors: dict[str, Tensor | Streamed] = {name: t.contiguous() for name, t in floats.items()}
        described: dict[str, dict[str, Any]] = {}
        for module, weight in quantized.items():
            tensors |= {key: t.contiguous() for key, t in weight.to_tensors(module).items()}
            described[module] = {"scheme": weight.scheme.to_json(), "shape": list(weight.shape)}
            if weight.transform is not None:
                stored = weight.transform.to_tensors()
                tensors |= {f"{weight.site}.{key}": t.contiguous() for key, t in stored.items()}
                described[module]["transform"] = {
                    "site": weight.site,
                    "header": weight.transform.header(),
                    "tensors": sorted(stored),
                    "side_width": weight.transform.side_width,
                }
            if weight.low_rank is not None:
                described[module]["low_rank"] = int(weight.low_rank.up.shape[1])
        names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
        shard = SHARD.format(self._shards)
        write_tensors(tensors, self.folder / shard)
        record = {"shard": shard, "quantized": described, "float": {name: names[t.dtype] for name, t in floats.items()}}
        self.restore(record)
        return record

    def restore(self, record: Mapping[str, Any]) -> None:
        """Count a shard that lies in the folder already."""
        self._quantized |= record["quantized"]
        self._floats |= record["float"]
        self._shards += 1

    @property
    def details(self) -> dict[str, Any]:
        """The manifest's details: config, quantized modules with scheme and shape, float tensors with dtype."""
        return {"config": self._config, "quantized": self._quantized, "float": self._floats}


class QuantizedCheckpoint:
    """A checkpoint opened for reading, every byte checked against its manifest. It is a WeightSource too:
    `names` and `read` cover all tensors, quantized ones dequantized."""

    def __init__(self, folder: Path, *, verify: bool = True) -> None:
        self.folder = folder
        self.manifest: Manifest = open_artifact(folder, kind="checkpoint", verify=verify)
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
