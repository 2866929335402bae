"""What the traps look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qtool.runtime.explain.graph import GraphView, Node
from qtool.runtime.explain.report import LinearReport, OnlineShare, Trap


@dataclass(frozen=True, kw_only=True)
class Facts:
    """A model before and after.

    Attributes:
        source, view: the graph before and after.
        linears: what runs each linear.
        level: at which the model loaded.
        refused: the runtime's words where it did not load at the level asked for.
        names: optimized node's id to the linear's name.
        online: the online transforms, where there are some.
    """

    source: GraphView
    view: GraphView
    linears: tuple[LinearReport, ...]
    level: str
    refused: str | None
    names: Mapping[int, str]
    online: OnlineShare | None = None

    def name(self, node: Node) -> str:
        """What to call a node: its linear's name, its own, or its operator."""
        return self.names.get(id(node)) or str(node.name) or str(node.op_type)

    def where(self, condition: Callable[[LinearReport], bool]) -> tuple[str, ...]:
        """The names of the linears that fulfil a condition."""
        return tuple(linear.name for linear in self.linears if condition(linear))


def warn(code: str, what: str, remedy: str, where: tuple[str, ...]) -> Trap | None:
    """A warning, where there is a place that it is about."""
    return Trap(code=code, warning=True, what=what, remedy=remedy, where=where) if where else None
