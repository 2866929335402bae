"""A head too large to hold in float: quantized in pieces of rows, its codes put into a file as they come.

A row's codes depend on no other row, so they are those of the whole. What stays in memory are the scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from qtool.kernels.pack import unpack_int4
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.rule import Assignment
from qtool.quantize.artifacts.tensor_file import PIECE_ELEMENTS, Streamed, raw_bytes
from qtool.quantize.quantizers.layers import QuantizedLayer
from qtool.quantize.quantizers.report import LayerRecord

BY_ROW = ("scale", "scale_factor", "zero_point", "side")


@dataclass(frozen=True, kw_only=True)
class CodesInFile(QuantizedTensor):
    """A QuantizedTensor whose codes lie in a file, as a checkpoint stores them; `codes` only has their shape.

    Attributes:
        path: the file.
        stored_dtype: of the codes there.
    """

    path: Path
    stored_dtype: torch.dtype

    def rows(self, numbers: Tensor) -> QuantizedTensor:
        """Some of the rows, in memory; numbers are int64."""
        return self._in_memory(self._stored()[numbers.numpy()], numbers)

    def dequantize(self) -> Tensor:
        """See QuantizedTensor."""
        return self.rows(torch.arange(len(self.codes))).dequantize()

    def to_tensors(self, module: str) -> dict[str, Tensor]:
        """See QuantizedTensor; the codes are read while they are written."""
        stored = self._stored()
        shape = (len(stored), stored.shape[1] // self.stored_dtype.itemsize)
        codes = Streamed(dtype=self.stored_dtype, shape=shape, pieces=self._pieces)
        rest = self._in_memory(stored[:1], slice(None)).to_tensors(module)
        return {**rest, f"{module}.codes": cast(Tensor, codes)}

    def _stored(self) -> npt.NDArray[np.uint8]:
        return np.memmap(self.path, dtype=np.uint8, mode="r").reshape(len(self.codes), -1)

    def _pieces(self) -> Iterator[Tensor]:
        step = max(1, PIECE_ELEMENTS // self.codes.shape[1])
        row_bytes = self.path.stat().st_size // len(self.codes)
        with self.path.open("rb") as file:
            while data := file.read(step * row_bytes):
                yield torch.frombuffer(bytearray(data), dtype=self.stored_dtype)

    def _in_memory(self, stored: npt.NDArray[np.uint8], numbers: Tensor | slice) -> QuantizedTensor:
        codes = torch.from_numpy(np.array(stored)).view(self.stored_dtype)
        if self.scheme.weight.format.bits == 4:
            codes = unpack_int4(codes, columns=self.codes.shape[1])
        given = {field.name: getattr(self, field.name) for field in fields(QuantizedTensor)}
        given |= {name: given[name][numbers] for name in BY_ROW if given[name] is not None}
        return QuantizedTensor(**{**given, "codes": codes})


def divisible(assignment: Assignment) -> bool:
    """Whether a weight's rows can be quantized apart: nothing is chosen for all of them together."""
    scheme = assignment.scheme
    return scheme is not None and not assignment.low_rank and scheme.weight.scale != "e4m3"


def quantize_in_rows(
    pieces: Sequence[slice],
    read: Callable[[slice], Tensor],
    quantize: Callable[[Tensor], QuantizedLayer],
    path: Path,
) -> QuantizedLayer:
    """Quantize a weight piece by piece.

    Args:
        pieces: of its rows, in order.
        read: the float rows [n, K] of a piece.
        quantize: what is done to a piece.
        path: a new file for the codes.

    Returns:
        The whole. Its errors are the pieces' means, each weighted by the piece's ‖W‖².
    """
    parts: list[QuantizedTensor] = []
    records: list[tuple[float, LayerRecord]] = []
    dtype = torch.uint8
    with path.open("wb") as file:
        for piece in pieces:
            weight = read(piece)
            layer = quantize(weight)
            stored = layer.tensor.to_tensors("w")["w.codes"]
            dtype = stored.dtype
            file.write(raw_bytes(stored))
            records.append((float(weight.square().sum(dtype=torch.float64)), layer.record))
            given = {field.name: getattr(layer.tensor, field.name) for field in fields(QuantizedTensor)}
            parts.append(QuantizedTensor(**{**given, "codes": layer.tensor.codes[:0].clone()}))
    whole = {field.name: getattr(parts[0], field.name) for field in fields(QuantizedTensor)}
    for name in BY_ROW:
        if whole[name] is not None:
            whole[name] = torch.cat([getattr(part, name) for part in parts])
    shape = (pieces[-1].stop, parts[0].codes.shape[1])
    whole["codes"] = torch.zeros((), dtype=parts[0].codes.dtype).expand(shape)
    return QuantizedLayer(tensor=CodesInFile(**whole, path=path, stored_dtype=dtype), record=_merged(records))


def dequantized_rows(tensor: QuantizedTensor, numbers: Tensor) -> Tensor:
    """Rows of the weight that the codes stand for, [n, K] float32."""
    if isinstance(tensor, CodesInFile):
        return tensor.rows(numbers).dequantize()
    return tensor.dequantize()[numbers]


def _merged(records: Sequence[tuple[float, LayerRecord]]) -> LayerRecord:
    first = records[0][1]
    power = sum(weight for weight, _ in records) or 1.0
    outputs = [record.output_error for _, record in records]
    return LayerRecord(
        quantizer=first.quantizer,
        weight_error=sum(weight * record.weight_error for weight, record in records) / power,
        output_error=None
        if any(error is None for error in outputs)
        else sum(weight * (error or 0.0) for (weight, _), error in zip(records, outputs, strict=True)) / power,
        damp=first.damp,
        escalations=first.escalations,
    )
