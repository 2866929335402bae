"""Ranges: mergeable, shared by what only moves values, widened by statistics, and audited."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qtool.errors import InputRefused, UsageError
from qtool.quantize.architectures.sites import SITES
from qtool.quantize.export.onnx.npu.activation_types import ActivationTypes
from qtool.quantize.export.onnx.npu.decoder import Decoder
from qtool.quantize.export.onnx.npu.model_shape import model_shape
from qtool.quantize.export.onnx.npu.plain_graph import PlainGraph
from qtool.quantize.export.onnx.npu.ranges import Range, merge, with_statistics
from qtool.quantize.export.onnx.npu.scales import MASKED_BELOW, SharedRanges, scale_of, too_coarse, wanted_ranges
from qtool.runtime.npu.audit import audit_package

PRODUCT = "model.layers.1.mlp.down_proj.input"


def test_ranges_merge_in_any_order():
    parts = [{"a": Range(low=-1, high=2)}, {"a": Range(low=-3, high=1), "b": Range(low=0, high=4)}]
    assert merge(parts) == merge(parts[::-1]) == {"a": Range(low=-3, high=2), "b": Range(low=0, high=4)}
    with pytest.raises(InputRefused, match="not finite"):
        Range.of(np.array([1.0, np.nan]), "a")


@pytest.mark.parametrize("bits", [8, 16])
def test_scales_hold_the_range_and_zero_exactly(bits):
    for low, high in ((-1.0, 3.0), (0.5, 2.0), (-7.0, -2.0), (0.0, 0.0)):
        scale = scale_of(Range(low=low, high=high), bits)
        values = np.array([low, 0.0, high], dtype=np.float32)
        codes = scale.codes(values).astype(np.float64)
        back = (codes - scale.zero_point) * scale.scale
        assert back[1] == 0
        assert np.abs(back - values).max() <= scale.scale * 0.51


def test_what_moves_values_shares_their_range_and_masks_reach_below_the_scores():
    graph = PlainGraph()
    graph.op("Reshape", "x.heads", "x", graph.index(1))
    graph.op("Concat", "p.keys", "past", "x.heads", axis=0)
    graph.op("MatMul", "p.scores", "q", "p.keys")
    graph.op("Add", "p.masked_scores", "p.scores", "attention_mask")
    measured = {"x": Range(low=-1, high=1), "p.scores": Range(low=-4, high=10)}
    ranges = SharedRanges(graph, measured, {}, headroom=0.5)
    assert ranges.find("past", 16) == ranges.find("p.keys", 16) == Range(low=-1.5, high=1.5)
    assert ranges.find("past", 8) == Range(low=-1, high=1)
    masked, mask = ranges.find("p.masked_scores", 16), ranges.find("attention_mask", 16)
    assert masked == Range(low=-6 - MASKED_BELOW, high=15)
    # Any score plus the mask lies at or below the range's end: there it saturates.
    assert mask.low + 15 <= masked.low and mask.high == 0
    with pytest.raises(InputRefused, match="no range"):
        ranges.find("q", 16)


def test_measurement_asks_for_islands_where_eight_bits_say_too_little():
    graph = PlainGraph()
    graph.op("Mul", "calm", "x", "x")
    graph.op("Mul", "wild", "calm", "x")
    graph.op("Mul", "after", "wild", "x")
    # A step of 1 / 255 of the range: 0.9 % of a normal tensor's rms, 22 % of one with values 200 times as large.
    calm = Range.of(np.random.default_rng(0).standard_normal(10_000).clip(-4, 4), "calm")
    measured = {"x": calm, "calm": calm, "after": calm, "wild": calm.merge(Range(low=-100, high=100))}
    ranges = SharedRanges(graph, measured, {}, headroom=0.3)
    types = ActivationTypes(default=8)
    found = too_coarse(graph, types, ranges, {}, 0.05)
    assert set(found) == {"wild", "after"}
    assert found["wild"] == pytest.approx(200 / 255 / 12**0.5, rel=0.05)
    assert set(too_coarse(graph, types, ranges, {("wild", 8): scale_of(calm, 8)}, 0.05)) == {"wild"}
    lifted = replace(types, measured=frozenset(found))
    assert [lifted.bits(node) for node in graph.nodes] == [8, 16, 16]


class OneSite:
    def find(self, site):
        return self if site == "a" else None

    channel_low, channel_high = np.array([-5.0, 0.0]), np.array([1.0, 0.5])


def test_statistics_widen_the_ranges_of_their_sites():
    ranges = {"a": Range(low=-1, high=2), "b": Range(low=-1, high=2)}
    widened, sites = with_statistics(ranges, OneSite())
    assert sites == 1
    assert widened == {"a": Range(low=-5, high=2), "b": Range(low=-1, high=2)}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_graph_s_tensors_carry_the_names_of_measured_sites(family, llama):
    config = {**llama.config, "model_type": family, "head_dim": 16}
    shape = model_shape(config, chunk=8, context=32)
    tables = (np.ones((32, 16), np.float32), np.zeros((32, 16), np.float32))
    decoder = Decoder(source=llama, shape=shape, static=shape.static(8, 32), tables=tables, norm="l2")
    wanted = set(wanted_ranges(decoder.graph(8)))
    measured = {f"model.layers.1.{site.name}" for site in SITES[family]}
    # Queries are rotated with attention's scale in the table: their range is another.
    assert measured - wanted == {"model.layers.1.self_attn.q_rope", "model.layers.1.self_attn.o_proj.input"}
    assert {"model.layers.1.output", "model.norm.output"} <= wanted


def test_the_audit_of_calibrated_text_finds_nothing_outside(llama_package, random_windows):
    audit = audit_package(llama_package, random_windows(), progress=lambda *_: None, threads=1)
    assert audit.worst.share == 0
    kinds = audit.by_kind()
    assert {"SwiGLU product", "residual stream", "logits", "attention scores"} <= set(kinds)
    assert len(kinds["SwiGLU product"]) == 2
    product = next(t for t in audit.tensors if t.name == PRODUCT)
    # The float ranges were widened by three tenths at each end; the quantized graph's own values stay within them.
    assert 0 < product.headroom < 0.25
    assert product.growth is None
    assert audit.to_json()["worst"]["share"] == 0


def test_the_audit_finds_a_planted_saturation(llama_package, random_windows, tmp_path):
    folder = tmp_path / "planted"
    shutil.copytree(llama_package, folder)
    model = onnx.load(str(folder / "prefill.onnx"), load_external_data=False)
    scale = next(t for t in model.graph.initializer if t.name == f"{PRODUCT}.uint16.scale")
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) / np.float32(8), scale.name))
    (folder / "prefill.onnx").write_bytes(model.SerializeToString())
    audit = audit_package(folder, random_windows(1), progress=lambda *_: None, threads=1)
    assert audit.worst.name == PRODUCT
    assert audit.worst.share > 0.001 and audit.worst.headroom < -1
    assert sum(found.saturated > 0 for found in audit.tensors) < 5


def test_the_audit_sees_what_longer_text_needs(llama, npu_package, random_windows):
    folder, _ = npu_package(llama, windows=random_windows(1, 8))
    audit = audit_package(folder, random_windows(2, 32, seed=9), progress=lambda *_: None, threads=1)
    assert audit.calibrated_length == 8 and audit.length == 32
    assert all(found.growth is not None for found in audit.tensors if found.early_amax)
    with pytest.raises(UsageError, match="chunks of 8"):
        audit_package(folder, random_windows(1, 7), progress=lambda *_: None, threads=1)
