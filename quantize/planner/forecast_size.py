"""How large a checkpoint will be: every tensor of every shard counted, the headers and the manifest written out with
numbers in the places of those that only quantizing finds. Torch-free; no weight is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.rule import Assignment
from qtool.quantize.artifacts.scheme import TensorScheme

EMBEDDING, HEAD, BLOCKS = "model.embed_tokens", "lm_head", "model.layers."
BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1}
Shape = tuple[int, ...]
# Tensors by name: dtype and shape.
Tensors = dict[str, tuple[str, Shape]]
SOME_ERROR = 0.012345678901234567  # as long as such numbers are in JSON
SHA256 = "0" * 64
TOKENS_PER_WINDOW, MAX_WINDOWS = 32, 20_000  # of the overlap fingerprints
# (N, G) to the stored scales (artifacts/stored_scale.py).
SCALES: Mapping[str, Callable[[int, int, bool], Tensors]] = {
    "float": lambda n, g, grouped: {"scale": ("F16" if grouped else "F32", (n, g))},
    "e8m0": lambda n, g, _: {"scale_exponent": ("U8", (n, g))},
    "shift": lambda n, g, _: {"scale_shift": ("U8", (n, -(-g // 2))), "scale_factor": ("F32", (n,))},
    "integer": lambda n, g, _: {"scale_integer": ("U8", (n, -(-g // 2))), "scale_factor": ("BF16", (n,))},
    "e4m3": lambda n, g, _: {"scale_e4m3": ("F8_E4M3", (n, g)), "scale_factor": ("F32", ())},
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """Bytes on disk.

    Attributes:
        weights: of all tensors.
        whole: with headers, the manifest, the recipe and the tokenizer.
        bits_per_weight: of all tensors, per parameter of the model.
    """

    weights: int
    whole: int
    bits_per_weight: float


@dataclass(frozen=True, kw_only=True)
class FloatModel:
    """The model that is quantized, after the recipe's transforms of the whole model.

    Attributes:
        config: validated; its embeddings untied where a transform unties them.
        shapes: of every tensor.
        dtypes: in which each is stored when it stays in float.
        groups: per block, the linears that read one input together (without the block's prefix).
    """

    config: Mapping[str, Any]
    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, str]
    groups: Sequence[Sequence[str]]

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return f"{HEAD}.weight" not in self.shapes

    @property
    def blocks(self) -> int:
        """The number of decoder blocks."""
        return int(self.config["num_hidden_layers"])

    def weight_of(self, module: str) -> str:
        """The name of a linear's float weight."""
        return f"{EMBEDDING if module == HEAD and self.tied else module}.weight"

    def matrix(self, module: str) -> tuple[int, int]:
        """(N, K) of a linear."""
        rows, columns = self.shapes[self.weight_of(module)]
        return rows, columns


def checkpoint_size(
    model: FloatModel,
    assignments: Mapping[str, Assignment],
    recipe: Mapping[str, Any],
    companions: Mapping[str, int],
    *,
    calibration_tokens: int,
) -> Size:
    """The size of the checkpoint folder.

    Args:
        model: what is quantized.
        assignments: what each linear gets.
        recipe: as the manifest will hold it.
        companions: other files' bytes by name: the recipe and the tokenizer.
        calibration_tokens: of the text; 0 where none is read.
    """
    shards = [_shard(model, assignments, f"{BLOCKS}{index}.") for index in range(model.blocks)]
    shards.append(_shard(model, assignments, ""))
    weights = sum(tensor_bytes(tensor) for shard in shards for tensor in shard.values())
    sizes = {
        f"tensors-{number:05}.safetensors": _header_bytes(shard) + sum(tensor_bytes(t) for t in shard.values())
        for number, shard in enumerate(shards)
    }
    files = {**sizes, **companions}
    parameters = sum(prod(shape) for shape in model.shapes.values())
    manifest = _manifest(model, assignments, recipe, files, parameters, calibration_tokens)
    written = json.dumps(manifest, indent=2, sort_keys=True, ensure_ascii=False)
    return Size(
        weights=weights,
        whole=sum(files.values()) + len(written.encode()) + 1,
        bits_per_weight=8 * weights / parameters,
    )


def tensor_bytes(tensor: tuple[str, Shape]) -> int:
    """Bytes of one tensor's numbers."""
    return BYTES[tensor[0]] * prod(tensor[1])


def linear_tensors(module: str, shape: tuple[int, int], assignment: Assignment) -> Tensors:
    """What a quantized linear stores, without its site's transform."""
    assert assignment.scheme is not None
    (rows, columns), weight = shape, assignment.scheme.weight
    group = group_size_of(weight.granularity)
    groups = -(-columns // group) if group else 1
    four_bit = weight.format.bits == 4
    stored: Tensors = {"codes": (_code_dtype(weight), (rows, -(-columns // 2) if four_bit else columns))}
    stored |= SCALES[weight.scale](rows, groups, group is not None)
    if not weight.symmetric:
        stored["zero_point"] = ("U8", (rows, groups))
    if assignment.static_input:
        stored["input_scale"] = ("F32", ())
    if side := side_width(assignment):
        stored["side"] = ("F16", (rows, side))
    if rank := min(assignment.low_rank, rows, columns):
        stored |= {"low_rank_up": ("F16", (rows, rank)), "low_rank_down": ("F16", (rank, columns))}
    return {f"{module}.{name}": tensor for name, tensor in stored.items()}


def site_tensors(columns: int, assignment: Assignment) -> Tensors:
    """What a site's transform stores, by short name."""
    stored: Tensors = {}
    if assignment.transform is not None:
        stored["signs"] = ("I8", (columns,))
        if side := side_width(assignment):
            stored["directions"] = ("F16", (columns, side))
    if assignment.frozen_smooth:
        stored["factors"] = ("F32", (columns,))
    return stored


def side_width(assignment: Assignment) -> int:
    """Columns of the 16-bit product beside the quantized one."""
    return assignment.transform.rank if assignment.transform and assignment.transform.kind == "quad" else 0


def site_name(first: str, assignment: Assignment) -> str:
    """The name of a transform's site; `first` is the first linear that reads it."""
    kind = "" if assignment.transform is None else str(assignment.transform)
    kind = f"{kind} smooth".lstrip() if assignment.frozen_smooth else kind
    return f"{first}.input.{kind}".replace(" ", "_")


def first_of_group(model: FloatModel, module: str) -> str:
    """The first of the linears that read what this one reads."""
    for group in model.groups:
        for path in group:
            if module.endswith(f".{path}"):
                return module.removesuffix(path) + group[0]
    return module


def _code_dtype(weight: TensorScheme) -> str:
    return "F8_E4M3" if weight.format.bits == 8 and weight.format.kind == "float" else "U8"


def _shard(model: FloatModel, assignments: Mapping[str, Assignment], prefix: str) -> Tensors:
    """One shard's tensors: those under `prefix`, or all outside the blocks."""
    mine = {m: a for m, a in assignments.items() if _inside(m, prefix) and a.scheme is not None}
    replaced = {model.weight_of(module) for module in mine}
    tensors: Tensors = {
        name: (model.dtypes[name], shape)
        for name, shape in model.shapes.items()
        if _inside(name, prefix) and name not in replaced
    }
    for module, assignment in mine.items():
        shape = model.matrix(module)
        tensors |= linear_tensors(module, shape, assignment)
        site = site_name(first_of_group(model, module), assignment)
        tensors |= {f"{site}.{name}": stored for name, stored in site_tensors(shape[1], assignment).items()}
    return tensors


def _inside(name: str, prefix: str) -> bool:
    return name.startswith(prefix) if prefix else not name.startswith(BLOCKS)


def _header_bytes(tensors: Tensors) -> int:
    header: dict[str, Any] = {}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + tensor_bytes((dtype, shape))
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
    return 8 + length + -length % 8


def _manifest(
    model: FloatModel,
    assignments: Mapping[str, Assignment],
    recipe: Mapping[str, Any],
    files: Mapping[str, int],
    parameters: int,
    calibration_tokens: int,
) -> dict[str, Any]:
    quantized = {m: a for m, a in assignments.items() if a.scheme is not None}
    described: dict[str, Any] = {}
    for module, assignment in quantized.items():
        assert assignment.scheme is not None
        columns = model.matrix(module)[1]
        described[module] = {"scheme": assignment.scheme.to_json(), "shape": list(model.matrix(module))}
        if stored := site_tensors(columns, assignment):
            described[module]["transform"] = {
                "site": site_name(first_of_group(model, module), assignment),
                "header": {"kind": str(assignment.transform), "block": 64},
                "tensors": sorted(stored),
                "side_width": side_width(assignment),
            }
        if assignment.low_rank:
            described[module]["low_rank"] = assignment.low_rank
    replaced = {model.weight_of(module) for module in quantized}
    row = {"modules": len(quantized), "parameters": parameters, "scheme": "W4A8 g64 act per_token", "share": SOME_ERROR}
    plain = {"damp": None, "escalations": 0, "output_error": None, "quantizer": "gptq", "weight_error": SOME_ERROR}
    record = {**plain, "damp": 0.3, "output_error": SOME_ERROR}
    schemes = {str(a.scheme) for a in quantized.values()}
    report = {
        "linears": len(assignments), "quantized": len(quantized), "parameters": parameters,
        "quantized_share": SOME_ERROR, "bits_per_weight": SOME_ERROR, "bits_per_weight_quantized": SOME_ERROR,
        "bits_per_weight_model": SOME_ERROR, "table": [row] * (len(schemes) + len(set(model.dtypes.values()))),
        "skipped": {m: a.reason for m, a in assignments.items() if a.scheme is None},
        "layers": {m: record if a.needs_calibration else plain for m, a in quantized.items()}, "notes": [],
    }  # fmt: skip
    details = {
        "config": dict(model.config),
        "quantized": described,
        "float": {name: dtype for name, dtype in model.dtypes.items() if name not in replaced},
        "report": report,
        "threads": 1,
        "calibration_windows": ["0" * 16] * min(calibration_tokens // TOKENS_PER_WINDOW, MAX_WINDOWS),
        "calibration_tokens": [64, 512],
    }
    parents = [{"kind": kind, "digest": SHA256} for kind in ("model", *(["text"] if calibration_tokens else []))]
    return {
        "kind": "checkpoint", "schema_version": 1, "qtool_version": "0.1.0", "seed": 0, "recipe": dict(recipe),
        "parents": parents, "details": details,
        "files": {name: {"sha256": SHA256, "size_bytes": size} for name, size in files.items()},
    }  # fmt: skip
