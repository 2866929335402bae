"""Quantization behind a transform of its inputs and with side products: stored, counted, computed, refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtool.cli.quantized import quantized
from qtool.errors import InputRefused, UsageError
from qtool.quantize.architectures import architecture_of, linear_names
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter
from qtool.quantize.artifacts.manifest import Manifest
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.artifacts.store import stage
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.inputs import Tokens, open_model
from qtool.quantize.measure import Text, measure
from qtool.quantize.quantizers import QuantizationReport, quantize_model
from qtool.quantize.quantizers.layers import quantize_linears
from qtool.quantize.transforms.model_transforms import Context, transform_model
from qtool.runtime.reference import ReferenceSession

Make = Callable[..., Path]
TOKENS = np.random.default_rng(0).integers(0, 256, (8, 48))
SITE = "model.layers.0.self_attn.q_proj"


def build(
    folder: Path, source: WeightSource, scheme: str, **rule: Any
) -> tuple[QuantizedCheckpoint, QuantizationReport]:
    recipe = Recipe.preset(scheme, lm_head="float", **rule)
    context = Context(seed=recipe.seed, smooth_alpha=recipe.smooth_alpha, measure=measured)
    source, _ = transform_model(source, recipe.model, context)
    with stage(folder) as staging:
        writer = CheckpointWriter(staging.path, source.config)
        report = quantize_model(
            source,
            assignments=recipe.assign(linear_names(source.config)),
            groups=architecture_of(source.config).linear_groups,
            tokens=TOKENS,
            statistics=measured(source) if rule.get("activation") == "per_tensor" else None,
            writer=writer,
            progress=lambda *_: None,
            seed=recipe.seed,
        )
        staging.commit(Manifest(kind="checkpoint", recipe=recipe.to_data(), details=writer.details))
    return QuantizedCheckpoint(folder), report


def measured(source: WeightSource) -> Statistics:
    text = Text(ids=TOKENS, domains=("text",), domain_of=np.zeros(len(TOKENS), dtype=np.int64), sha256="0" * 64)
    return measure(source, text, progress=lambda *_: None).statistics


def logits(source: WeightSource) -> torch.Tensor:
    with ReferenceSession(source) as session:
        return torch.from_numpy(session.prefill(TOKENS))


def planted(folder: Path) -> Path:
    """Two channels of every norm a hundred times louder, their readers' columns a hundredth: the same function."""
    from safetensors.numpy import load_file, save_file

    file = folder / "model.safetensors"
    tensors = {name: tensor.copy() for name, tensor in load_file(file).items()}
    for block in range(2):
        for norm, readers in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            tensors[f"model.layers.{block}.{norm}.weight"][[3, 40]] *= 100
            for reader in readers:
                tensors[f"model.layers.{block}.{reader}.weight"][:, [3, 40]] /= 100
    save_file(tensors, file)
    return folder


def error(checkpoint: WeightSource, source: WeightSource) -> float:
    wanted = logits(source)
    return float((logits(checkpoint) - wanted).square().sum() / wanted.square().sum())


TRANSFORMED = [
    dict(transform="hadamard"),
    dict(transform="quad", rank=8),
    dict(low_rank=8),
    dict(transform="quad", rank=4, low_rank=4, quantizer="rtn"),
]


@pytest.mark.parametrize("rule", TRANSFORMED)
def test_what_is_stored_is_what_was_computed(rule: dict[str, Any], tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(tiny_model()))
    checkpoint, _ = build(tmp_path / "one", source, "W8A8", group_size=32, activation="per_token", **rule)
    assert checkpoint.transformed(SITE)
    loaded = checkpoint.quantized(SITE)
    assert (loaded.transform is None) == ("transform" not in rule)
    assert (loaded.low_rank is None) == ("low_rank" not in rule)
    weight = torch.from_numpy(source.read(f"{SITE}.weight"))
    assert float((loaded.effective() - weight).norm() / weight.norm()) < 0.01
    assert torch.equal(torch.from_numpy(checkpoint.read(f"{SITE}.weight")), loaded.effective())
    assert error(checkpoint, source) < 1e-3
    again, _ = build(tmp_path / "two", source, "W8A8", group_size=32, activation="per_token", **rule)
    assert again.digest == checkpoint.digest


def test_linears_of_one_site_share_its_transform(tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(tiny_model()))
    checkpoint, report = build(tmp_path / "out", source, "W8A8", transform="quad", rank=8)
    sites = {m: checkpoint.quantized(f"model.layers.0.self_attn.{m}_proj").site for m in "qkvo"}
    assert sites["q"] == sites["k"] == sites["v"] != sites["o"]
    _, before = build(tmp_path / "plain", source, "W8A8")
    linears = [name for name in linear_names(source.config) if name != "lm_head"]
    outputs = sum(checkpoint.shapes[name][0] for name in linears)
    # Per linear a side weight [N, 8] in 16 bits; per site directions [K, 8] in 16 bits and signs [K] in 8.
    widths = 2 * (64 + 64 + 64 + 96)
    more = 16 * 8 * outputs + widths * (16 * 8 + 8)
    weights = sum(n * k for n, k in (checkpoint.shapes[name] for name in linears))
    assert report.bits_per_weight_quantized - before.bits_per_weight_quantized == pytest.approx(more / weights)


RECOVERY = [
    (dict(transform="hadamard"), 0.85),
    (dict(transform="quad", rank=8), 0.3),
    (dict(model=("fold_norms", "rotate")), 0.6),
    (dict(model=("smooth",)), 0.3),
]


@pytest.mark.parametrize(("rule", "share"), RECOVERY)
def test_transforms_recover_from_planted_outlier_channels(
    rule: dict[str, Any], share: float, tiny_model: Make, tmp_path: Path
) -> None:
    source = open_model(str(planted(tiny_model())))
    plain, _ = build(tmp_path / "plain", source, "W4A4")
    checkpoint, _ = build(tmp_path / "transformed", source, "W4A4", **rule)
    assert error(checkpoint, source) < share * error(plain, source)


def test_smoothing_helps_static_scales(tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(planted(tiny_model())))
    plain, _ = build(tmp_path / "plain", source, "W8A8", activation="per_tensor")
    checkpoint, _ = build(tmp_path / "smooth", source, "W8A8", activation="per_tensor", model=("smooth",))
    assert error(checkpoint, source) < 0.2 * error(plain, source)


def test_a_low_rank_correction_takes_error_away(tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(tiny_model()))
    _, plain = build(tmp_path / "plain", source, "W4A16", quantizer="rtn")
    previous = {name: layer.weight_error for name, layer in plain.layers.items()}
    for rank in (4, 16):
        _, report = build(tmp_path / f"rank{rank}", source, "W4A16", quantizer="rtn", low_rank=rank)
        current = {name: layer.weight_error for name, layer in report.layers.items()}
        assert all(current[name] < previous[name] for name in current)
        previous = current


def test_a_rotated_model_is_quantized_untied(tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(tiny_model()))
    checkpoint, _ = build(tmp_path / "out", source, "W8A8", model=("fold_norms", "rotate"))
    assert not checkpoint.tied
    assert error(checkpoint, source) < 1e-3


def test_what_cannot_be_transformed_is_refused(tiny_model: Make, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="transform"):
        Recipe.preset("W4A4", transform="quod")
    with pytest.raises(UsageError, match="model"):
        Recipe.preset("W4A4", model=("turn",))
    with pytest.raises(UsageError, match="16 levels"):
        Recipe.preset("W4A4", activation="per_tensor")
    source = open_model(str(tiny_model()))
    with pytest.raises(InputRefused, match="rank 65"):
        build(tmp_path / "out", source, "W4A4", transform="quad", rank=65)
    gains = open_model(str(planted(tiny_model())))
    with pytest.raises(InputRefused, match="fold"):
        build(tmp_path / "out", gains, "W4A4", model=("rotate",))


@pytest.mark.parametrize("transform", ["hadamard", "quad"])
def test_a_head_that_is_also_the_embedding_is_not_transformed(
    tiny_model: Make, tmp_path: Path, transform: str
) -> None:
    source = open_model(str(tiny_model()))
    rule = {"match": "*", "scheme": "W8A8", "quantizer": "rtn", "transform": transform, "rank": 8}
    recipe = Recipe.from_data({"rules": [rule]})
    text = Tokens(ids=TOKENS, text_sha256="", tokenizer_sha256="", windows=())
    checkpoint, report = quantized(source, recipe, text, tmp_path / "out", title="test")
    assert any("its inputs as they are" in note for note in report.notes)
    assert checkpoint.quantized("lm_head").transform is None
    assert checkpoint.quantized(SITE).transform is not None
    spread = logits(source).max() - logits(source).min()
    assert (logits(checkpoint) - logits(source)).abs().max() < 0.1 * spread


@pytest.mark.parametrize(
    ("scheme", "more", "block"),
    [
        ("MXFP4", {}, 32),
        ("MXFP4A16", {}, 32),
        ("NVFP4", {}, 16),
        ("W4A8", {"scale": "e8m0", "group_size": 32}, 64),
        ("W4A8", {"group_size": 32}, 64),
    ],
)
@pytest.mark.parametrize("transform", ["hadamard", "quad"])
def test_a_rotation_stays_inside_the_blocks_of_a_block_format(
    tiny_model: Make, tmp_path: Path, scheme: str, more: dict[str, Any], block: int, transform: str
) -> None:
    source = open_model(str(tiny_model("llama", num_hidden_layers=1)))
    checkpoint, _ = build(tmp_path / "out", source, scheme, transform=transform, rank=8, quantizer="rtn", **more)
    found = checkpoint.site_transform(SITE)
    assert found is not None and found[1].header()["block"] == block


def test_one_input_under_rotations_of_two_widths(tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(tiny_model("llama", num_hidden_layers=1)))
    shared = {"transform": "hadamard", "quantizer": "gptq"}
    recipe = Recipe.from_data(
        {
            "rules": [
                {"match": "*", "scheme": "MXFP4", **shared},
                {"match": "*.k_proj", "scheme": "W8A8", "group_size": 32, **shared},
            ],
            "ignore": ["lm_head"],
        }
    )
    with stage(tmp_path / "out") as staging:
        writer = CheckpointWriter(staging.path, source.config)
        quantize_model(
            source,
            assignments=recipe.assign(linear_names(source.config)),
            groups=architecture_of(source.config).linear_groups,
            tokens=TOKENS,
            statistics=None,
            writer=writer,
            progress=lambda *_: None,
        )
        staging.commit(Manifest(kind="checkpoint", recipe=recipe.to_data(), details=writer.details))
    checkpoint = QuantizedCheckpoint(tmp_path / "out")
    wide = checkpoint.site_transform(SITE.replace("q_proj", "k_proj"))
    narrow = checkpoint.site_transform(SITE)
    assert wide is not None and narrow is not None and wide[0] != narrow[0]
    assert (wide[1].header()["block"], narrow[1].header()["block"]) == (64, 32)
    assert error(checkpoint, source) < 0.2


def test_one_input_divided_in_groups_of_two_sizes(tiny_model: Make, tmp_path: Path) -> None:
    source = open_model(str(tiny_model("llama", num_hidden_layers=1)))
    shared = {"scheme": "W4A4", "activation": "per_token", "transform": "hadamard", "runtime_smooth": "frozen"}
    recipe = Recipe.from_data(
        {
            "rules": [
                {"match": "*", "group_size": 32, **shared},
                {"match": "*.k_proj", "group_size": 16, **shared},
            ],
            "ignore": ["lm_head"],
        }
    )
    tokens = Tokens(ids=TOKENS, text_sha256="0" * 64, tokenizer_sha256="1" * 64, windows=())
    checkpoint, _ = quantized(source, recipe, tokens, tmp_path / "out", title="two sizes")
    found = [checkpoint.site_transform(SITE.replace("q_proj", linear)) for linear in ("q_proj", "k_proj")]
    assert found[0] is not None and found[1] is not None and found[0][0] != found[1][0]
    coarse, fine = (transform.to_tensors()["factors"] for _, transform in found if transform is not None)
    assert not torch.equal(coarse, fine)


@pytest.mark.parametrize("kinds", [("quad", "quad"), ("quad", "hadamard"), ("hadamard", "quad"), ("quad", "nothing")])
def test_a_second_moment_that_is_given_away_gives_the_same_codes(kinds: tuple[str, ...]) -> None:
    names = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj")
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(32, 64, generator=generator) for name in names}
    x = torch.randn(300, 64, generator=generator) * torch.linspace(1, 9, 64)

    rules: dict[str, dict[str, Any]] = {
        "quad": {"transform": "quad", "rank": 4},
        "hadamard": {"transform": "hadamard"},
        "nothing": {},
    }

    def codes(moment: torch.Tensor, *, last_use: bool) -> list[torch.Tensor]:
        assignments = [
            Recipe.preset("W4A8", group_size=32, lm_head="float", **rules[kind])
            .assign([name, "lm_head"])[name]
            for name, kind in zip(names, kinds, strict=True)
        ]
        done = quantize_linears(assignments, weights, moment, {}, last_use=last_use)
        return [done[name].tensor.codes for name in names]

    moment = (x.T @ x).double()
    kept, given = moment.clone(), moment.clone()
    expected = codes(kept, last_use=False)
    assert torch.equal(kept, moment)
    for found, wanted in zip(codes(given, last_use=True), expected, strict=True):
        assert torch.equal(found, wanted)
