"""probes.safetensors: what a package must answer, so that it can be verified again without its checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from qtool.errors import InputRefused
from qtool.quantize.artifacts.weights import FloatArray
from qtool.runtime.session import IntArray
from qtool.runtime.verification.node_probes import NodeProbe
from qtool.runtime.verification.noise_floor import NoiseFloor
from qtool.runtime.verification.online_probes import OnlineProbe

FILE = "probes.safetensors"
# 2 has the surroundings of nodes, 3 a graph for prompts where there is one; earlier ones are packages without.
FORMAT, READABLE = 2, (1, 2, 3)
FORMAT_WITH_PROMPTS = 3
ONLINE_ARRAYS = ("main", "main_bound", "output", "output_bound")


@dataclass(frozen=True, kw_only=True)
class PromptProbes:
    """What the graph for prompts is compared with.

    Attributes:
        nodes, online: as of Probes, by the names that the package's details give its nodes.
        losses: [1, P] float32 of the torch reference, in which INT8 weights fill the cache.
        floor: its noise.
    """

    nodes: Mapping[str, NodeProbe]
    online: Mapping[str, OnlineProbe]
    losses: FloatArray
    floor: NoiseFloor


@dataclass(frozen=True, kw_only=True)
class Probes:
    """Everything verification compares with.

    Attributes:
        nodes: by node name; online: the surroundings of those that have some.
        tokens: ids [B, T] that the whole model was compared on.
        reference_losses: [B, T − 1] float32 of the torch reference.
        floor: noise over all of `tokens`; decode_floor: over the tokens of the decode check.
        prompts: of the graph for prompts; None where there is none.
    """

    nodes: Mapping[str, NodeProbe]
    online: Mapping[str, OnlineProbe]
    tokens: IntArray
    reference_losses: FloatArray
    floor: NoiseFloor
    decode_floor: NoiseFloor
    prompts: PromptProbes | None = None


def write_probes(folder: Path, probes: Probes) -> None:
    """Write the file; same probes, same bytes."""
    arrays: dict[str, np.ndarray[Any, Any]] = {
        "tokens": probes.tokens,
        "reference_losses": probes.reference_losses,
        "floor": probes.floor.to_array(),
        "decode_floor": probes.decode_floor.to_array(),
    }
    nodes, surrounded, extra = dict(probes.nodes), dict(probes.online), probes.prompts
    if extra is not None:
        arrays |= {"prompt_losses": extra.losses, "prompt_floor": extra.floor.to_array()}
        nodes |= extra.nodes
        surrounded |= extra.online
    shapes = {}
    for name, probe in nodes.items():
        arrays |= {f"{name}#expected": probe.expected, f"{name}#bound": probe.bound}
        arrays[f"{name}#exponents"] = probe.exponents
        shapes[name] = [probe.columns, probe.block_size]
    around = {}
    for name, surroundings in surrounded.items():
        arrays |= {f"{name}#{part}": getattr(surroundings, part) for part in ONLINE_ARRAYS}
        around[name] = [surroundings.columns, surroundings.block_size]
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    # One key only: safetensors writes several in an order that changes from run to run.
    own = {} if extra is None else {"prompts": sorted(extra.nodes)}
    number = FORMAT if extra is None else FORMAT_WITH_PROMPTS
    header = json.dumps({"format": number, "nodes": shapes, "online": around, **own}, sort_keys=True)
    save_file(contiguous, folder / FILE, metadata={"qtool": header})


def read_probes(folder: Path) -> Probes:
    """Read the file of a package whose bytes were checked.

    Raises:
        InputRefused: when it is missing or not this format.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputRefused(path, "is missing", "export the package again, with verification")
    try:
        with safe_open(path, framework="np") as file:
            header = json.loads((file.metadata() or {}).get("qtool", "{}"))
            if header.get("format") not in READABLE:
                raise InputRefused(path, "has another format", "export the package again with this qtool")
            shapes: dict[str, list[int]] = header["nodes"]
            around: dict[str, list[int]] = header.get("online", {})
            nodes = {
                name: NodeProbe(
                    columns=columns,
                    block_size=block_size,
                    exponents=file.get_tensor(f"{name}#exponents"),
                    expected=file.get_tensor(f"{name}#expected"),
                    bound=file.get_tensor(f"{name}#bound"),
                )
                for name, (columns, block_size) in sorted(shapes.items())
            }
            online = {
                name: OnlineProbe(
                    columns=columns,
                    block_size=block_size,
                    **{part: file.get_tensor(f"{name}#{part}") for part in ONLINE_ARRAYS},
                )
                for name, (columns, block_size) in sorted(around.items())
            }
            prompts = None
            if "prompts" in header:
                own = set(header["prompts"])
                prompts = PromptProbes(
                    nodes={name: probe for name, probe in nodes.items() if name in own},
                    online={name: probe for name, probe in online.items() if name in own},
                    losses=file.get_tensor("prompt_losses"),
                    floor=NoiseFloor.from_array(file.get_tensor("prompt_floor")),
                )
                nodes = {name: probe for name, probe in nodes.items() if name not in own}
                online = {name: probe for name, probe in online.items() if name not in own}
            return Probes(
                nodes=nodes,
                online=online,
                tokens=file.get_tensor("tokens"),
                reference_losses=file.get_tensor("reference_losses"),
                floor=NoiseFloor.from_array(file.get_tensor("floor")),
                decode_floor=NoiseFloor.from_array(file.get_tensor("decode_floor")),
                prompts=prompts,
            )
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputRefused(path, "is damaged", "export the package again") from error
