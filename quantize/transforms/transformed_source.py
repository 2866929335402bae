"""A WeightSource whose tensors are another source's, changed while they are read.

Nothing is stored: a tensor is read from the parent, changed piece by piece in float64 and handed on as float32, so
that a chain of transforms needs no more memory than the tensor itself and one piece.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from qtool.errors import UsageError
from qtool.quantize.artifacts.weights import FloatArray, WeightSource

Float64Array = npt.NDArray[np.float64]
# Vectors [n, C] to vectors [n, C]; each is changed without looking at the others.
Vectors = Callable[[Float64Array], Float64Array]
PIECE_ELEMENTS = 2**22


@dataclass(frozen=True)
class Step:
    """One change of a matrix [N, K], or of a vector [N], which counts as a matrix [N, 1].

    Attributes:
        along: "columns" changes every row, a vector over the columns; "rows" changes every column.
        vectors: the change.
        start: with "rows": the first row that changes.
        stop: with "rows": the row after the last; None: to the end.
    """

    along: Literal["columns", "rows"]
    vectors: Vectors
    start: int = 0
    stop: int | None = None

    def into(self, array: FloatArray) -> None:
        """Change the array in place."""
        matrix = array[:, None] if array.ndim == 1 else array
        turned = matrix if self.along == "columns" else matrix[self.start : self.stop].T
        count = max(1, PIECE_ELEMENTS // max(1, turned.shape[1]))
        for first in range(0, turned.shape[0], count):
            piece = turned[first : first + count]
            piece[...] = self.vectors(np.ascontiguousarray(piece, dtype=np.float64))


@dataclass
class Changes:
    """The steps of one transform, by tensor name, in the order they are added.

    Attributes:
        names: the tensors of the parent.
        origins: new tensors, and the parent's tensor that each starts from.
        steps: what happens to a tensor.
        inputs: what happens to the rows that a linear reads; None where they do not follow linearly from the old ones.
    """

    names: frozenset[str]
    origins: dict[str, str] = field(default_factory=dict)
    steps: dict[str, list[Step]] = field(default_factory=dict)
    inputs: dict[str, Vectors | None] = field(default_factory=dict)

    def columns(self, name: str, vectors: Vectors) -> None:
        """Change every row of a matrix."""
        self.steps.setdefault(name, []).append(Step("columns", vectors))

    def rows(self, name: str, vectors: Vectors, start: int = 0, stop: int | None = None) -> None:
        """Change every column of a matrix, or a vector, between two rows."""
        self.steps.setdefault(name, []).append(Step("rows", vectors, start, stop))

    def reads(self, linear: str, *, columns: Vectors, inputs: Vectors | None) -> None:
        """Change a linear's columns, and note how its inputs change with them."""
        if f"{linear}.weight" in self.names or f"{linear}.weight" in self.origins:
            self.columns(f"{linear}.weight", columns)
        self.inputs[linear] = inputs

    def outputs(self, linear: str, vectors: Vectors, start: int = 0, stop: int | None = None) -> None:
        """Change what a linear hands out: its weight's rows and, where it has one, its bias."""
        for name in (f"{linear}.weight", f"{linear}.bias"):
            if name in self.names:
                self.rows(name, vectors, start, stop)


class TransformedSource:
    """`parent` after one transform; a WeightSource.

    Args:
        parent: the source to wrap.
        changes: the steps.
        description: everything that determines the transform besides the parent, as JSON values.
        config: config keys that the transform sets.
        notes: choices made, for printing.
    """

    def __init__(
        self,
        parent: WeightSource,
        changes: Changes,
        *,
        description: Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self.parent = parent
        self.description = dict(description)
        self.config: Mapping[str, Any] = {**parent.config, **(config or {})}
        self.notes = tuple(notes)
        self._changes = changes

    @cached_property
    def digest(self) -> str:
        """sha256 (hex) over the parent's digest and the transform's canonical JSON."""
        canonical = json.dumps(self.description, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(f"{self.parent.digest}\n{canonical}".encode()).hexdigest()

    @property
    def applied(self) -> tuple[Mapping[str, Any], ...]:
        """The descriptions of all transforms down to the untransformed model, first applied first."""
        below = self.parent.applied if isinstance(self.parent, TransformedSource) else ()
        return (*below, self.description)

    def names(self) -> Sequence[str]:
        """All tensor names, sorted."""
        return sorted({*self.parent.names(), *self._changes.origins})

    def stored_dtype(self, name: str) -> str:
        """ "F32" for a changed tensor, otherwise the parent's."""
        changed = name in self._changes.steps or name in self._changes.origins
        return "F32" if changed else self.parent.stored_dtype(name)

    def read(self, name: str) -> FloatArray:
        """One tensor as float32. Unknown names raise KeyError."""
        array = self.parent.read(self._changes.origins.get(name, name))
        for step in self._changes.steps.get(name, ()):
            step.into(array)
        return array

    def read_rows(self, name: str, start: int, stop: int) -> FloatArray:
        """Rows start … stop − 1 of a tensor; the whole is read where a step mixes rows."""
        steps = self._changes.steps.get(name, ())
        if any(step.along == "rows" for step in steps):
            return np.ascontiguousarray(self.read(name)[start:stop])
        array = self.parent.read_rows(self._changes.origins.get(name, name), start, stop)
        for step in steps:
            step.into(array)
        return array

    def second_moment(self, linear: str, moment: Float64Array) -> Float64Array:
        """E[x xᵀ] of what a linear reads here, from that of the untransformed model: exact, nothing is collected again.

        Args:
            linear: the module.
            moment: [K, K] float64, symmetric.

        Raises:
            UsageError: where the new inputs do not follow linearly from the old: a LayerNorm's bias or a dead gain.
        """
        if isinstance(self.parent, TransformedSource):
            moment = self.parent.second_moment(linear, moment)
        if linear not in self._changes.inputs:
            return moment
        change = self._changes.inputs[linear]
        if change is None:
            why = f"{self.description['transform']} moves its norm's bias, or drops a channel without gain"
            raise UsageError(f"second moment of {linear}", why, "measure the transformed model")
        return np.ascontiguousarray(change(np.ascontiguousarray(change(moment).T)).T)
