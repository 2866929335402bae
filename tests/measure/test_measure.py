"""One pass records every site of every family as a plain forward pass has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qtool.quantize.architectures import architecture_of, expert_count, linear_names
from qtool.quantize.architectures.sites import SITES, SiteTemplate
from qtool.quantize.artifacts.network import load_network
from qtool.quantize.artifacts.site_statistics import SiteStatistics
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.inputs import SourceModel, open_model
from qtool.quantize.measure import Text, batches, measure
from qtool.quantize.measure.state_space import state_positions

Make = Callable[..., Path]
Measured = Callable[[str], tuple[Any, Statistics]]
LENGTH = 20
IDS = np.random.default_rng(3).integers(0, 256, (9, LENGTH))
TEXT = Text(ids=IDS, domains=("prose", "code"), domain_of=np.array([0] * 5 + [1] * 4), sha256="cd" * 32)


@pytest.fixture(autouse=True, scope="module")
def small_batches() -> Iterator[None]:
    """Two sequences to a batch: five batches of TEXT, two of them short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "TOKENS_PER_BATCH", 2 * LENGTH)
        yield


@pytest.fixture(scope="module")
def measured(write_model: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Statistics]]:
    """The tiny model of a family and its statistics, measured once."""

    @cache
    def of(family: str) -> tuple[Any, Statistics]:
        source = open_model(str(write_model(tmp_path_factory.mktemp(family) / "model", family, tied=False)))
        return source, run(source)

    return of


def run(source: Any, text: Text = TEXT, **options: Any) -> Statistics:
    return measure(source, text, progress=lambda *_: None, **options).statistics


def plain_pass(source: SourceModel) -> dict[str, Tensor]:
    """What every module of the whole network reads and hands out: NAME.input and NAME.output, [B, T, …]."""
    network = load_network(source)
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: object, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor):
                seen[f"{name}.input"] = args[0]
            seen[f"{name}.output"] = output[0] if isinstance(output, tuple) else output

        return hook

    for name, module in network.named_modules():
        module.register_forward_hook(note(name))
    with torch.no_grad():
        network(torch.from_numpy(IDS), use_cache=False)
    return seen


def names_of(template: SiteTemplate, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """A template's sites, and the modules that they tap."""
    if "{expert}" not in template.name:
        return [(template.name, template.module)]
    return [(template.name.format(expert=e), template.module.format(expert=e)) for e in range(expert_count(config))]


@pytest.mark.parametrize("family", SITES)
def test_every_site_has_the_values_of_a_plain_forward_pass(family: str, measured: Measured) -> None:
    source, statistics = measured(family)
    spine, seen = architecture_of(source.config).spine, plain_pass(source)
    streams = [f"{spine.embedding}.output", *(f"{spine.blocks}.{i}.output" for i in range(2))]
    wanted = {*streams, f"{spine.final_norm}.output", f"{spine.head}.output"}
    seen[streams[0]] = seen[f"{spine.blocks}.0.input"]  # with what is added to it, or what it is scaled by
    tapped = {f"{spine.final_norm}.output": "", f"{spine.head}.output": "", **dict.fromkeys(streams, "")}
    for block in (f"{spine.blocks}.0.", f"{spine.blocks}.1."):
        for template in SITES[family]:
            for name, module in names_of(template, source.config):
                wanted.add(block + name)
                if template.tap in ("input", "output") and not template.parts:
                    tapped[block + name] = f"{block}{module}.{template.tap}"
    experts = {name for name in wanted if ".experts." in name}
    assert wanted - experts <= set(statistics.sites) <= wanted
    assert set(statistics.sites) - experts == set(statistics.roles) - experts
    for name, tap in tapped.items():
        if name in statistics.sites:
            check_values(name, statistics.sites[name], seen[tap or name])


def check_values(name: str, site: SiteStatistics, values: Tensor) -> None:
    if values.dim() == 4:  # a norm of heads
        values = values.transpose(1, 2) if values.shape[2] == LENGTH else values
        values = values.reshape(len(IDS), LENGTH, -1)
    exact = values.reshape(-1, values.shape[-1]).double().numpy()
    size = np.abs(exact).max()
    assert (site.width, site.tokens) == (exact.shape[1], len(exact)), name
    np.testing.assert_allclose(site.channel_high, exact.max(axis=0), rtol=0, atol=1e-4 * size, err_msg=name)
    np.testing.assert_allclose(site.channel_low, exact.min(axis=0), rtol=0, atol=1e-4 * size, err_msg=name)
    assert site.mean == pytest.approx(exact.mean(), abs=1e-4 * size), name
    assert site.std == pytest.approx(exact.std(), abs=1e-4 * size), name
    if ".experts." not in name and size > 0:
        sequence, position, token, channel = site.top_places[0].tolist()
        place = exact.reshape(len(IDS), LENGTH, -1)[sequence, position, channel]
        assert place == pytest.approx(site.top_values[0], rel=1e-3), name
        assert token == IDS[sequence, position]


@pytest.mark.parametrize("family", SITES)
def test_every_linear_has_an_input_site_and_widths_fit(family: str, measured: Measured) -> None:
    source, statistics = measured(family)
    for name in linear_names(source.config):
        if name.endswith("dt_proj"):  # its weight is used without its module
            continue
        rows, columns = source.read(f"{name}.weight").shape
        reads, gives = statistics.find(f"{name}.input"), statistics.find(f"{name}.output")
        if ".experts." in name:
            assert reads is None or (reads.width == columns and reads.tokens < IDS.size), name
        else:
            assert reads is not None and (reads.width, reads.tokens) == (columns, IDS.size), name
            assert gives is None or (gives.width, gives.tokens) == (rows, IDS.size), name
    states = len(IDS) * len(state_positions(LENGTH))
    for name, site in statistics.sites.items():
        if ".experts." not in name:
            assert site.tokens == (states if name.endswith(".state") else IDS.size), name
            assert site.sequences.tolist() == list(range(9))
    for alias, target in statistics.aliases.items():
        assert alias not in statistics.sites
        assert target in statistics.roles


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_the_experts_together_read_what_was_routed(family: str, measured: Measured) -> None:
    source, statistics = measured(family)
    for template in SITES[family]:
        if "{expert}" in template.name:
            for block in range(2):
                names = [f"model.layers.{block}.{name}" for name, _ in names_of(template, source.config)]
                sites = [statistics.find(name) for name in names]
                routed = IDS.size * source.config["num_experts_per_tok"]
                assert sum(site.tokens for site in sites if site) == routed


def part_of(block: Tensor, sizes: tuple[int, ...], part: int) -> Tensor:
    return torch.split(block, sizes, dim=-1)[part]


@pytest.mark.parametrize(
    ("family", "module", "sizes", "names"),
    [
        ("phi3", "self_attn.qkv_proj", (64, 32, 32), [f"self_attn.{x}_proj.output" for x in "qkv"]),
        ("phi3", "mlp.gate_up_proj", (96, 96), ["mlp.gate_proj.output", "mlp.up_proj.output"]),
        ("mamba", "mixer.in_proj", (128, 128), ["mixer.in_proj.x", "mixer.in_proj.gate"]),
        ("mamba", "mixer.x_proj", (4, 8, 8), ["mixer.dt", "mixer.B", "mixer.C"]),
        ("mamba2", "mixer.in_proj", (128, 192, 8), ["mixer.in_proj.gate", "mixer.in_proj.xBC", "mixer.dt"]),
    ],
)
def test_a_fused_output_is_split_into_its_parts(
    family: str, module: str, sizes: tuple[int, ...], names: list[str], measured: Measured
) -> None:
    source, statistics = measured(family)
    seen = plain_pass(source)
    block = f"{architecture_of(source.config).spine.blocks}.1"
    for part, name in enumerate(names):
        values = part_of(seen[f"{block}.{module}.output"], sizes, part).double()
        site = statistics.sites[f"{block}.{name}"]
        np.testing.assert_allclose(
            site.channel_amax, values.abs().amax((0, 1)), rtol=0, atol=1e-4 * float(values.abs().max())
        )


def test_linears_with_one_input_share_a_site(tiny_model: Make) -> None:
    statistics = run(open_model(str(tiny_model())))
    first = statistics.find("model.layers.1.self_attn.q_proj.input")
    assert first is not None
    assert statistics.find("model.layers.1.self_attn.v_proj.input") is first
    assert statistics.find("model.layers.1.mlp.up_proj.input") is statistics.find("model.layers.1.mlp.gate_proj.input")
    assert statistics.find("lm_head.input") is statistics.find("model.norm.output")
    assert statistics.find("model.layers.9.output") is None
    assert set(statistics.aliases) == {
        "lm_head.input",
        *(f"model.layers.{i}.{name}.input" for i in (0, 1) for name in ("self_attn.k_proj", "self_attn.v_proj")),
        *(f"model.layers.{i}.mlp.up_proj.input" for i in (0, 1)),
    }


def test_roles_and_forward_order(tiny_model: Make) -> None:
    roles = run(open_model(str(tiny_model("qwen3")))).roles
    assert next(iter(roles)) == "model.embed_tokens.output"
    assert list(roles)[-2:] == ["model.norm.output", "lm_head.output"]
    mine = {name.removeprefix("model.layers.1."): role for name, role in roles.items() if ".1." in name}
    cached = {"self_attn.k_rope", "self_attn.v_proj.output"}
    assert {name for name, role in mine.items() if role == "cache"} == cached
    assert {name for name, role in mine.items() if role == "stream"} == {"output"}
    reads = {"self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}
    assert {name for name, role in mine.items() if role == "input"} == {f"{name}.input" for name in reads}
    order = list(mine)
    assert order.index("self_attn.q_proj.input") < order.index("self_attn.q_rope") < order.index("mlp.down_proj.input")
    assert order[-1] == "output"


def test_domains_hold_their_own_sequences(tiny_model: Make) -> None:
    source = open_model(str(tiny_model("mixtral")))
    statistics = run(source)
    assert list(statistics.domains) == ["prose", "code"]
    for name, numbers in (("prose", range(5)), ("code", range(5, 9))):
        site = statistics.domains[name].sites["model.layers.1.output"]
        assert site.sequences.tolist() == list(numbers)
        assert site.tokens == len(numbers) * LENGTH
    alone = run(source, Text(ids=IDS[5:], domains=("code",), domain_of=np.zeros(4, dtype=np.int64), sha256="x"))
    for name, site in alone.sites.items():
        np.testing.assert_array_equal(site.top_values, statistics.domains["code"].sites[name].top_values)
        np.testing.assert_array_equal(site.channel_high, statistics.domains["code"].sites[name].channel_high)


def test_gram_is_xtx_of_what_gemms_read_and_of_nothing_else(tiny_model: Make) -> None:
    source = open_model(str(tiny_model("qwen3_moe")))
    plain, statistics, seen = run(source), run(source, gram=True), plain_pass(source)
    assert all(site.gram.size == 0 for site in plain.sites.values())
    for name, site in statistics.sites.items():
        if statistics.roles[name] != "input":
            assert site.gram.size == 0
        else:
            values = seen[name].reshape(-1, site.width).double().numpy()
            wanted = values.T @ values
            np.testing.assert_allclose(site.gram, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max(), err_msg=name)


def test_stream_only_has_the_same_streams_and_nothing_else(tiny_model: Make) -> None:
    source = open_model(str(tiny_model()))
    whole, stream = run(source), run(source, stream_only=True)
    assert list(stream.sites) == [name for name, role in whole.roles.items() if role == "stream"]
    for name, site in stream.sites.items():
        np.testing.assert_array_equal(site.top_values, whole.sites[name].top_values)
        np.testing.assert_array_equal(site.channel_high, whole.sites[name].channel_high)
    assert all(not domain.sinks for domain in stream.domains.values())


def test_sinks_of_every_attention_are_counted(tiny_model: Make) -> None:
    statistics = run(open_model(str(tiny_model("gemma2"))))
    for name, batches_of in (("prose", 3), ("code", 2)):
        sinks = statistics.domains[name].sinks
        assert list(sinks) == [f"model.layers.{i}.self_attn" for i in range(2)]
        for one in sinks.values():
            assert one.sequences.tolist() == [5 if name == "prose" else 4, batches_of]
    assert not run(open_model(str(tiny_model("mamba")))).total.sinks


def test_two_passes_are_bit_for_bit_the_same(tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(tiny_model("gpt_oss")))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        run(source).save(tmp_path / name)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("one", "two")]
    assert files[0] == files[1]


def test_progress_counts_blocks(tiny_model: Make) -> None:
    told: list[tuple[int, int, str]] = []
    measure(open_model(str(tiny_model("opt"))), TEXT, progress=lambda *step: told.append(step))
    assert told == [(1, 2, "model.decoder.layers.0"), (2, 2, "model.decoder.layers.1")]
