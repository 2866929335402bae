"""Made-up activations that look like a real model's, measured and analysed: dense, experts, state space."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qtool.quantize.architectures.sites import Role
from qtool.quantize.artifacts.sink_statistics import KEYS, SinkStatistics
from qtool.quantize.artifacts.statistics import DomainStatistics, Sampling, Statistics
from qtool.quantize.measure.analysis import Findings, analyse
from qtool.quantize.measure.places import Places
from qtool.quantize.measure.site_batch import statistics_of

LENGTH, SEQUENCES, WIDTH, HEADS = 160, 6, 80, 9
DOMAINS = {"prose": (0, 1, 2), "a|b<i>": (3, 4, 5)}
MASSIVE_CHANNEL, OUTLIER_CHANNELS, SPIKED = 37, (5, 61), "1.mlp.down_proj.input"
EXPERTS = (0, 1, 3)  # the second is chosen seldom, the third never
TEXTS = dict(enumerate(["Once", " upon", "\n", " a", "<script>alert(1)</script>", "|", "$x$", "中文", "\u202e"]))

ATTENTION: dict[str, Role] = {
    "self_attn.q_proj.input": "input",
    "self_attn.q_proj.output": "output",
    "self_attn.v_proj.output": "cache",
    "self_attn.q_rope": "output",
    "self_attn.k_rope": "cache",
    "self_attn.o_proj.input": "input",
    "self_attn.o_proj.output": "output",
}
FEED_FORWARD: dict[str, Role] = {
    "mlp.gate_proj.input": "input",
    "mlp.gate_proj.output": "output",
    "mlp.act_fn.output": "output",
    "mlp.down_proj.input": "input",
    "mlp.down_proj.output": "output",
}
MIXTURE: dict[str, Role] = {
    f"mlp.experts.{expert}.{linear}.input": "input" for expert in EXPERTS for linear in ("gate_proj", "down_proj")
}
MIXER: dict[str, Role] = {
    "mixer.in_proj.input": "input",
    "mixer.x_proj.input": "input",
    "mixer.state": "cache",
    "mixer.out_proj.input": "input",
}
FAMILIES = {"llama": ATTENTION | FEED_FORWARD, "moe": ATTENTION | MIXTURE, "mamba": MIXER}


def names_of(family: str, blocks: int) -> dict[str, Role]:
    names: dict[str, Role] = {"model.embed_tokens.output": "stream"}
    for block in range(blocks):
        names |= {f"model.layers.{block}.{name}": role for name, role in FAMILIES[family].items()}
        names[f"model.layers.{block}.output"] = "stream"
    return names | {"model.norm.output": "stream", "lm_head.output": "output"}


def values_of(site: str, blocks: int, seed: int, massive: bool) -> np.ndarray:
    """[SEQUENCES, LENGTH, WIDTH], deeper blocks larger, with outlier channels, and massive and spike values planted."""
    rng = np.random.default_rng([seed, *site.encode()])
    block = int(site.split(".")[2]) if ".layers." in site else 0
    channels = np.exp(rng.normal(0, 0.5, WIDTH))
    channels[list(OUTLIER_CHANNELS)] *= 12 if site.endswith(("k_rope", "q_proj.input")) else 2
    x = rng.normal(0, 0.5 + 2 * block / blocks, (SEQUENCES, LENGTH, WIDTH)) * channels
    if massive and site.count(".") == 3 and site.endswith(".output") and 1 <= block < blocks - 1:
        x[:, 0, MASSIVE_CHANNEL] = 4000 + 100 * rng.random(SEQUENCES)
    if massive and site.endswith(SPIKED):
        x[:, 0, 11] = 2500 + 50 * rng.random(SEQUENCES)
    return x


def places_of(site: str, sequences: tuple[int, ...]) -> tuple[Places, np.ndarray]:
    """The rows that a site sees; an expert sees those whose position it is given."""
    numbers = np.array(sequences)
    tokens = np.tile(np.arange(LENGTH) % len(TEXTS), (len(numbers), 1))
    places = Places.of(numbers, tokens, Sampling.for_tokens(SEQUENCES * LENGTH))
    rows = np.arange(len(places))
    if ".experts." in site:
        expert = int(site.split(".experts.")[1].split(".")[0])
        chosen = np.where(places.position % 16 == 1, 1, np.where(places.position % 2, 3, 0))
        rows = np.flatnonzero(chosen == expert)
    return places.take(rows), rows


def sinks_of(sequences: int, block: int) -> SinkStatistics:
    first = np.arange(HEADS) % (sequences + 1) * min(block, 1)
    importance = np.full((HEADS, KEYS), 0.01)
    importance[:, 0] = 0.5
    return SinkStatistics(
        sequences=np.array([sequences, sequences]),
        first_short=first,
        first_full=first,
        any_full=first,
        importance=importance * sequences,
    )


def build(
    family: str = "llama", blocks: int = 4, *, massive: bool = True, scale: Callable[[str], float] = lambda site: 1.0
) -> tuple[Findings, Statistics]:
    """Statistics of random values with planted outliers, and what they say; `scale` multiplies a site's values."""
    names = names_of(family, blocks)
    values = {site: (values_of(site, blocks, 1, massive) * scale(site)).astype(np.float32) for site in names}
    domains = {}
    for domain, sequences in DOMAINS.items():
        sites = {}
        for site, role in names.items():
            places, rows = places_of(site, sequences)
            part = values[site][list(sequences)].reshape(-1, WIDTH)[rows]
            sites[site] = statistics_of(torch.from_numpy(np.ascontiguousarray(part)), places, role)
        sinks = {f"model.layers.{b}.self_attn": sinks_of(len(sequences), b) for b in range(blocks)}
        domains[domain] = DomainStatistics(sites=sites, sinks={} if family == "mamba" else sinks)
    statistics = Statistics(
        model_digest="0" * 64,
        text_sha256="1" * 64,
        length=LENGTH,
        shape=(SEQUENCES, SEQUENCES),
        sampling=Sampling.for_tokens(SEQUENCES * LENGTH),
        roles=names,
        aliases={},
        domains=domains,
    )
    return analyse(statistics, TEXTS), statistics


@pytest.fixture(scope="session")
def made_up() -> Callable[..., tuple[Findings, Statistics]]:
    return build


@pytest.fixture(scope="session")
def llama() -> Any:
    findings, statistics = build()
    return SimpleNamespace(findings=findings, statistics=statistics)
