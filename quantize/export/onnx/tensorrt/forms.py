"""Which schemes TensorRT's explicit quantization computes, and as which nodes: one row a form.

    int4 blocks   MatMul(x, DequantizeLinear(INT4 [K, N], scale [K / b, N], axis 0, block_size b))
    fp8, int8     MatMul(DQ(Q(x, s)), DequantizeLinear(weight [K, N], scale [N], axis 1)), s one number

TensorRT's documents: symmetric quantization only; activations per tensor, weights per channel or in blocks; INT4 for
weights alone, in blocks of 64 or 128 along one of the last two dimensions; scales in float16 or float32, of the type
that the product computes in; a strongly typed network. What has no row is refused with the layer's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from qtool.errors import UsageError
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.formats import FP8_E4M3, INT4, INT8
from qtool.quantize.artifacts.granularity import PerChannel, PerGroup, PerTensor
from qtool.quantize.artifacts.scheme import LayerScheme, TensorScheme
from qtool.quantize.artifacts.weights import WeightSource

INT4_BLOCKS = (64, 128)
STATIC_FP8 = "quantize with --scheme FP8_DYNAMIC --activation per_tensor"
STATIC_INT8 = "quantize with --scheme W8A8 --activation per_tensor"
FOUR_BIT = "quantize with --scheme W4A16 --group-size 64 or 128"
ALL = f"{FOUR_BIT}, or {STATIC_FP8.removeprefix('quantize ')}, or {STATIC_INT8.removeprefix('quantize ')}"


@dataclass(frozen=True, kw_only=True)
class Form:
    """One row.

    Attributes:
        name: in manifests.
        weight: of the stored codes, an ONNX element type by name.
        activation: of the quantized input, None where it stays float16.
        fits: whether a scheme is of this form.
    """

    name: str
    weight: str
    activation: str | None
    fits: Callable[[LayerScheme], bool]


def _plain(weight: TensorScheme) -> bool:
    return weight.symmetric and weight.scale == "float"


def _static(act: TensorScheme | None) -> bool:
    return act is not None and not act.dynamic and isinstance(act.granularity, PerTensor)


def _int4(scheme: LayerScheme) -> bool:
    weight = scheme.weight
    blocks = isinstance(weight.granularity, PerGroup)
    return weight.format is INT4 and _plain(weight) and blocks and scheme.input is None


def _both(scheme: LayerScheme, element: object) -> bool:
    weight, act = scheme.weight, scheme.input
    same = weight.format is element and act is not None and act.format is element
    return same and _plain(weight) and isinstance(weight.granularity, PerChannel) and _static(act)


FORMS: tuple[Form, ...] = (
    Form(name="int4 blocks", weight="INT4", activation=None, fits=_int4),
    Form(
        name="fp8 per tensor",
        weight="FLOAT8E4M3FN",
        activation="FLOAT8E4M3FN",
        fits=lambda scheme: _both(scheme, FP8_E4M3),
    ),
    Form(name="int8 per tensor", weight="INT8", activation="INT8", fits=lambda scheme: _both(scheme, INT8)),
)


def form_of(module: str, scheme: LayerScheme, columns: int) -> Form:
    """The form of one linear.

    Args:
        module: its name.
        scheme: its scheme.
        columns: K.

    Raises:
        UsageError: naming the layer, why TensorRT does not compute it, and a scheme that it does compute.
    """
    found = next((form for form in FORMS if form.fits(scheme)), None)
    why, remedy = _block_refusal(scheme, columns) if found is not None else _refusal(scheme)
    if found is None or why:
        raise UsageError(f"{module} ({scheme})", f"target tensorrt {why}", remedy)
    return found


def check_schemes(source: WeightSource) -> None:
    """Refuse a checkpoint of which some layer has no form.

    Raises:
        UsageError: see `form_of`; also for online transforms and a quantized cache.
    """
    if not isinstance(source, QuantizedCheckpoint):
        return
    if source.kv is not None:
        why = "target tensorrt keeps its cache in float16"
        raise UsageError(f"kv ({source.kv})", why, "quantize without --kv")
    for module, scheme in source.schemes.items():
        if source.transformed(module):
            remedy = "use --rotate or --smooth, which cost nothing online"
            raise UsageError(f"{module} ({scheme})", "target tensorrt runs no online transforms", remedy)
        form_of(module, scheme, source.shapes[module][1])


def _block_refusal(scheme: LayerScheme, columns: int) -> tuple[str, str]:
    granularity = scheme.weight.granularity
    if not isinstance(granularity, PerGroup):
        return "", ""
    size = granularity.group_size
    if size not in INT4_BLOCKS:
        return f"has INT4 blocks of 64 and 128, not {size}", FOUR_BIT
    if columns % size:
        remedy = "leave this layer in float (recipe: scheme: float), or use --group-size 64"
        return f"wants blocks that divide the {columns} inputs", remedy
    return "", ""


def _refusal(scheme: LayerScheme) -> tuple[str, str]:
    weight, act = scheme.weight, scheme.input
    fp8_input = act is not None and act.format is FP8_E4M3
    rows: tuple[tuple[bool, str, str], ...] = (
        (weight.format.name == "fp4_e2m1", "has no standard form for FP4 weights", ALL),
        (not weight.symmetric, "computes symmetric weights only", "quantize without --asymmetric"),
        (weight.scale != "float", "knows float scales only", "quantize without --scale"),
        (weight.format is INT4 and act is not None, "has INT4 for weights only, behind float inputs", FOUR_BIT),
        (weight.format is INT4, "has INT4 in blocks only, not per channel", FOUR_BIT),
        (act is None, "has weight-only quantization for INT4 alone", ALL),
        (
            not _static(act),
            "quantizes activations with one stored scale a tensor, not at run time",
            STATIC_FP8 if fp8_input else STATIC_INT8,
        ),
    )
    return next(((why, remedy) for wrong, why, remedy in rows if wrong), ("has no form for this scheme", ALL))
