"""Which nodes round their activations to INT8 although their scheme left them in 16 bits, and what that was found from.

The table is a file (docs/formats.md §package). Times differ from run to run, so a choice by measurement can too; the
table of one run, given to the next, makes the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from qtool.errors import InputRefused
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.formats import INT8
from qtool.quantize.artifacts.granularity import PerGroup, PerTokenGroup
from qtool.quantize.artifacts.scheme import LayerScheme, TensorScheme

SCHEMA = 1
LEVELS_FILE = "accuracy_levels.json"
MAX_BYTES = 64 * 2**20
ONE, PROMPT = 1, 128  # tokens that nodes are timed at


@dataclass(frozen=True, kw_only=True)
class NodeLevel:
    """One node.

    Attributes:
        modules: those that it computes and whose scheme leaves their input in 16 bits.
        int8: the decision: INT8 activations per token and block (accuracy_level 4), or as the scheme has it.
        why: in a phrase.
        added_error: what INT8 activations add to the output's error, squared, relative to the output.
        weight_error: the same of what rounding the weights did.
        weight_error_from: "quantization" (measured when the weights were rounded) or "steps" (their scales' size).
        share: added_error / weight_error.
        microseconds: tokens → [in float, in INT8].
    """

    modules: tuple[str, ...]
    int8: bool
    why: str
    added_error: float
    weight_error: float
    weight_error_from: str
    share: float
    microseconds: Mapping[str, Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class LevelTable:
    """All nodes of one checkpoint that have a choice.

    Attributes:
        checkpoint: its digest.
        max_share: the largest share that was let through.
        measured: of what: text_sha256, sequences, length, onnxruntime, threads, rounds.
        windows: overlap fingerprint of the text, so that nothing is scored on it.
        nodes: by name.
    """

    checkpoint: str
    max_share: float
    measured: Mapping[str, Any] = field(default_factory=dict)
    windows: tuple[str, ...] = ()
    nodes: Mapping[str, NodeLevel] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        """Those whose activations are rounded."""
        return tuple(module for node in self.nodes.values() if node.int8 for module in node.modules)

    def to_json(self) -> dict[str, Any]:
        """Plain data, stable."""
        return {"schema": SCHEMA, **json.loads(json.dumps(asdict(self)))}

    def to_bytes(self) -> bytes:
        """`to_json` as canonical JSON."""
        return (json.dumps(self.to_json(), indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def read_levels(path: Path) -> LevelTable:
    """A table that an earlier export wrote.

    Raises:
        InputRefused: it is not there, too large, malformed, or of another version.
    """
    remedy = f"give the {LEVELS_FILE} of a package that was exported with --accuracy-level measured"
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise InputRefused(path, "is no table of accuracy levels", remedy)
    try:
        data = json.loads(path.read_bytes())
        if data.pop("schema") != SCHEMA:
            raise ValueError
        nodes = {str(name): _node(node) for name, node in data.pop("nodes").items()}
        table = LevelTable(
            checkpoint=str(data.pop("checkpoint")),
            max_share=float(data.pop("max_share")),
            measured=dict(data.pop("measured")),
            windows=tuple(str(window) for window in data.pop("windows")),
            nodes=nodes,
        )
        if data:
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise InputRefused(path, "is no table of accuracy levels", remedy) from None
    return table


def _node(data: Mapping[str, Any]) -> NodeLevel:
    if data.keys() != NodeLevel.__dataclass_fields__.keys() or not isinstance(data["int8"], bool):
        raise ValueError
    times = {str(count): [float(time) for time in data["microseconds"][str(count)]] for count in (ONE, PROMPT)}
    if any(len(pair) != 2 or min(pair) <= 0 for pair in times.values()):
        raise ValueError
    numbers = {name: float(data[name]) for name in ("added_error", "weight_error", "share")}
    modules = tuple(str(module) for module in data["modules"])
    return NodeLevel(**{**data, **numbers, "modules": modules, "microseconds": times})


def with_int8_input(scheme: LayerScheme) -> LayerScheme | None:
    """The scheme with INT8 activations per token and block in place of 16 bits: what level 4 computes.

    None where there is no such choice: activations that are quantized already, weights that are not integers in groups.
    """
    group = scheme.weight.granularity
    if scheme.input is not None or not isinstance(group, PerGroup) or scheme.weight.format.kind != "int":
        return None
    rounded = TensorScheme(format=INT8, granularity=PerTokenGroup(group.group_size), dynamic=True)
    return replace(scheme, input=rounded)


def open_choices(checkpoint: QuantizedCheckpoint) -> dict[str, LayerScheme]:
    """The linears that have the choice, with the scheme they would get."""
    found = {module: with_int8_input(scheme) for module, scheme in checkpoint.schemes.items()}
    return {module: scheme for module, scheme in found.items() if scheme is not None}


class WithInt8Inputs(QuantizedCheckpoint):
    """A view of an opened checkpoint in which some linears round their input; codes and scales are its own.

    Args:
        checkpoint: as quantized.
        modules: of `open_choices`.
    """

    def __init__(self, checkpoint: QuantizedCheckpoint, modules: Sequence[str]) -> None:
        self.__dict__.update(checkpoint.__dict__)
        choices = open_choices(checkpoint)
        self.schemes: dict[str, LayerScheme] = {
            **checkpoint.schemes, **{module: choices[module] for module in modules}
        }


def chosen(checkpoint: QuantizedCheckpoint, table: LevelTable, origin: Path) -> WithInt8Inputs:
    """The checkpoint as a table wants it.

    Args:
        checkpoint: as quantized.
        table: of this checkpoint.
        origin: named in refusals.

    Raises:
        InputRefused: the table is of another checkpoint, or names linears that have no choice.
    """
    remedy = "measure this checkpoint: --accuracy-level measured"
    if table.checkpoint != checkpoint.digest:
        raise InputRefused(origin, f"is of another checkpoint ({table.checkpoint[:16]})", remedy)
    known = open_choices(checkpoint)
    named = [module for node in table.nodes.values() for module in node.modules]
    for module in sorted(set(named) ^ set(known)):
        raise InputRefused(f"{origin}: {module}", "is not both in the table and a linear with 16-bit inputs", remedy)
    return WithInt8Inputs(checkpoint, table.modules)
