"""What ONNX Runtime makes of a model: the graph that its session runs, saved and read back.

The runtime loads a stand-in without weights (see `stand_in`) in a child process, and the weights of the saved graph go
to the null device: a model of any size costs the disk its graph. In memory there are the weights that the runtime
computes while loading (unpacked FP16, transposed codes) as in any session, none packed for kernels, and while it saves
one tensor at a time.

Every linear of the source carries a mark in its node's name, which the fusions keep; a renamed node is found by the
value it makes.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from qtool.errors import InputRefused
from qtool.runtime.explain.child import run_child
from qtool.runtime.explain.graph import GraphView, Node
from qtool.runtime.explain.linears import Linear, find_linears
from qtool.runtime.explain.stand_in import read_graph, write_stand_in

LEVELS = {
    "all": "ORT_ENABLE_ALL",
    "extended": "ORT_ENABLE_EXTENDED",
    "basic": "ORT_ENABLE_BASIC",
    "none": "ORT_DISABLE_ALL",
}
_SAVED_WEIGHTS = "optimized.data"
_MARK = re.compile(r"#linear(\d+)#")
_SEARCH_DEPTH = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The session options that decide what is fused.

    Attributes:
        level: a key of LEVELS.
        config: session configuration entries.
    """

    level: str = "all"
    config: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Optimized:
    """A model before and after.

    Attributes:
        source: the file's graph.
        view: the graph that runs.
        linears: the linears of the file, in its order.
        ran_as: index in `linears` to the node that computes it.
        level: the level at which it loaded.
        refused: what the runtime said at the level asked for, where it loaded only at a lower one.
        onnxruntime: the runtime's version.
    """

    source: GraphView
    view: GraphView
    linears: tuple[Linear, ...]
    ran_as: Mapping[int, Node]
    level: str
    refused: str | None
    onnxruntime: str


def optimize(path: Path, settings: Settings) -> Optimized:
    """Let the runtime load a model file and read back the graph it would run.

    Where the default level refuses a graph with FP8 tensors, the basic one is tried.

    Raises:
        UsageError: the file does not exist.
        InputRefused: it is not an ONNX model, its data are missing, or the runtime refuses or crashes on it.
        EnvironmentFault: the runtime takes too long, or is not installed.
    """
    model = read_graph(path)
    source = GraphView(model)
    linears = find_linears(source)
    names = [str(linear.node.name) for linear in linears]
    with tempfile.TemporaryDirectory(prefix="qtool-explain-") as temporary:
        folder = Path(temporary)
        for index, linear in enumerate(linears):
            linear.node.name = f"{linear.node.name}#linear{index}#"
        stand_in = write_stand_in(model, path, folder)
        for linear, name in zip(linears, names, strict=True):
            linear.node.name = name
        level, refused, version = _load(path, stand_in, folder, settings, source)
        optimized = onnx.load_model(str(folder / "optimized.onnx"), load_external_data=False)
    view = GraphView(optimized)
    return Optimized(
        source=source,
        view=view,
        linears=tuple(linears),
        ran_as=_trace(source, linears, view),
        level=level,
        refused=refused,
        onnxruntime=version,
    )


def _load(
    path: Path, stand_in: Path, folder: Path, settings: Settings, source: GraphView
) -> tuple[str, str | None, str]:
    """Load at the level asked for, or FP8 at a lower one: (level, refusal at the level asked for, version)."""
    found = _run_child(path, stand_in, folder, settings)
    if "error" not in found:
        return settings.level, None, found["version"]
    message = _MARK.sub("", found["message"].splitlines()[0]).replace(str(stand_in), path.name)
    if "float8" in message and settings.level in ("all", "extended"):
        again = _run_child(path, stand_in, folder, Settings(level="basic", config=settings.config))
        if "error" not in again:
            return "basic", message, again["version"]
    raise InputRefused(path, f"ONNX Runtime {found['version']} does not load it ({message})", _remedy(message, source))


def _remedy(message: str, source: GraphView) -> str:
    types = {tensor.dtype for tensor in source.stored.values()}
    if "NOT_IMPLEMENTED" in message and "bfloat16" in types:
        return "the CPU has no kernels for bfloat16: export in float32 or float16"
    if "opset" in message.lower() or "IR version" in message:
        return "export with an older opset and IR version"
    return "export it again for ONNX Runtime's CPU provider"


def _run_child(path: Path, stand_in: Path, folder: Path, settings: Settings) -> dict[str, str]:
    _discard_saved_weights(folder)
    asked = {
        "model": str(stand_in),
        "optimized": str(folder / "optimized.onnx"),
        "level": LEVELS[settings.level],
        "config": {
            **settings.config,
            "session.disable_prepacking": "1",
            "session.optimized_model_external_initializers_file_name": _SAVED_WEIGHTS,
            "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
        },
    }
    return run_child("load_child.py", path, asked)


def _discard_saved_weights(folder: Path) -> None:
    (folder / "optimized.onnx").unlink(missing_ok=True)
    if os.name == "posix" and not (folder / _SAVED_WEIGHTS).is_symlink():
        (folder / _SAVED_WEIGHTS).symlink_to(os.devnull)


def _trace(source: GraphView, linears: list[Linear], view: GraphView) -> dict[int, Node]:
    """Which node of the optimized graph computes which linear; the marks are taken off its nodes' names."""
    by_node = {id(linear.node): index for index, linear in enumerate(linears)}
    ran_as: dict[int, Node] = {}
    unmarked: list[Node] = []
    for node in view.nodes:
        marks = [int(mark) for mark in _MARK.findall(node.name)]
        node.name = _MARK.sub("", node.name)
        for mark in marks:
            ran_as.setdefault(mark, node)
        if not marks and any(len(tensor.shape) > 1 for name in node.input for tensor in view.made_of(name)):
            unmarked.append(node)
    for node in unmarked:
        for index in _makers(source, by_node, node):
            ran_as.setdefault(index, node)
    return ran_as


def _makers(source: GraphView, by_node: Mapping[int, int], node: Node) -> list[int]:
    """The linears of the source that are nearest behind the values which a node of the optimized graph makes."""
    found: list[int] = []
    pending = [(name, 0) for name in node.output if name in source.producer]
    while pending:
        name, depth = pending.pop()
        maker = source.producer.get(name)
        if maker is None or depth > _SEARCH_DEPTH:
            continue
        if id(maker) in by_node:
            found.append(by_node[id(maker)])
        elif maker.op_type == node.op_type:
            return []  # the same node as in the source: it is itself, not a fusion
        else:
            pending += [(read, depth + 1) for read in maker.input if read]
    return found
