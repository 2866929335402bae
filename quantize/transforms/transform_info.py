"""What each offline transform of a model needs, where it sits and what cancels it: a table to print."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class TransformInfo:
    """One transform.

    Attributes:
        name: as in a recipe.
        does: in a sentence.
        needs: what must hold of the model.
        sits: the tensors that it changes.
        cancelled_by: why the model's function stays.
        when: "offline" (in the weights) or "online" (an operation at run time).
        not_for: where it is refused, or left out.
    """

    name: str
    does: str
    needs: str
    sits: str
    cancelled_by: str
    when: Literal["offline", "online"]
    not_for: str


OFFLINE_TRANSFORMS: tuple[TransformInfo, ...] = (
    TransformInfo(
        name="fold_norms",
        does="moves norm gains (LayerNorm: bias and centering too) into linears and unties the head",
        needs="nothing",
        sits="norms before linears and the final norm; the columns and biases of their readers; LayerNorm: all that "
        "writes the residual stream",
        cancelled_by="gain × column of the reader stays the same",
        when="offline",
        not_for="norms of queries and keys and norms after attention and MLP, which are left alone",
    ),
    TransformInfo(
        name="R1",
        does="rotates the residual stream, so that no channel stands out",
        needs="folded norms",
        sits="rows of the embedding, columns of all that read the stream, rows and biases of all that write it",
        cancelled_by="R Rᵀ = 1 between each writer and each reader; a norm without gain lets R through, LayerNorm one "
        "that keeps the mean",
        when="offline",
        not_for="families with norms after attention and MLP (Gemma 2 and 3)",
    ),
    TransformInfo(
        name="R2",
        does="rotates each head of values",
        needs="nothing",
        sits="rows and bias of the value projection, columns of the output projection",
        cancelled_by="attention averages values over tokens, channel by channel",
        when="offline",
        not_for="state spaces",
    ),
    TransformInfo(
        name="smooth",
        does="divides a site's channels by factors and multiplies the columns that read them",
        needs="factors from statistics",
        sits="norm gain → readers; value rows → output projection's columns (tied in a group of query heads); up rows "
        "→ down columns",
        cancelled_by="1/s × s on every channel",
        when="offline",
        not_for="the middle of gpt-oss's experts, which is clamped and shifted",
    ),
)
"""Printed in this order."""
