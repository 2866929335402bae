"""A pass refuses what it cannot vouch for: values that are not finite, sites that saw no rows or other rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qtool.errors import InputRefused
from qtool.quantize.architectures.sites import SITES, SiteTemplate
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.inputs import SourceModel, open_model
from qtool.quantize.measure import Text, measure

Make = Callable[..., Path]
IDS = np.random.default_rng(3).integers(0, 256, (4, 20))
TEXT = Text(ids=IDS, domains=("prose", "code"), domain_of=np.array([0, 0, 1, 1]), sha256="cd" * 32)


def run(source: Any) -> Statistics:
    return measure(source, TEXT, progress=lambda *_: None).statistics


class Altered:
    """A source with some tensors changed."""

    def __init__(self, source: SourceModel, change: Mapping[str, Callable[[Any], None]]) -> None:
        self._source, self._change = source, change

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str) -> Any:
        array = self._source.read(name).copy()
        if name in self._change:
            self._change[name](array)
        return array


@pytest.mark.parametrize("value", [3e38, np.nan])
def test_a_value_that_is_not_finite_is_refused_by_site(value: float, tiny_model: Make) -> None:
    def explode(weight: Any) -> None:
        weight[:] = value

    altered = Altered(open_model(str(tiny_model())), {"model.layers.1.mlp.gate_proj.weight": explode})
    with pytest.raises(InputRefused, match=r"model\.layers\.1\.mlp\.gate_proj\.output"):
        run(altered)


def test_a_linear_that_never_runs_is_refused(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x))))
    with pytest.raises(InputRefused, match=r"model\.layers\.0\.mlp\.up_proj\.output: was never reached"):
        run(open_model(str(tiny_model())))


def test_a_site_of_a_module_that_never_runs_is_refused(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    unreached = SiteTemplate(name="mixer.dt_proj.output", module="mixer.dt_proj", tap="output", role="output")
    monkeypatch.setitem(SITES, "mamba", (*SITES["mamba"], unreached))  # type: ignore[arg-type]
    with pytest.raises(InputRefused, match=r"backbone\.layers\.0\.mixer\.dt_proj\.output: was never reached"):
        run(open_model(str(tiny_model("mamba"))))


def test_a_module_that_runs_twice_is_refused(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    real = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: real(self, x) + self.up_proj(x).sum() * 0)
    with pytest.raises(InputRefused, match=r"up_proj\.output: saw 160 rows of 80"):
        run(open_model(str(tiny_model())))


@pytest.mark.parametrize("way", ["fewer rows", "one expert less"])
def test_experts_that_see_other_rows_than_were_routed_are_refused(
    way: str, tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qtool.quantize.artifacts.experts import Experts

    def forward(self: Any, rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        for index in range(1 if way == "one expert less" else 0, len(self)):
            mine = torch.where(chosen == index)[0]
            mine = mine if way == "one expert less" else mine[1:]
            total[mine] += self[index](rows[mine])
        return total

    monkeypatch.setattr(Experts, "forward", forward)
    with pytest.raises(InputRefused, match=r"model\.layers\.0\.mlp\.experts\..*gate_proj\.input"):
        run(open_model(str(tiny_model("mixtral"))))


def test_hooks_are_gone_after_a_refusal(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = replace(SITES["llama"][0], name="nowhere.input", module="mlp.nowhere")
    source = open_model(str(tiny_model()))
    before = run(source)
    monkeypatch.setitem(SITES, "llama", (*SITES["llama"], bad))  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        run(source)
    monkeypatch.undo()
    after = run(source)
    assert list(after.sites) == list(before.sites)
