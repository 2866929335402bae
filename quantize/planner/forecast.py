"""What quantizing a model will take, from its config alone: size, peak memory and time. Torch-free; no weight is read.

Size is counted (forecast_size). Memory is counted by the steps of the run: what is held all the time, and the largest
of what each step adds; only the libraries' own memory is a measured constant. Time is a count of operations over the
speed of one matrix product on this machine: a rough figure, within a factor of two.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from qtool.quantize.architectures import architecture_of, tensor_shapes
from qtool.quantize.artifacts.rule import Assignment
from qtool.quantize.planner.forecast_distillation import distilling_bytes, distilling_operations
from qtool.quantize.planner.forecast_package import package_weights
from qtool.quantize.planner.forecast_refinement import refining_bytes, refining_operations
from qtool.quantize.planner.forecast_size import BLOCKS, EMBEDDING, HEAD, FloatModel, Size, checkpoint_size
from qtool.quantize.planner.forecast_weighing import weighing_bytes, weighing_operations

# Measured: Python, torch, transformers and what they load, on Linux x86-64 with torch 2.13 and transformers 5.23.
LIBRARY_BYTES = 530_000_000
TOKENS_PER_BATCH = 2048
LARGE_ELEMENTS, PIECE_ELEMENTS = 2**25, 2**22
ROWS_AT_ONCE = 4096  # of GPTQ
START_SECONDS = 10.0
HASHED_BYTES_PER_S = 3e8  # reading, hashing and checking the source, and hashing what is written
ROUNDING_OPERATIONS = 1500  # per weight, of a matrix product's speed: the clip search walks memory 30 times
SLOWER = {"float64": 3.0, "rounding": 2.0}  # than the float32 product that is timed, per operation
UNTYING = frozenset({"fold_norms", "rotate"})


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak memory in bytes, and the parts that are there at the peak.

    Attributes:
        peak: their sum.
        parts: by name, in the order of the run.
    """

    peak: int
    parts: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a run of `qtool quantize` will take.

    Attributes:
        size: on disk.
        package: bytes of the weights (model.onnx.data) once it is exported to ONNX, or None where the export computes
            no such scheme.
        memory: at the peak.
        operations: of float32 multiply-adds' two operations each, slower ones counted as more.
        seconds: of the run, rough.
    """

    size: Size
    package: int | None
    memory: Memory
    operations: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How much text is read: `sequences` of `length` tokens."""

    sequences: int
    length: int

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.sequences * self.length

    @property
    def batch(self) -> int:
        """Tokens that run together."""
        return min(self.sequences, max(1, TOKENS_PER_BATCH // self.length)) * self.length


def forecast(
    config: Mapping[str, Any],
    assignments: Mapping[str, Assignment],
    *,
    dtype_of: Callable[[str], str],
    recipe: Mapping[str, Any],
    companions: Mapping[str, int],
    calibration: Calibration,
    operations_per_s: float,
) -> Forecast:
    """Foretell a run.

    Args:
        config: a validated config.
        assignments: what each linear gets.
        dtype_of: the dtype in which a tensor of the model is stored: "F32", "F16" or "BF16".
        recipe: as plain data.
        companions: bytes of the files beside the tensors, by name.
        calibration: the text, where one is read.
        operations_per_s: of a float32 matrix product on this machine.
    """
    transforms = tuple(recipe.get("model", ()))
    model = float_model(config, transforms, dtype_of)
    read = "smooth" in transforms or any(a.needs_calibration or a.static_input for a in assignments.values())
    operations = _operations(model, assignments, calibration)
    weighed = recipe.get("token_weights") == "gradient" and any(a.needs_calibration for a in assignments.values())
    if weighed:
        operations += weighing_operations(model, sequences=calibration.sequences, length=calibration.length)
    distill, text = recipe.get("distill"), {"sequences": calibration.sequences, "length": calibration.length}
    if distill is not None:
        operations += distilling_operations(model, distill, **text)
    size = checkpoint_size(
        model,
        assignments,
        recipe,
        companions,
        calibration_tokens=calibration.tokens if read or distill is not None else 0,
    )
    whole = {"smooth": "smooth" in transforms, "weighed": weighed, "distilled": distill is not None}
    source = sum(4 * prod(shape) for shape in model.shapes.values())
    plain = START_SECONDS + (source + size.whole) / HASHED_BYTES_PER_S
    return Forecast(
        size=size,
        package=package_weights(model, assignments),
        memory=_memory(model, assignments, calibration, **whole),
        operations=operations,
        seconds=plain + operations / operations_per_s,
    )


def float_model(
    config: Mapping[str, Any], transforms: Sequence[str], dtype_of: Callable[[str], str]
) -> FloatModel:
    """The model after the recipe's transforms of the whole: what they change is stored in float32, and folded norms
    untie the head."""
    shapes = dict(tensor_shapes(config))
    dtypes = {name: dtype_of(name) for name in shapes}
    if UNTYING & set(transforms) and f"{HEAD}.weight" not in shapes:
        shapes[f"{HEAD}.weight"] = shapes[f"{EMBEDDING}.weight"]
        config = {**config, "tie_word_embeddings": False}
    if UNTYING & set(transforms):
        dtypes = dict.fromkeys(shapes, "F32")
    elif "smooth" in transforms:
        changed = ("norm.weight", "proj.weight", "v_proj.bias", "up_proj.bias")
        dtypes = {name: "F32" if name.endswith(changed) else dtype for name, dtype in dtypes.items()}
    return FloatModel(
        config=config,
        shapes=shapes,
        dtypes={name: dtypes.get(name, "F32") for name in shapes},
        groups=architecture_of(config).linear_groups,
    )


def _calibrated_blocks(model: FloatModel, assignments: Mapping[str, Assignment]) -> int:
    """How many blocks, from the first on, the text runs through."""
    wanting = {name for name, a in assignments.items() if a.needs_calibration or a.static_input}
    if HEAD in wanting and not (model.tied and not assignments[HEAD].static_input):
        return model.blocks
    indices = [int(name.removeprefix(BLOCKS).partition(".")[0]) for name in wanting if name.startswith(BLOCKS)]
    return max(indices, default=-1) + 1


def _memory(
    model: FloatModel,
    assignments: Mapping[str, Assignment],
    calibration: Calibration,
    *,
    smooth: bool,
    weighed: bool,
    distilled: bool,
) -> Memory:
    calibrated = _calibrated_blocks(model, assignments) > 0
    width = int(model.config["hidden_size"])
    parts = {"libraries": LIBRARY_BYTES}
    if calibrated or smooth:
        parts["hidden states"] = 4 * calibration.tokens * width
    steps = {"head": _head_bytes(model, assignments), "reading": _reading_bytes(model)}
    for group in model.groups:
        steps[f"block, at {group[0]}"] = _group_bytes(model, assignments, group, calibration, calibrated=calibrated)
    text = {"sequences": calibration.sequences, "length": calibration.length}
    refining = [refining_bytes(model, assignments, block, **text) for block in range(model.blocks)]
    if any(refining):
        steps["refining a block"] = max(refining)
    if weighed:
        steps["weighing tokens"] = weighing_bytes(model, **text, batch=calibration.batch)
    if distilled:
        steps["distilling"] = distilling_bytes(model, **text)
    if smooth:
        steps["smoothing"] = _block_bytes(model) + 8 * calibration.batch * _widest(model)
    largest = max(steps, key=lambda step: steps[step])
    parts[largest] = steps[largest]
    return Memory(peak=sum(parts.values()), parts=parts)


def _block_bytes(model: FloatModel) -> int:
    """A block in float32."""
    return 4 * sum(prod(shape) for name, shape in model.shapes.items() if name.startswith(f"{BLOCKS}0."))


def _widest(model: FloatModel) -> int:
    return max(max(shape) for name, shape in model.shapes.items() if name.startswith(f"{BLOCKS}0."))


def _group_bytes(
    model: FloatModel,
    assignments: Mapping[str, Assignment],
    group: Sequence[str],
    calibration: Calibration,
    *,
    calibrated: bool,
) -> int:
    """While a group of linears is quantized: the block, the codes so far, and the largest of the group's steps."""
    names = [f"{BLOCKS}0.{path}" for path in group]
    mine = [assignments[name] for name in names]
    columns = model.matrix(names[0])[1]
    rows = sum(model.matrix(name)[0] for name in names)
    earlier = [f"{BLOCKS}0.{path}" for g in model.groups[: model.groups.index(group)] for path in g]
    codes = sum(prod(model.matrix(name)) for name in (*earlier, *names))
    transformed = any(a.transform or a.frozen_smooth for a in mine)
    stacked = 4 * rows * columns * ((len(group) > 1 or not calibrated) + transformed)
    largest = max(model.matrix(name)[0] for name in names)
    # The piece that is rounded, permuted, as it is worked on, its codes and their error; or the error of the whole.
    rounding = max(16 * min(rows, ROWS_AT_ONCE) * columns, 12 * largest * columns)
    if any(a.low_rank for a in mine):
        rounding = max(rounding, 32 * largest * columns)
    if not calibrated:
        return codes + stacked + rounding
    moment = 8 * columns**2 if any(a.needs_calibration for a in mine) else 0
    activations = 4 * calibration.batch * (3 * _widest(model) + 4 * int(model.config["hidden_size"]))
    steps = (moment // 2 + activations, moment + stacked, moment // 2 + stacked + rounding, activations)
    return _block_bytes(model) + codes + moment + max(steps)


def _head_bytes(model: FloatModel, assignments: Mapping[str, Assignment]) -> int:
    rows, columns = model.matrix(HEAD)
    head = assignments[HEAD]
    if head.scheme is None:
        return 0
    whole = rows * columns <= LARGE_ELEMENTS or head.low_rank > 0 or head.scheme.weight.scale == "e4m3"
    gptq = head.needs_calibration and not model.tied
    piece = rows * columns if whole else PIECE_ELEMENTS * (4 if gptq else 1)
    moment = 16 * columns**2 if gptq else 0
    return (24 if not head.low_rank else 40) * piece + moment + (0 if whole else rows * columns // 16)


def _reading_bytes(model: FloatModel) -> int:
    """The largest tensor that is read whole, as it is stored, while it is widened, and widened."""
    largest = max(count for count in map(prod, model.shapes.values()) if count <= LARGE_ELEMENTS)
    return 10 * max(largest, PIECE_ELEMENTS if largest < LARGE_ELEMENTS else 0)


def _operations(model: FloatModel, assignments: Mapping[str, Assignment], calibration: Calibration) -> float:
    """Float32 operations of the run, slower ones counted as more."""
    blocks = _calibrated_blocks(model, assignments)
    total = 0.0
    for index in range(model.blocks):
        for group in model.groups:
            names = [f"{BLOCKS}{index}.{path}" for path in group]
            total += _group_operations(model, [assignments[n] for n in names], names, calibration, run=index < blocks)
        total += refining_operations(
            model, assignments, index, sequences=calibration.sequences, length=calibration.length
        )
    head = [assignments[HEAD]]
    return total + _group_operations(model, head, [HEAD], calibration, run=False)


def _group_operations(
    model: FloatModel, mine: Sequence[Assignment], names: Sequence[str], calibration: Calibration, *, run: bool
) -> float:
    columns = model.matrix(names[0])[1]
    rows = sum(model.matrix(n)[0] for n, a in zip(names, mine, strict=True) if a.scheme is not None)
    total = float(ROUNDING_OPERATIONS * rows * columns)
    if run:  # to reach the next groups' inputs, and to leave the block
        total += 2 * 2 * calibration.tokens * sum(prod(model.matrix(n)) for n in names)
    if any(a.needs_calibration for a in mine):
        total += 2 * calibration.tokens * columns**2
        total += SLOWER["float64"] * (columns**3 + 4 * rows * columns**2)
        total += SLOWER["rounding"] * rows * columns**2
    return total
