"""From the tensors that a checkpoint has to those that its network wants: other names, and slices of packed experts.

A slice is a range of bytes like any other tensor, so one expert is read without the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from qtool.errors import InputRefused
from qtool.quantize.architectures import Stored, architecture_of, expected_tensors, expert_count
from qtool.quantize.architectures.shapes import Expected
from qtool.quantize.inputs.safetensors_store import Placed


def network_tensors(label: str, tensors: Mapping[str, Placed], config: Mapping[str, Any]) -> dict[str, Placed]:
    """Every tensor of the network that the files hold, by its name in the network; what belongs to none keeps the
    name it has.

    Args:
        label: how messages name the model.
        tensors: the files' tensors by the names they have there.
        config: a validated config.

    Raises:
        InputRefused: a packed tensor of a wrong shape, or a tensor that only a quantized model has.
    """
    row = architecture_of(config)
    for name in sorted(tensors):
        if row.quantized_suffixes and name.endswith(row.quantized_suffixes):
            raise InputRefused(f"{label}: {name}", "the model is already quantized", row.float_remedy)
    experts = expert_count(config)
    found: dict[str, Placed] = {}
    used = set()
    for wanted in expected_tensors(config):
        for name, stored in _places(wanted):
            if name in tensors:
                found[wanted.name] = _slice(name, tensors[name], wanted, stored, experts)
                used.add(name)
                break
    return {**found, **{name: placed for name, placed in tensors.items() if name not in used}}


def _places(wanted: Expected) -> Iterator[tuple[str, Stored]]:
    """The names under which a tensor may lie, the network's own first."""
    for stored in (Stored(name=wanted.template.name), *wanted.template.stored):
        yield wanted.prefix + stored.name.format(expert=wanted.expert), stored


def _slice(name: str, placed: Placed, wanted: Expected, stored: Stored, experts: int) -> Placed:
    file, record = placed
    packed = wanted.expert is not None and "{expert}" not in stored.name
    one = wanted.shape[::-1] if stored.transposed else wanted.shape
    parts = 1 if stored.half is None else 2
    whole = (*((experts,) if packed else ()), one[0] * parts, *one[1:])
    if not packed and parts == 1 and not stored.transposed:
        return placed  # its shape is checked with all others
    if record.shape != whole:
        why = f"has shape {record.shape}, config.json asks for {whole}"
        raise InputRefused(f"{file.label}: {name}", why, "check config.json")
    size = record.size // (parts * (experts if packed else 1))
    first = parts * (wanted.expert or 0 if packed else 0) + (stored.half or 0)
    start = record.start + first * size
    return file, replace(record, shape=wanted.shape, start=start, size=size, transposed=stored.transposed)
