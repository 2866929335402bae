"""The rows of the accuracy table: scheme × method × quantizer, as recipes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from qtool.quantize.artifacts.recipe import Recipe

PLANNER = "planner"
# The head stays in float: the rows are about the blocks.
SCHEMES: Mapping[str, Mapping[str, Any]] = {
    "W4A8": {"scheme": "W4A8", "activation": "per_token"},
    "W4A8, integer scales": {"scheme": "W4A8", "activation": "per_token", "scale": "integer"},
    "W4A8 g64": {"scheme": "W4A8", "activation": "per_token_group"},
    "W8A8 g64": {"scheme": "W8A8", "activation": "per_token_group", "group_size": 64},
    "W4A4": {"scheme": "W4A4", "activation": "per_token"},
    "W4A4 g64": {"scheme": "W4A4", "activation": "per_token_group"},
    "W8A8 per tensor": {"scheme": "W8A8", "activation": "per_tensor"},
    "FP8": {"scheme": "FP8_DYNAMIC"},
    "W4A8-FP": {"scheme": "W4A8_FP"},
}
WEIGHED = {"token_weights": "gradient"}
ROTATE = {"model": ["fold_norms", "rotate"]}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "none": {},
    "smooth": {"model": ["smooth"]},
    "smooth, searched": {"model": ["smooth"], "smooth_search": "aqas"},
    "rotate": ROTATE,
    "hadamard": {"transform": "hadamard"},
    "rotate + hadamard": {**ROTATE, "transform": "hadamard"},
    "rotate + hadamard, unclipped": {**ROTATE, "transform": "hadamard", "activation_clip": 1.0},
    "hadamard + RRS": {"transform": "hadamard", "runtime_smooth": "robust"},
    "fold + hadamard + RRS": {"model": ["fold_norms"], "transform": "hadamard", "runtime_smooth": "robust"},
    "smooth + hadamard + RRS": {"model": ["smooth"], "transform": "hadamard", "runtime_smooth": "robust"},
    "hadamard + RRS, frozen": {"transform": "hadamard", "runtime_smooth": "frozen"},
    "rotate + RRS": {**ROTATE, "transform": "hadamard", "runtime_smooth": "robust"},
    "rotate + RRS, published": {**ROTATE, "transform": "hadamard", "runtime_smooth": "published"},
    "rotate + RRS, frozen": {**ROTATE, "transform": "hadamard", "runtime_smooth": "frozen"},
    **{f"QUAD {rank}": {"transform": "quad", "rank": rank} for rank in (8, 16, 24, 32, 64)},
    **{f"QUAD {rank} + RRS": {"transform": "quad", "rank": rank, "runtime_smooth": "robust"} for rank in (16, 32)},
    "QUAD 16 + RRS, frozen": {"transform": "quad", "rank": 16, "runtime_smooth": "frozen"},
    **{f"{PLANNER} {bits}": {"max_bits": bits, **WEIGHED} for bits in (4.9, 5.3, 8.7)},
    **{f"{PLANNER} {bits}, tokens alike": {"max_bits": bits} for bits in (4.9, 5.3)},
    **{f"{PLANNER} {bits}, mixed": {"max_bits": bits, "mixed": True, **WEIGHED} for bits in (4.9, 5.3)},
}
QUANTIZERS: Mapping[str, Mapping[str, Any]] = {
    "RTN": {"quantizer": "rtn"},
    "GPTQ": {"quantizer": "gptq"},
    "GPTQ, tokens weighed": {"quantizer": "gptq", **WEIGHED},
    "GPTQ, distilled": {"quantizer": "gptq", **WEIGHED, "distill": {}},
    "GPTQ + low rank 16": {"quantizer": "gptq", "low_rank": 16},
    "signed rounding": {"quantizer": "autoround"},
}
EIGHT_BITS = ("W8A8 g64", "W8A8 per tensor", "FP8")  # planned within 8.7 bits, the others within 4.9 and 5.3
INTEGER_FOUR = ("W4A4", "W4A4 g64")
INTEGER_WEIGHTS = ("W4A8", "W4A8, integer scales", "W4A8 g64", "W8A8 g64", *INTEGER_FOUR, "W8A8 per tensor")
EXPORTED = ("W4A8 g64", "W8A8 g64")  # what ONNX Runtime computes on a CPU: rows of these are scored there too


@dataclass(frozen=True)
class Row:
    """One row; `max_bits` only where the planner chooses, `mixed` where it may choose 8 bits."""

    scheme: str
    method: str
    quantizer: str
    recipe: Recipe
    max_bits: float | None = None
    mixed: bool = False

    @property
    def name(self) -> str:
        return f"{self.scheme} | {self.method} | {self.quantizer}"


def rows(schemes: list[str], methods: list[str], quantizers: list[str]) -> Iterator[Row]:
    """Every combination that makes sense."""
    for scheme in schemes:
        for method in methods:
            if ("RRS" in method or "unclipped" in method) and scheme not in INTEGER_FOUR[:1]:
                continue  # Runtime Smooth and clips are of INT4 activations
            limit = METHODS[method].get("max_bits")
            if limit is not None and (limit > 8) != (scheme in EIGHT_BITS):
                continue
            for quantizer in quantizers:
                if quantizer == "signed rounding" and scheme not in INTEGER_WEIGHTS:
                    continue
                fields = {**SCHEMES[scheme], **METHODS[method], **QUANTIZERS[quantizer]}
                bits, mixed = fields.pop("max_bits", None), fields.pop("mixed", False)
                recipe = Recipe.preset(fields.pop("scheme"), lm_head="float", **fields)
                yield Row(scheme, method, quantizer, recipe, bits, mixed)
