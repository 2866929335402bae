"""What quantization did, as numbers: how much was quantized, to how many bits, what was skipped and why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from torch import Tensor

from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.rule import Assignment
from qtool.quantize.artifacts.tensor_file import Streamed


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """How one linear came out.

    Attributes:
        quantizer: the one that ran.
        weight_error: ‖Ŵ − W‖² / ‖W‖².
        output_error: tr(E H Eᵀ) / tr(W H Wᵀ) on the calibration inputs; None when none were needed.
        damp: GPTQ's damping as a fraction of mean(diag H); None without a Hessian.
        escalations: how often the damping was multiplied by ten.
        refined: the block's output error after its refinement, by that before it, on some of the calibration text;
            None where nothing was refined.
    """

    quantizer: str
    weight_error: float
    output_error: float | None
    damp: float | None
    escalations: int
    refined: float | None = None


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What distillation came to.

    Attributes:
        kl_before, kl_after: KL(float || quantized) in nats per token, on the sequences that were held back.
        loss_before, loss_after: cross entropy there, nats per token.
        epoch: of the iterate that was kept; 0 is the start.
    """

    kl_before: float
    kl_after: float
    loss_before: float
    loss_after: float
    epoch: int


@dataclass(frozen=True, kw_only=True)
class BitWidthRow:
    """One row of the bit-width table: the modules of one scheme and their share of all the model's parameters."""

    scheme: str
    modules: int
    parameters: int
    share: float


@dataclass(frozen=True, kw_only=True)
class QuantizationReport:
    """The result of `quantize_model`, without the weights.

    Attributes:
        linears: how many linears the model has; a tied head counts as one.
        quantized: how many of them were quantized.
        parameters: all parameters of the model, a tied head counted once.
        quantized_share: quantized parameters / all parameters.
        bits_per_weight: stored bits per parameter of all linears: codes, scales, zero points, side products, and each
            site's transform once.
        bits_per_weight_quantized: the same over the quantized linears alone.
        bits_per_weight_model: stored bits per parameter over the whole model.
        table: bit widths; the last row is what stays in float.
        skipped: linear to the reason why it stays in float.
        layers: linear to how it came out.
        notes: rules that were applied without being asked for.
        distilled: what distillation came to; None where the recipe has none. The layers' errors are those before it.
    """

    linears: int
    quantized: int
    parameters: int
    quantized_share: float
    bits_per_weight: float
    bits_per_weight_quantized: float
    bits_per_weight_model: float
    table: tuple[BitWidthRow, ...]
    skipped: Mapping[str, str]
    layers: Mapping[str, LayerRecord]
    notes: tuple[str, ...]
    distilled: Distilled | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain data, stable: the manifest's details and `--json` carry it."""
        return asdict(self)


class Ledger:
    """Collects what is written, shard by shard, and adds it up."""

    def __init__(self, assignments: Mapping[str, Assignment]) -> None:
        self._assignments = assignments
        self._quantized: dict[str, tuple[str, int, int]] = {}
        self._floats: dict[str, tuple[int, int]] = {}
        self._layers: dict[str, LayerRecord] = {}
        self._notes: list[str] = []
        self._sites: set[str] = set()
        self._taken: tuple[int, int] = (0, 0)

    def assign(self, assignments: Mapping[str, Assignment]) -> None:
        """What every linear got, where it is known only afterwards."""
        self._assignments = assignments

    def quantized(self, module: str, tensor: QuantizedTensor, record: LayerRecord | None) -> None:
        """A quantized linear was written; no record where there was no float weight to compare it with."""
        bits = tensor.stored_bits + (0 if tensor.site in self._sites else tensor.transform_bits)
        self._sites.add(tensor.site)
        self._quantized[module] = (str(tensor.scheme), prod(tensor.shape), bits)
        if record is not None:
            self._layers[module] = record

    def kept(self, name: str, tensor: Tensor | Streamed) -> None:
        """A tensor was written in float."""
        self._floats[name] = (tensor.numel(), tensor.numel() * tensor.element_size() * 8)

    def take(self) -> dict[str, Any]:
        """What was written since the last call, as plain data for `restore`. A site's linears are taken together."""
        quantized, floats = self._taken
        self._taken = len(self._quantized), len(self._floats)
        modules = list(self._quantized)[quantized:]
        return {
            "quantized": {module: list(self._quantized[module]) for module in modules},
            "layers": {module: asdict(self._layers[module]) for module in modules if module in self._layers},
            "floats": {name: list(self._floats[name]) for name in list(self._floats)[floats:]},
        }

    def restore(self, taken: Mapping[str, Any]) -> None:
        """Add what an earlier run's `take` gave."""
        self._quantized |= {module: (str(s), int(n), int(bits)) for module, (s, n, bits) in taken["quantized"].items()}
        self._layers |= {module: LayerRecord(**record) for module, record in taken["layers"].items()}
        self._floats |= {name: (int(n), int(bits)) for name, (n, bits) in taken["floats"].items()}
        self._taken = len(self._quantized), len(self._floats)

    def note(self, text: str) -> None:
        """A rule was applied without being asked for."""
        self._notes.append(text)

    def report(self) -> QuantizationReport:
        """Add it all up."""
        skipped = {a.module: a.reason for a in self._assignments.values() if a.scheme is None}
        tied_head = "lm_head" in skipped and "lm_head.weight" not in self._floats
        names = {m: "model.embed_tokens.weight" if tied_head and m == "lm_head" else f"{m}.weight" for m in skipped}
        quantized = [(n, bits) for _, n, bits in self._quantized.values()]
        linears = quantized + [self._floats[name] for name in names.values()]
        everything = quantized + list(self._floats.values())
        parameters = sum(n for n, _ in everything)
        return QuantizationReport(
            linears=len(self._assignments),
            quantized=len(self._quantized),
            parameters=parameters,
            quantized_share=sum(n for n, _ in quantized) / parameters,
            bits_per_weight=_mean_bits(linears),
            bits_per_weight_quantized=_mean_bits(quantized),
            bits_per_weight_model=_mean_bits(everything),
            table=tuple(self._table(parameters)),
            skipped=skipped,
            layers={m: self._layers[m] for m in self._assignments if m in self._layers},
            notes=tuple(self._notes),
        )

    def _table(self, parameters: int) -> list[BitWidthRow]:
        rows: dict[str, list[int]] = {}
        for module in self._assignments:
            if module in self._quantized:
                scheme, count, _ = self._quantized[module]
                rows.setdefault(scheme, []).append(count)
        by_dtype: dict[str, list[int]] = {}
        for count, bits in self._floats.values():
            by_dtype.setdefault(f"float {bits // max(count, 1)} bit", []).append(count)
        return [
            BitWidthRow(scheme=scheme, modules=len(counts), parameters=sum(counts), share=sum(counts) / parameters)
            for scheme, counts in [*rows.items(), *sorted(by_dtype.items())]
        ]


def _mean_bits(counted: list[tuple[int, int]]) -> float:
    parameters = sum(n for n, _ in counted)
    return sum(bits for _, bits in counted) / parameters if parameters else 0.0
