"""The run over a model: every family, what is written, what is calibrated on, what is reported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtool.errors import InputRefused, UsageError
from qtool.quantize.architectures import architecture_of, linear_names
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter
from qtool.quantize.artifacts.manifest import Manifest
from qtool.quantize.artifacts.network import load_network, replace_module
from qtool.quantize.artifacts.quantized_linear import QuantizedLinear
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.artifacts.store import stage
from qtool.quantize.inputs import SourceModel, open_model
from qtool.quantize.measure import Text, measure
from qtool.quantize.quantizers import QuantizationReport, pipeline, quantize_model
from qtool.quantize.quantizers.hessian import Hessian

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
TOKENS = np.random.default_rng(0).integers(0, 256, (6, 48))
Make = Callable[..., Path]


def silent(done: int, total: int, text: str) -> None:
    """No progress bar."""


class Collector:
    """A writer that keeps what it is given."""

    def __init__(self) -> None:
        self.quantized: dict[str, QuantizedTensor] = {}
        self.floats: dict[str, torch.Tensor] = {}
        self.shards: list[list[str]] = []

    def add(self, quantized: Mapping[str, QuantizedTensor], floats: Mapping[str, torch.Tensor]) -> None:
        self.quantized |= quantized
        self.floats |= floats
        self.shards.append([*quantized, *floats])


def run(
    source: SourceModel, recipe: Recipe, *, tokens: Any = TOKENS, statistics: Statistics | None = None
) -> tuple[Collector, QuantizationReport]:
    writer = Collector()
    report = quantize_model(
        source,
        assignments=recipe.assign(linear_names(source.config)),
        groups=architecture_of(source.config).linear_groups,
        tokens=tokens,
        statistics=statistics,
        writer=writer,  # type: ignore[arg-type]
        progress=silent,
    )
    return writer, report


def logits(source: SourceModel, written: Mapping[str, QuantizedTensor]) -> torch.Tensor:
    network = load_network(source)
    for module, tensor in written.items():
        replace_module(network, module, lambda old, t=tensor: QuantizedLinear(t, old.bias))
    with torch.no_grad():
        out: torch.Tensor = network(torch.from_numpy(TOKENS)).logits
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_every_tensor_is_written_once(tiny_model: Make, family: str, tied: bool) -> None:
    source = open_model(str(tiny_model(family, tied=tied)))
    writer, report = run(source, Recipe.preset("W4A8", lm_head="W4A8", group_size=32, ignore=["*.o_proj"]))
    names = [*writer.floats, *(f"{m}.weight" for m in writer.quantized)]
    if tied:
        names[names.index("lm_head.weight")] = "model.embed_tokens.weight"
    assert sorted(names) == sorted(source.names())
    assert [len([n for n in shard if n.startswith("model.layers.1.")]) > 0 for shard in writer.shards] == [0, 1, 0]
    assert (report.quantized, report.linears) == (13, 15)
    kept = [f"model.layers.{i}.self_attn.o_proj" for i in (0, 1)]
    assert report.skipped == dict.fromkeys(kept, "ignored by '*.o_proj'")
    assert report.parameters == sum(source.read(name).size for name in source.names())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scheme", ["W4A16", "W4A8", "W8A8", "FP8_DYNAMIC", "W4A8_FP", "MXFP4A8", "NVFP4"])
def test_gptq_is_closer_to_the_float_model_than_rtn(tiny_model: Make, family: str, scheme: str) -> None:
    source = open_model(str(tiny_model(family, tied=False)))
    exact = logits(source, {})

    def distance(quantizer: str) -> float:
        writer, _ = run(source, Recipe.preset(scheme, quantizer=quantizer, ignore=["lm_head"]))
        return float((logits(source, writer.quantized) - exact).square().mean())

    assert distance("gptq") < 0.9 * distance("rtn")


@pytest.mark.parametrize("tied", [True, False])
def test_later_linears_are_calibrated_on_what_will_run(
    tiny_model: Make, tied: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hessians equal those of a plain forward pass over the finished model, up to the linear in question."""
    seen: dict[str, torch.Tensor] = {}

    class Spy(Hessian):
        def matrix(self) -> torch.Tensor:
            seen[self._name] = super().matrix()
            return seen[self._name]

    monkeypatch.setattr(pipeline, "Hessian", Spy)
    source = open_model(str(tiny_model("qwen2", tied=tied)))
    writer, _ = run(source, Recipe.preset("W4A8", lm_head="W4A8", group_size=32))
    network = load_network(source)
    if tied:
        network.model.embed_tokens.weight.data = writer.quantized["lm_head"].dequantize()
    for module, tensor in writer.quantized.items():
        replace_module(network, module, lambda old, t=tensor: QuantizedLinear(t, old.bias))
    expected: dict[str, torch.Tensor] = {}

    def record(module: str) -> Callable[..., None]:
        def hook(_: object, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).double()
            expected[module] = rows.T @ rows

        return hook

    for module in seen:
        network.get_submodule(module).register_forward_pre_hook(record(module))
    with torch.no_grad():
        network(torch.from_numpy(TOKENS))
    assert len(seen) == (8 if tied else 9)
    for module, hessian in seen.items():
        torch.testing.assert_close(hessian, expected[module], rtol=1e-3, atol=1e-3 * float(hessian.abs().max()))


def test_rtn_alone_needs_no_tokens_and_runs_no_network(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a data-free recipe built a network")

    monkeypatch.setattr(pipeline, "NetworkShell", refuse)
    source = open_model(str(tiny_model()))
    writer, report = run(source, Recipe.preset("W4A8", quantizer="rtn"), tokens=None)
    assert len(writer.quantized) == 15
    assert all(layer.output_error is None for layer in report.layers.values())


def test_missing_tokens_are_a_usage_error(tiny_model: Make) -> None:
    with pytest.raises(UsageError, match="calibration tokens"):
        run(open_model(str(tiny_model())), Recipe.preset("W4A8"), tokens=None)


def test_a_tied_head_is_rounded_to_nearest_and_says_so(tiny_model: Make) -> None:
    source = open_model(str(tiny_model()))
    writer, report = run(source, Recipe.preset("W4A8"))
    plain, _ = run(source, Recipe.preset("W4A8", quantizer="rtn"), tokens=None)
    assert torch.equal(writer.quantized["lm_head"].codes, plain.quantized["lm_head"].codes)
    assert report.layers["lm_head"].quantizer == "rtn"
    assert any("lm_head" in note for note in report.notes)


def test_an_untied_head_is_calibrated(tiny_model: Make) -> None:
    _, report = run(open_model(str(tiny_model(tied=False))), Recipe.preset("W4A8"))
    assert report.layers["lm_head"].quantizer == "gptq"
    assert report.layers["lm_head"].output_error is not None


def test_mixed_rules_in_one_group(tiny_model: Make) -> None:
    rules = [
        {"match": "*", "scheme": "W4A8", "group_size": 32},
        {"match": "*.q_proj", "scheme": "W8A8", "quantizer": "rtn"},
        {"match": "lm_head", "scheme": "W8A8", "quantizer": "rtn"},
    ]
    source = open_model(str(tiny_model()))
    writer, report = run(source, Recipe.from_data({"rules": rules, "ignore": ["model.layers.0.self_attn.k_proj"]}))
    attention = "model.layers.1.self_attn."
    assert writer.quantized[attention + "q_proj"].scheme.weight.format.bits == 8
    assert report.layers[attention + "q_proj"].quantizer == "rtn"
    assert report.layers[attention + "q_proj"].output_error is not None  # its group's Hessian is there
    assert writer.quantized[attention + "k_proj"].scheme.weight.format.bits == 4
    assert "model.layers.0.self_attn.k_proj.weight" in writer.floats
    assert [row.modules for row in report.table if row.scheme.startswith("W8A8")] == [3]


def test_stacked_linears_equal_single_ones(tiny_model: Make) -> None:
    source = open_model(str(tiny_model("qwen3")))
    together, _ = run(source, Recipe.preset("W4A16", group_size=32, ignore=["lm_head"]))
    rules = [
        {"match": "*", "scheme": "W4A16", "group_size": 32},
        {"match": "*.k_proj", "scheme": "W4A16", "group_size": 32, "options": {"block_size": 127}},
    ]
    apart, _ = run(source, Recipe.from_data({"rules": rules, "ignore": ["lm_head"]}))
    module = "model.layers.0.self_attn.v_proj"
    assert torch.equal(together.quantized[module].codes, apart.quantized[module].codes)


def test_static_activations_take_their_scale_from_statistics(tiny_model: Make) -> None:
    source = open_model(str(tiny_model()))
    recipe = Recipe.preset("W8A8", activation="per_tensor", ignore=["lm_head"])
    with pytest.raises(UsageError, match="qtool measure"):
        run(source, Recipe.preset("W8A8", activation="per_tensor", ignore=["lm_head"], quantizer="rtn"), tokens=None)
    text = Text(ids=TOKENS, domains=("text",), domain_of=np.zeros(len(TOKENS), dtype=np.int64), sha256="0" * 64)
    statistics = measure(source, text, progress=silent).statistics
    writer, _ = run(source, recipe, statistics=statistics)
    for module in ("model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"):
        site = statistics.find(f"{module}.input")
        scale = writer.quantized[module].input_scale
        assert site is not None and scale is not None
        assert float(scale) == pytest.approx(site.amax / 127, rel=1e-6)
    error = (logits(source, writer.quantized) - logits(source, {})).abs().max()
    assert float(error) < 0.5


def test_infinite_activations_are_refused_by_layer(tiny_model: Make) -> None:
    source = open_model(str(tiny_model()))
    real = source.read

    class Exploding:
        def __getattr__(self, name: str) -> Any:
            return getattr(source, name)

        def read(self, name: str) -> Any:
            return real(name) * (1e38 if name == "model.layers.1.mlp.up_proj.weight" else 1)

    with pytest.raises(InputRefused, match=r"model\.layers\.1\.mlp\.down_proj\.input"):
        run(Exploding(), Recipe.preset("W4A16"))  # type: ignore[arg-type]


def test_reported_bits_are_the_bytes_on_disk(tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(tiny_model("qwen2")))
    recipe = Recipe.preset("W4A8", lm_head="W4A8", symmetric=False, group_size=32)
    with stage(tmp_path / "checkpoint") as staging:
        writer = CheckpointWriter(staging.path, source.config)
        report = quantize_model(
            source,
            assignments=recipe.assign(linear_names(source.config)),
            groups=architecture_of(source.config).linear_groups,
            tokens=TOKENS,
            statistics=None,
            writer=writer,
            progress=silent,
        )
        staging.commit(Manifest(kind="checkpoint", details={**writer.details, "report": report.to_json()}))
    checkpoint = QuantizedCheckpoint(tmp_path / "checkpoint")
    assert sorted(checkpoint.names()) == sorted(source.names())
    stored = sum(checkpoint.quantized(m).stored_bits for m in checkpoint.schemes)
    linears = sum(n * k for n, k in checkpoint.shapes.values())
    assert report.bits_per_weight == pytest.approx(stored / linears)
    assert report.bits_per_weight == pytest.approx(4 + 24 / 32)  # scale 16 bits and zero point 8 bits a group
    assert report.quantized_share == pytest.approx(linears / report.parameters)
    assert sum(row.share for row in report.table) == pytest.approx(1.0)


def test_two_runs_are_equal_bit_for_bit(tiny_model: Make) -> None:
    source = open_model(str(tiny_model()))
    (first, report), (second, again) = (run(source, Recipe.preset("W4A8")) for _ in range(2))
    for module, tensor in first.quantized.items():
        for key, value in tensor.to_tensors(module).items():
            assert torch.equal(value, second.quantized[module].to_tensors(module)[key]), key
    assert report.to_json() == again.to_json()


def test_progress_counts_every_linear(tiny_model: Make) -> None:
    source = open_model(str(tiny_model()))
    seen: list[tuple[int, int, str]] = []
    quantize_model(
        source,
        assignments=Recipe.preset("W8A8", quantizer="rtn").assign(linear_names(source.config)),
        groups=architecture_of(source.config).linear_groups,
        tokens=None,
        statistics=None,
        writer=Collector(),  # type: ignore[arg-type]
        progress=lambda *event: seen.append(event),
    )
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][:2] == (15, 15)
