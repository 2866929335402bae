"""One input's way to its linears: what comes before it, its transform, its codes; in as few kernels as there are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qtool.kernels.hadamard import hadamard_plan
from qtool.kernels.quantize_activation import (
    QuantizedRows,
    RmsNorm,
    RowHadamard,
    SiluTimes,
    prepare_rows,
    quantize_rows,
)
from qtool.kernels.runtime_smooth import Requests, smooth_rows
from qtool.kernels.side_gemm import project_rows
from qtool.kernels.small_floats import cast_e4m3
from qtool.quantize.artifacts.granularity import group_size_of
from qtool.quantize.artifacts.quantized_linear import SMOOTH_RULES
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.scheme import TensorScheme
from qtool.runtime.native.prepared import Prepared

Source = RmsNorm | SiluTimes | None
FORMS: Mapping[str, str] = {"int8": "int8", "int4": "int4_halves", "fp8_e4m3": "fp8_e4m3"}
LARGEST_INT8 = 127
LARGEST_HALF = 65504.0
INT4_LEVELS = 7.0


@dataclass(frozen=True, kw_only=True)
class SiteInput:
    """From x to `Prepared`.

    Attributes:
        scheme: of the codes; None keeps floats.
        scale: float32 [1] of a scheme with a stored scale.
        transform: the site's, on the device; None for none, or for one that is `rotation` alone.
        rotation: the transform, or QUAD's last part, as the row kernels take it.
        directions: QUAD's P [K, r] float16, where the transform is QUAD's.
        keep: whether a linear reads the values beside the codes.
        sums: whether a linear reads the codes' sums.
        dtype: of floats.
    """

    scheme: TensorScheme | None
    scale: Tensor | None
    transform: Any
    rotation: RowHadamard | None
    directions: Tensor | None
    keep: bool
    sums: bool
    dtype: torch.dtype

    @classmethod
    def plain(cls, dtype: torch.dtype) -> SiteInput:
        """The input itself, in float."""
        return cls(
            scheme=None,
            scale=None,
            transform=None,
            rotation=None,
            directions=None,
            keep=True,
            sums=False,
            dtype=dtype,
        )

    @classmethod
    def of(cls, weight: QuantizedTensor, dtype: torch.dtype, *, keep: bool, sums: bool) -> SiteInput:
        """The input of a linear, everything on the device of its weight."""
        header = {} if weight.transform is None else weight.transform.header()
        tensors = {} if weight.transform is None else weight.transform.to_tensors()
        device, kind = weight.codes.device, header.get("kind")
        rotation = None
        if kind in ("block_hadamard", "quad"):
            signs = tensors["signs"].to(device, torch.float32)
            rotation = RowHadamard(plan=hadamard_plan(len(signs), block=int(header["block"])), signs=signs)
        scale = weight.input_scale
        return cls(
            scheme=weight.scheme.input,
            scale=None if scale is None else scale.reshape(1),
            transform=None if kind == "block_hadamard" else weight.transform,
            rotation=rotation,
            directions=tensors["directions"].to(device) if kind == "quad" else None,
            keep=keep or weight.scheme.input is None,
            sums=sums,
            dtype=dtype,
        )

    def __call__(self, x: Tensor, source: Source, requests: Requests) -> Prepared:
        """x [M, …] behind `source`; the rows of a request may share factors."""
        if self.directions is not None and self._dynamic and not self.keep:
            return self._projected(x if source is None else prepare_rows(x, self.dtype, source=source))
        if self.transform is None:
            return self._coded(x, source, self.rotation, requests)
        main, side = self.transform.input(prepare_rows(x, torch.float32, source=source))
        prepared = self._coded(main, None, None, requests)
        if side is None:
            return prepared
        return replace(prepared, side=side.clamp(-LARGEST_HALF, LARGEST_HALF).to(torch.float16))

    @property
    def _smoothed(self) -> bool:
        return self.scheme is not None and self.scheme.granularity.name in SMOOTH_RULES

    @property
    def _dynamic(self) -> bool:
        return self.scheme is not None and self.scheme.dynamic and not self._smoothed

    def _projected(self, x: Tensor) -> Prepared:
        assert self.directions is not None and self.scheme is not None
        made = project_rows(
            x, self.directions, FORMS[self.scheme.format.name], hadamard=self.rotation, **self._options(self.scheme)
        )
        return replace(self._of_rows(made.main, None), side=made.side)

    def _coded(self, x: Tensor, source: Source, rotation: RowHadamard | None, requests: Requests) -> Prepared:
        scheme = self.scheme
        if scheme is not None and self._dynamic:
            rows = quantize_rows(
                x,
                FORMS[scheme.format.name],
                source=source,
                hadamard=rotation,
                keep=self.dtype if self.keep else None,
                **self._options(scheme),
            )
            return self._of_rows(rows, rows.values)
        untouched = source is None and rotation is None and x.dtype == self.dtype
        values = x if untouched else prepare_rows(x, self.dtype, source=source, hadamard=rotation)
        if scheme is None:
            return Prepared(values=values, columns=values.shape[1])
        made = self._smooth(values, scheme, requests) if self._smoothed else self._static(values, scheme)
        return replace(made, values=values if self.keep else None)

    def _options(self, scheme: TensorScheme) -> dict[str, Any]:
        return {"group_size": group_size_of(scheme.granularity), "clip": scheme.clip, "row_sums": self.sums}

    def _of_rows(self, rows: QuantizedRows, values: Tensor | None) -> Prepared:
        assert self.scheme is not None
        group = group_size_of(self.scheme.granularity) or 0
        sums = None if group else rows.row_sums
        return Prepared(
            values=values, codes=rows.codes, scale=rows.scale, sums=sums, group=group, columns=rows.columns
        )

    def _smooth(self, values: Tensor, scheme: TensorScheme, requests: Requests) -> Prepared:
        group = group_size_of(scheme.granularity)
        assert group is not None
        rule = SMOOTH_RULES[scheme.granularity.name]
        rows = smooth_rows(values, group, rule, requests=requests, form=FORMS[scheme.format.name], clip=scheme.clip)
        return Prepared(
            values=None,
            codes=rows.codes,
            scale=rows.token_range / INT4_LEVELS,
            factors=rows.factors[rows.request.to(torch.int64)],
            group=group,
            columns=values.shape[1],
        )

    def _static(self, values: Tensor, scheme: TensorScheme) -> Prepared:
        assert self.scale is not None
        scaled = values.to(torch.float32) / self.scale
        if scheme.format.kind == "float":
            codes = cast_e4m3(scaled).to(torch.float8_e4m3fn)
        else:
            codes = torch.round(scaled).nan_to_num(0.0, posinf=LARGEST_INT8, neginf=-LARGEST_INT8)
            codes = codes.clamp(-LARGEST_INT8, LARGEST_INT8).to(torch.int8)
        # A NaN has no integer: it goes into its row's scale.
        of_row = torch.where(scaled.isnan().any(dim=1), torch.nan, self.scale)
        sums = codes.sum(dim=1, dtype=torch.int32) if self.sums else None
        return Prepared(values=None, codes=codes, scale=of_row, sums=sums, columns=values.shape[1])
