"""Hooks that show every site's values to the statistics, and the count that proves that all of them were seen."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qtool.errors import InputRefused
from qtool.quantize.architectures.sites import Role, SiteTemplate
from qtool.quantize.artifacts.sink_statistics import SinkStatistics
from qtool.quantize.artifacts.site_statistics import TOP_VALUES, SiteStatistics
from qtool.quantize.artifacts.statistics import DomainStatistics, Sampling
from qtool.quantize.measure.attention_tap import See, Weights, sink_statistics
from qtool.quantize.measure.batches import Batch
from qtool.quantize.measure.places import Places
from qtool.quantize.measure.site_batch import statistics_of
from qtool.quantize.measure.state_space import mixer_values, state_positions


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A part of a measurement: some of its sites; see Statistics."""

    roles: Mapping[str, Role]
    aliases: Mapping[str, str]
    domains: Mapping[str, DomainStatistics]

    def merge(self, other: Recorded) -> Recorded:
        """Both parts; every site is in one of them."""
        return Recorded(
            roles={**self.roles, **other.roles},
            aliases={**self.aliases, **other.aliases},
            domains={name: domain.merge(other.domains[name]) for name, domain in self.domains.items()},
        )


class Recorder:
    """Collects statistics per domain and site.

    Args:
        batches: what will be run, in order.
        sampling: see Sampling.
        gram: also record XᵀX of what GEMMs read.
        sizes: the numbers behind the symbols of SiteTemplate.parts.
        experts: how many experts a block has.

    Attributes:
        roles, aliases: of the sites seen so far; see Statistics.
        seconds: time spent on statistics.
    """

    def __init__(
        self,
        batches: Sequence[Batch],
        *,
        sampling: Sampling,
        gram: bool,
        sizes: Mapping[str, int],
        experts: int,
    ) -> None:
        self.roles: dict[str, Role] = {}
        self.aliases: dict[str, str] = {}
        self.seconds = 0.0
        self._domains = [batch.domain for batch in batches]
        self._places = [Places.of(batch.sequences, batch.tokens, sampling) for batch in batches]
        self._length = batches[0].tokens.shape[1]
        self._sites: dict[str, dict[str, SiteStatistics]] = {}
        self._sinks: dict[str, dict[str, SinkStatistics]] = {}
        self._expected: dict[str, int] = {}
        self._expected_of_experts: Counter[str] = Counter()
        self._gram, self._sizes, self._experts = gram, sizes, experts
        self._batch = 0

    def begin(self, batch: int) -> None:
        """What comes next belongs to this batch."""
        self._batch = batch

    def expect(self, site: str, role: Role, rows: int | None = None) -> None:
        """By the end, `site` must have seen this many rows; one per token when None."""
        self.roles[site] = role
        self._expected[site] = sum(len(places) for places in self._places) if rows is None else rows

    def see(self, site: str, values: Tensor, places: Places | None = None) -> None:
        """Add the values [..., C] of the batch in hand to a site; one row per token when `places` is None."""
        start = time.perf_counter()
        where = self._places[self._batch] if places is None else places
        rows = values.reshape(-1, values.shape[-1]) if values.dim() < 4 else values.reshape(len(where), -1)
        if not len(rows):
            return
        if len(rows) != len(where):
            raise InputRefused(site, f"gave {len(rows)} rows for {len(where)} tokens", "report this model type")
        mine = self._sites.setdefault(self._domains[self._batch], {})
        before = mine.get(site)
        full = before is not None and len(before.top_values) == TOP_VALUES
        with np.errstate(all="ignore"):  # what is not finite is refused below, by name
            seen = statistics_of(
                rows,
                where,
                self.roles[site],
                at_least=float(abs(before.top_values[-1])) if before is not None and full else 0.0,
                gram=self._gram and self.roles[site] == "input",
            )
        if not (np.isfinite(seen.low) and np.isfinite(seen.high)):
            raise InputRefused(site, "is not finite on this text", "check the model's weights")
        mine[site] = seen if before is None else before.merge(seen)
        self.seconds += time.perf_counter() - start

    def see_sequence(self, site: str, values: Tensor, row: int) -> None:
        """Add the values [T, C] of one sequence of the batch in hand to a site."""
        places = self._places[self._batch]
        _, start, stop = places.spans[row]
        self.see(site, values, places.take(np.arange(start, stop)))

    def see_attention(self, block: nn.Module, name: str) -> See:
        """What a tap on attention shows while the block of this name runs."""
        paths = {id(module): f"{name}.{path}" for path, module in block.named_modules()}

        def see(module: nn.Module, query: Tensor, key: Tensor, weights: Weights) -> None:
            path = paths[id(module)]
            start = time.perf_counter()
            sinks = sink_statistics(weights, query)
            self.seconds += time.perf_counter() - start
            mine = self._sinks.setdefault(self._domains[self._batch], {})
            mine[path] = mine[path].merge(sinks) if path in mine else sinks
            for site, values in ((f"{path}.q_rope", query), (f"{path}.k_rope", key)):
                if site in self.roles:
                    self.see(site, values.transpose(1, 2))

        return see

    @contextmanager
    def attached(self, block: nn.Module, name: str, templates: Sequence[SiteTemplate]) -> Iterator[None]:
        """Hooks on a block for its sites, for the duration of the `with`.

        Raises:
            InputRefused: at the end, when a site was never reached or saw another number of rows than it should.
        """
        handles: list[Any] = []
        try:
            for template in templates:
                attach = Recorder._attach_experts if "{expert}" in template.name else _ATTACH[template.tap]
                handles += attach(self, block, name, template)
            yield
        finally:
            for handle in handles:
                handle.remove()
        self.check(f"{name}.")

    def _declare(self, name: str, template: SiteTemplate, rows: int | None = None) -> str:
        site = f"{name}.{template.name}"
        self.aliases |= {f"{name}.{alias}": site for alias in template.aliases}
        self.expect(site, template.role, rows)
        return site

    def _attach_input(self, block: nn.Module, name: str, template: SiteTemplate) -> list[Any]:
        site = self._declare(name, template)
        module = block.get_submodule(template.module)
        return [module.register_forward_pre_hook(lambda _, args: self.see(site, args[0]))]

    def _attach_output(self, block: nn.Module, name: str, template: SiteTemplate) -> list[Any]:
        site = self._declare(name, template)
        sizes = [self._sizes[symbol] for symbol in template.parts]

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            values: Tensor = output[0] if isinstance(output, tuple) else output
            if template.heads_first:
                values = values.transpose(1, 2)
            self.see(site, torch.split_with_sizes(values, sizes, dim=-1)[template.part] if sizes else values)

        return [block.get_submodule(template.module).register_forward_hook(hook)]

    def _attach_attention(self, block: nn.Module, name: str, template: SiteTemplate) -> list[Any]:
        self._declare(name, template)
        return []  # shown by the tap on attention

    def _attach_state_space(self, block: nn.Module, name: str, template: SiteTemplate) -> list[Any]:
        shown = np.array(state_positions(self._length))
        few = template.tap == "state"
        rows = len(shown) * sum(len(places.spans) for places in self._places) if few else None
        site = self._declare(name, template, rows)
        mixer = block.get_submodule(template.module)

        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            places = self._places[self._batch]
            if few:
                places = places.take(np.concatenate([start + shown for _, start, _ in places.spans]))
            self.see(site, mixer_values(mixer, output, template.tap), places)

        return [mixer.get_submodule("in_proj").register_forward_hook(hook)]

    def _attach_experts(self, block: nn.Module, name: str, template: SiteTemplate) -> list[Any]:
        """One site for each expert, and a look at the router's choice, which says whose rows an expert reads."""
        path = template.module.split(".{expert}")[0]
        chosen: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            chosen[:] = [args[1]]
            self._expected_of_experts[f"{name}.{template.name}"] += args[1].numel()

        def attach(expert: int) -> Any:
            site = f"{name}.{template.name.format(expert=expert)}"
            self.aliases |= {f"{name}.{alias.format(expert=expert)}": site for alias in template.aliases}
            self.roles[site] = template.role

            def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
                rows = torch.where(chosen[0] == expert)[0].numpy()
                self.see(site, args[0], self._places[self._batch].take(rows))

            return block.get_submodule(template.module.format(expert=expert)).register_forward_pre_hook(see)

        return [block.get_submodule(path).register_forward_pre_hook(note), *map(attach, range(self._experts))]

    def check(self, prefix: str) -> None:
        """Compare what the sites of this prefix have seen with what they should have.

        Raises:
            InputRefused: naming the first that differs.
        """
        for site, expected in self._expected.items():
            if site.startswith(prefix):
                seen = sum(sites[site].tokens for sites in self._sites.values() if site in sites)
                if seen != expected:
                    why = f"saw {seen} rows of {expected}" if seen else "was never reached"
                    raise InputRefused(site, why, "report this model type with your version of transformers")
        for site, expected in self._expected_of_experts.items():
            if site.startswith(prefix):
                names = [site.format(expert=expert) for expert in range(self._experts)]
                seen = sum(sites[name].tokens for sites in self._sites.values() for name in names if name in sites)
                if seen != expected:
                    raise InputRefused(site, f"saw {seen} rows of {expected}", "report this model type")

    def take(self) -> Recorded:
        """What was collected since the last call."""
        domains = {
            name: DomainStatistics(sites=self._sites.get(name, {}), sinks=self._sinks.get(name, {}))
            for name in dict.fromkeys(self._domains)
        }
        taken = Recorded(roles=self.roles, aliases=self.aliases, domains=domains)
        self.roles, self.aliases, self._sites, self._sinks = {}, {}, {}, {}
        return taken


_ATTACH: Mapping[str, Callable[[Recorder, nn.Module, str, SiteTemplate], list[Any]]] = {
    "input": Recorder._attach_input,
    "output": Recorder._attach_output,
    "query": Recorder._attach_attention,
    "key": Recorder._attach_attention,
    **dict.fromkeys(("x", "B", "C", "state"), Recorder._attach_state_space),
}
