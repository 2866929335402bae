"""What a model's activations look like on a text: per domain and site, mergeable, and the artifact that stores it.

A site is one edge of the network: "model.layers.3.mlp.down_proj.input", "….output", "model.layers.3.output" (the
residual stream), "model.embed_tokens.output", "model.norm.output". Linears that read one tensor share one site;
the others are aliases of the first. On disk: statistics.json (names, roles, aliases, what was read) and one
safetensors file per domain, under one manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.numpy import load, save

from qtool.errors import InputRefused, UsageError
from qtool.quantize.architectures.sites import Role
from qtool.quantize.artifacts.manifest import Manifest
from qtool.quantize.artifacts.packed_fields import pack, unpack
from qtool.quantize.artifacts.sink_statistics import SINK_FIELDS, SinkStatistics
from qtool.quantize.artifacts.site_statistics import FIELDS, SiteStatistics
from qtool.quantize.artifacts.store import open_artifact, write_file

SUMMARY = "statistics.json"
SCHEMA = 2

@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Of how many rows one is looked at for the costly statistics; the choice depends on a row's place alone.

    Attributes:
        histogram: for magnitudes. Spikes and maxima are never sampled.
        median: for max/median ratios; for the residual stream's as often as for magnitudes.
        error: for the measured errors of dynamic candidates.
    """

    histogram: int
    median: int
    error: int

    @staticmethod
    def for_tokens(tokens: int) -> Sampling:
        """All rows of a short text (up to 2048 tokens); a part of a longer one."""
        few = tokens <= 2048
        return Sampling(histogram=1, median=1, error=1) if few else Sampling(histogram=16, median=32, error=128)


@dataclass(frozen=True, kw_only=True)
class DomainStatistics:
    """What one domain of the text looked like.

    Attributes:
        sites: by site name, in forward order.
        sinks: attention sinks by attention module ("model.layers.3.self_attn").
    """

    sites: Mapping[str, SiteStatistics]
    sinks: Mapping[str, SinkStatistics]

    def merge(self, other: DomainStatistics) -> DomainStatistics:
        """Both parts together; sites and modules that only one part has stay as they are."""
        return DomainStatistics(sites=_merge(self.sites, other.sites), sinks=_merge(self.sinks, other.sinks))


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """All sites of one model on one text.

    Attributes:
        model_digest: the digest of the model that was measured.
        text_sha256: what was read (all domains).
        length: tokens in a sequence.
        shape: how many sequences the whole text has, and how many of them these statistics hold.
        sampling: see Sampling.
        roles: site name to its role, in forward order.
        aliases: site names that are another site's values: k_proj.input is q_proj.input.
        domains: by the domain's name.
        digest: of the artifact these were loaded from; "" for fresh ones.
    """

    model_digest: str
    text_sha256: str
    length: int
    shape: tuple[int, int]
    sampling: Sampling
    roles: Mapping[str, Role]
    aliases: Mapping[str, str]
    domains: Mapping[str, DomainStatistics]
    digest: str = ""

    @cached_property
    def total(self) -> DomainStatistics:
        """All domains together."""
        return in_order({"": reduce(DomainStatistics.merge, self.domains.values())}, self.roles)[""]

    @property
    def sites(self) -> Mapping[str, SiteStatistics]:
        """All domains together, by site, in forward order."""
        return self.total.sites

    def find(self, site: str) -> SiteStatistics | None:
        """A site's statistics by its own name or an alias; None when it was not measured."""
        return self.total.sites.get(self.aliases.get(site, site))

    def merge(self, other: Statistics) -> Statistics:
        """Both parts of one measurement (`--shard`) together.

        Raises:
            UsageError: they are of different models, texts or settings, or hold the same sequences.
        """
        for name in ("model_digest", "text_sha256", "length", "sampling", "roles"):
            if getattr(self, name) != getattr(other, name):
                why = f"of different measurements do not merge: {name.replace('_', ' ')} differs"
                raise UsageError("statistics", why, "measure the shards with the same command but for --shard")
        if self.shape[0] != other.shape[0] or self._numbers() & other._numbers():
            raise UsageError("statistics", "hold the same sequences", "merge every shard once")
        return replace(
            self,
            shape=(self.shape[0], self.shape[1] + other.shape[1]),
            domains=in_order(_merge(self.domains, other.domains), self.roles),
            digest="",
        )

    def _numbers(self) -> set[int]:
        first = next(iter(self.sites.values()))
        return set(first.sequences.tolist())

    def save(self, folder: Path) -> None:
        """Write the files into a (staging) folder."""
        summary = {
            "schema": SCHEMA,
            "model_digest": self.model_digest,
            "text_sha256": self.text_sha256,
            "length": self.length,
            "shape": list(self.shape),
            "sampling": asdict(self.sampling),
            "roles": dict(self.roles),
            "aliases": dict(self.aliases),
            "domains": {
                name: {"sites": list(domain.sites), "sinks": list(domain.sinks)}
                for name, domain in self.domains.items()
            },
        }
        write_file(folder / SUMMARY, (json.dumps(summary, indent=1, allow_nan=False) + "\n").encode())
        for number, domain in enumerate(self.domains.values()):
            write_file(folder / _domain_file(number), save(domain_tensors(domain)))

    @staticmethod
    def load(folder: Path) -> Statistics:
        """Open a statistics artifact, every byte checked against its manifest.

        Raises:
            InputRefused: not a statistics artifact, changed since it was written, or malformed.
        """
        manifest: Manifest = open_artifact(folder, kind="statistics")
        try:
            summary = json.loads((folder / SUMMARY).read_bytes())
            if summary.get("schema") != SCHEMA:
                raise ValueError(f"schema {summary.get('schema', 1)}, this version reads {SCHEMA}")
            statistics = Statistics(
                model_digest=str(summary["model_digest"]),
                text_sha256=str(summary["text_sha256"]),
                length=int(summary["length"]),
                shape=(int(summary["shape"][0]), int(summary["shape"][1])),
                sampling=Sampling(**summary["sampling"]),
                roles=summary["roles"],
                aliases=summary["aliases"],
                domains={
                    name: domain_from_tensors(
                        load((folder / _domain_file(number)).read_bytes()), names["sites"], names["sinks"]
                    )
                    for number, (name, names) in enumerate(summary["domains"].items())
                },
                digest=manifest.digest,
            )
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, SafetensorError) as error:
            raise InputRefused(folder, f"is not readable as statistics ({error})", "measure again") from None
        if manifest.parent("model") not in (None, statistics.model_digest):
            raise InputRefused(folder, "names another model than its manifest", "measure again")
        return statistics


def in_order(domains: Mapping[str, DomainStatistics], roles: Mapping[str, Role]) -> dict[str, DomainStatistics]:
    """Domains in the order of their sequences, and their sites in forward order: however they were put together."""

    def first_sequence(name: str) -> int:
        return min((int(site.sequences[0]) for site in domains[name].sites.values()), default=0)

    ordered = {}
    for name in sorted(domains, key=first_sequence):
        sites = domains[name].sites
        ordered[name] = replace(domains[name], sites={site: sites[site] for site in roles if site in sites})
    return ordered


def _domain_file(number: int) -> str:
    return f"domain-{number:02}.safetensors"  # not its name, which the user chose


def domain_tensors(domain: DomainStatistics) -> dict[str, Any]:
    """A domain as a few flat tensors; the names of its sites and sinks are kept elsewhere, in order."""
    return pack("site", FIELDS, domain.sites.values()) | pack("sink", SINK_FIELDS, domain.sinks.values())


def domain_from_tensors(tensors: Mapping[str, Any], sites: Sequence[str], sinks: Sequence[str]) -> DomainStatistics:
    """What `domain_tensors` made, with the names again."""
    site_fields = unpack("site", FIELDS, tensors, len(sites))
    sink_fields = unpack("sink", SINK_FIELDS, tensors, len(sinks))
    return DomainStatistics(
        sites={name: SiteStatistics(**values) for name, values in zip(sites, site_fields, strict=True)},
        sinks={name: SinkStatistics(**values) for name, values in zip(sinks, sink_fields, strict=True)},
    )


def _merge(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(one)
    for name, value in other.items():
        merged[name] = merged[name].merge(value) if name in merged else value
    return merged
