"""The kinds of site transform, by the name a checkpoint stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qtool.errors import InputRefused, nearest
from qtool.quantize.transforms.block_hadamard import BlockHadamard
from qtool.quantize.transforms.divide_channels import DivideChannels
from qtool.quantize.transforms.quad import Quad
from qtool.quantize.transforms.site_transform import SiteTransform
from qtool.quantize.transforms.then_divide import ThenDivide

SITE_TRANSFORMS: dict[str, type[SiteTransform]] = {t.kind: t for t in (BlockHadamard, Quad, DivideChannels, ThenDivide)}


def site_transform_from(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SiteTransform:
    """A stored transform.

    Raises:
        InputRefused: for a kind this version does not know.
    """
    kind = str(header.get("kind"))
    if kind not in SITE_TRANSFORMS:
        raise InputRefused(f"transform {kind!r}", "unknown", nearest(kind, SITE_TRANSFORMS))
    return SITE_TRANSFORMS[kind].from_tensors(header, tensors)
