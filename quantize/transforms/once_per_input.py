"""A function of a tensor that is computed once for as long as its tensor lives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar
from weakref import ReferenceType, ref

from torch import Tensor

Result = TypeVar("Result")


class OncePerInput(Generic[Result]):
    """A function of a tensor whose last result is remembered for as long as that tensor lives.

    Linears that read one tensor share one such function, so q, k and v transform and quantize theirs once. Inputs must
    therefore not be changed in place between two calls, and a result must not be the input itself.
    """

    def __init__(self, compute: Callable[[Tensor], Result]) -> None:
        self._compute = compute
        self._input: ReferenceType[Tensor] | None = None
        self._result: Result | None = None

    def __call__(self, x: Tensor) -> Result:
        if self._result is None or self._input is None or self._input() is not x:
            result = self._compute(x)
            self._input = ref(x, self._forget)  # a collection here may still forget the input before
            self._result = result
            return result
        return self._result

    def _forget(self, gone: ReferenceType[Tensor]) -> None:
        if gone is self._input:
            self._input = self._result = None
