"""What a model's activations look like on a text: per site, mergeable, and the artifact that stores it.

A site is one edge of the network: "model.layers.3.mlp.down_proj.input", "….output", "model.layers.3.output" (the
residual stream), "model.embed_tokens.output", "model.norm.output". Linears that read one tensor share one site;
the others are aliases of the first. On disk: statistics.json (scalars, top values, aliases) and
statistics.safetensors (per-channel maxima), under one manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load, save
from torch import Tensor

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.manifest import Manifest
from qtool.quantize.artifacts.store import open_artifact, write_file
from qtool.quantize.artifacts.weights import FloatArray

TOP_VALUES = 16
NUMBERS = "statistics.json"
CHANNELS = "statistics.safetensors"


@dataclass(frozen=True, kw_only=True)
class TopValue:
    """One of a site's largest values and where it stood: sequence and position in the text, token id, channel."""

    value: float
    sequence: int
    position: int
    token: int
    channel: int

    @property
    def rank(self) -> tuple[float, int, int, int]:
        """Sorts by falling magnitude; ties by sequence, position, channel."""
        return -abs(self.value), self.sequence, self.position, self.channel


@dataclass(frozen=True, kw_only=True)
class SiteStatistics:
    """One site's values, summed up.

    Attributes:
        count: values seen.
        total, square, cube, fourth: sums of the first four powers, float64.
        low, high: smallest and largest value.
        channel_amax: max|x| per channel [C] float32.
        top: the TOP_VALUES largest magnitudes, largest first.
        tokens: tokens (rows) whose median magnitude is above zero; the ratios are over these.
        ratio_total, ratio_max: sum and maximum over tokens of max|x| / median|x|.
    """

    count: int
    total: float
    square: float
    cube: float
    fourth: float
    low: float
    high: float
    channel_amax: FloatArray
    top: tuple[TopValue, ...]
    tokens: int
    ratio_total: float
    ratio_max: float

    @staticmethod
    def of(values: Tensor, tokens: Tensor, *, first_sequence: int) -> SiteStatistics:
        """The statistics of one batch.

        Args:
            values: [b, T, C] float32, finite.
            tokens: the token ids [b, T] int64.
            first_sequence: the number of the batch's first sequence in the whole text.
        """
        rows = values.reshape(-1, values.shape[-1])
        magnitude = rows.abs()
        row_amax = magnitude.amax(dim=1)
        middle = (rows.shape[1] - 1) // 2
        # NumPy's selection is twice as fast as torch.median here.
        median = torch.from_numpy(np.partition(magnitude.numpy(), middle, axis=1)[:, middle])
        ratio = (row_amax[median > 0] / median[median > 0]).double()
        exact = rows.double().flatten()
        squares = exact.square()
        low, high = rows.aminmax()
        return SiteStatistics(
            count=rows.numel(),
            total=float(exact.sum()),
            square=float(squares.sum()),
            cube=float(exact.dot(squares)),
            fourth=float(squares.dot(squares)),
            low=float(low),
            high=float(high),
            channel_amax=magnitude.amax(dim=0).numpy(),
            top=_top_values(rows, magnitude, row_amax, tokens, first_sequence),
            tokens=len(ratio),
            ratio_total=float(ratio.sum()),
            ratio_max=float(ratio.max()) if len(ratio) else 0.0,
        )

    def merge(self, other: SiteStatistics) -> SiteStatistics:
        """The statistics of both texts together; the order does not matter but for the rounding of the sums."""
        return SiteStatistics(
            count=self.count + other.count,
            total=self.total + other.total,
            square=self.square + other.square,
            cube=self.cube + other.cube,
            fourth=self.fourth + other.fourth,
            low=min(self.low, other.low),
            high=max(self.high, other.high),
            channel_amax=np.maximum(self.channel_amax, other.channel_amax),
            top=tuple(sorted([*self.top, *other.top], key=lambda value: value.rank)[:TOP_VALUES]),
            tokens=self.tokens + other.tokens,
            ratio_total=self.ratio_total + other.ratio_total,
            ratio_max=max(self.ratio_max, other.ratio_max),
        )

    @property
    def amax(self) -> float:
        """max|x|."""
        return max(-self.low, self.high)

    @property
    def mean(self) -> float:
        """The mean of all values."""
        return self.total / self.count

    @property
    def std(self) -> float:
        """The standard deviation of all values."""
        return float(max(self.square / self.count - self.mean**2, 0.0) ** 0.5)

    @property
    def kurtosis(self) -> float:
        """The fourth central moment over the squared variance: 3 for a normal distribution, 0 for a constant."""
        mean, square, cube = self.mean, self.square / self.count, self.cube / self.count
        variance = square - mean**2
        moment = self.fourth / self.count - 4 * mean * cube + 6 * mean**2 * square - 3 * mean**4
        return moment / variance**2 if variance > 0 else 0.0

    @property
    def ratio_mean(self) -> float:
        """The mean over tokens of max|x| / median|x|."""
        return self.ratio_total / self.tokens if self.tokens else 0.0


def _top_values(
    rows: Tensor, magnitude: Tensor, row_amax: Tensor, tokens: Tensor, first_sequence: int
) -> tuple[TopValue, ...]:
    # A value among the largest 16 stands in one of the 16 rows with the largest maxima; stable sorts break ties by
    # index, in both steps the same way.
    best_rows = torch.sort(row_amax, descending=True, stable=True).indices[:TOP_VALUES].sort().values
    candidates = magnitude[best_rows]
    picks = torch.sort(candidates.flatten(), descending=True, stable=True).indices[:TOP_VALUES].tolist()
    channels, length = rows.shape[1], tokens.shape[1]
    top = []
    for pick in picks:
        row, channel = int(best_rows[pick // channels]), pick % channels
        sequence, position = divmod(row, length)
        top.append(
            TopValue(
                value=float(rows[row, channel]),
                sequence=first_sequence + sequence,
                position=position,
                token=int(tokens[sequence, position]),
                channel=channel,
            )
        )
    return tuple(top)


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """All sites of one model on one text.

    Attributes:
        model_digest: the digest of the model that was measured.
        sequences, length: how many tokens it read, as sequences of this length.
        sites: statistics by site name, in forward order.
        aliases: site names that are another site's values: k_proj.input is q_proj.input.
        digest: of the artifact these were loaded from; "" for fresh ones.
    """

    model_digest: str
    sequences: int
    length: int
    sites: Mapping[str, SiteStatistics]
    aliases: Mapping[str, str]
    digest: str = ""

    def find(self, site: str) -> SiteStatistics | None:
        """A site's statistics by its own name or an alias; None when it was not measured."""
        return self.sites.get(self.aliases.get(site, site))

    def merge(self, other: Statistics) -> Statistics:
        """Both texts together. The two must have numbered their sequences apart (`measure`'s first_sequence).

        Raises:
            UsageError: when they are of different models, sites or sequence lengths.
        """
        same = (self.model_digest, self.length, set(self.sites)) == (other.model_digest, other.length, set(other.sites))
        if not same:
            raise UsageError("statistics", "of different models or lengths do not merge", "measure one model alike")
        sites = {name: site.merge(other.sites[name]) for name, site in self.sites.items()}
        return replace(self, sequences=self.sequences + other.sequences, sites=sites, digest="")

    def save(self, folder: Path) -> None:
        """Write the two files into a (staging) folder."""
        numbers = {
            "model_digest": self.model_digest,
            "sequences": self.sequences,
            "length": self.length,
            "aliases": dict(self.aliases),
            "sites": {name: _site_to_json(site) for name, site in self.sites.items()},
        }
        write_file(folder / NUMBERS, (json.dumps(numbers, indent=1, allow_nan=False) + "\n").encode())
        write_file(folder / CHANNELS, save({name: site.channel_amax for name, site in self.sites.items()}))

    @staticmethod
    def load(folder: Path) -> Statistics:
        """Open a statistics artifact, every byte checked against its manifest.

        Raises:
            InputRefused: not a statistics artifact, changed since it was written, or malformed.
        """
        manifest: Manifest = open_artifact(folder, kind="statistics")
        try:
            numbers = json.loads((folder / NUMBERS).read_bytes())
            channels = load((folder / CHANNELS).read_bytes())
            statistics = Statistics(
                model_digest=str(numbers["model_digest"]),
                sequences=int(numbers["sequences"]),
                length=int(numbers["length"]),
                sites={name: _site_from_json(site, channels[name]) for name, site in numbers["sites"].items()},
                aliases={str(k): str(v) for k, v in numbers["aliases"].items()},
                digest=manifest.digest,
            )
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise InputRefused(folder, f"is not readable as statistics ({error})", "measure again") from None
        if manifest.parent("model") not in (None, statistics.model_digest):
            raise InputRefused(folder, "names another model than its manifest", "measure again")
        return statistics


def _site_to_json(site: SiteStatistics) -> dict[str, Any]:
    data = {key: value for key, value in vars(site).items() if key not in ("channel_amax", "top")}
    return {**data, "top": [list(asdict(value).values()) for value in site.top]}


def _site_from_json(data: dict[str, Any], channel_amax: FloatArray) -> SiteStatistics:
    names = ("value", "sequence", "position", "token", "channel")
    top = tuple(TopValue(**dict(zip(names, row, strict=True))) for row in data["top"])
    return SiteStatistics(**{**data, "top": top, "channel_amax": channel_amax})
