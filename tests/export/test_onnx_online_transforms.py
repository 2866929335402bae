"""The nodes around a linear: each equals the torch reference, a site's are made once, what has no nodes is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch

from qtool.errors import UsageError
from qtool.quantize.artifacts.quantized_linear import QuantizedLinear
from qtool.quantize.artifacts.scheme import layer_scheme
from qtool.quantize.export.onnx.passes.matmul_nbits import MatMulNBits
from qtool.quantize.export.onnx.passes.online_transforms import OnlineTransforms
from qtool.quantize.transforms.block_hadamard import BlockHadamard

QKV = [f"model.layers.0.self_attn.{x}_proj" for x in "qkv"]
UP = "model.layers.0.mlp.up_proj"
W4A16 = layer_scheme("W4A16", group_size=32)
RANKS = [(0, 0, 0), (4, 4, 4), (0, 8, 2), (0, 4, 0)]
CASES = [(kind, ranks) for kind in ("hadamard", "quad", "divide", "quad, then divide") for ranks in RANKS]
CASES += [(None, ranks) for ranks in RANKS if any(ranks)]


class Source:
    """The part of a checkpoint that the pass reads."""

    def __init__(self, weights):
        self.weights = weights

    def site_transform(self, module):
        weight = self.weights[module]
        return None if weight.transform is None else (weight.site, weight.transform)

    def side(self, module):
        return self.weights[module].side

    def low_rank(self, module):
        return self.weights[module].low_rank


def lowered(model, weights):
    """The model with both passes run; what was surrounded."""
    surround = OnlineTransforms(set(weights), Source(weights))
    assert surround(model).modified
    MatMulNBits(lambda module: weights[module].scheme, weights.__getitem__)(model)
    return surround.online


def reference(x, weights, floats):
    parts = [
        QuantizedLinear(weight, None if floats[module][1] is None else torch.from_numpy(floats[module][1]))
        for module, weight in weights.items()
    ]
    with torch.no_grad():
        return torch.cat([part(torch.from_numpy(x)) for part in parts], dim=-1).numpy()


def close(got, wanted):
    return np.abs(got - wanted).max() <= 3e-6 * np.abs(wanted).max()


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize(("kind", "ranks"), CASES)
def test_packed_linear_equals_the_reference(
    linear_model, run_model, surround, transform_of, normal, kind, ranks, tokens
):
    columns = 192
    floats = {m: (normal(n, columns), normal(n)) for m, n in zip(QKV, (48, 16, 24), strict=True)}
    transform = None if kind is None else transform_of(kind, columns)
    weights = {
        m: surround(w, W4A16, site="s", transform=transform, rank=r)
        for (m, (w, _)), r in zip(floats.items(), ranks, strict=True)
    }
    model = linear_model(floats)
    online = lowered(model, weights)["model.layers.0.self_attn.qkv_proj"]
    assert online.low_rank == ranks and online.site == ("" if kind is None else "s")
    x = normal(2, tokens, columns)
    x[..., 5] *= 50
    got, wanted = run_model(model, x=x)[0], reference(x, weights, floats)
    assert close(got, wanted)
    for module in weights:  # each part is there: without it the answer is another one
        bare = {**weights, module: replace(weights[module], low_rank=None, transform=None, side=None)}
        assert not close(got, reference(x, bare, floats)) or (kind is None and weights[module].low_rank is None)


@pytest.mark.parametrize("block", [16, 32, 64, 96])
def test_blocks_are_those_of_the_whole_width(linear_model, run_model, surround, normal, block):
    floats = {UP: (normal(16, 192), None)}
    transform = BlockHadamard.random(192, seed=1, stream="s", block=block)
    weights = {UP: surround(floats[UP][0], W4A16, site="s", transform=transform, rank=0)}
    model = linear_model(floats)
    lowered(model, weights)
    x = normal(1, 3, 192)
    assert close(run_model(model, x=x)[0], reference(x, weights, floats))


def test_a_site_is_transformed_once_for_all_who_read_it(linear_model, run_model, surround, transform_of, normal):
    floats = [{m: (normal(16, 64), None)} for m in (*QKV, UP)]
    made = transform_of("quad", 64)
    sites = ["one", "one", "two", "two"]
    weights = {
        m: surround(w, W4A16, site=site, transform=made, rank=0)
        for pack, site in zip(floats, sites, strict=True)
        for m, (w, _) in pack.items()
    }
    model = linear_model(*floats)
    online = lowered(model, weights)
    operators = [node.op_type for node in model.graph]
    assert operators.count("Sub") == 2 and operators.count("MatMulNBits") == 4 and operators.count("Add") == 4
    assert sum(value.dtype == ir.DataType.FLOAT16 for value in model.graph.initializers.values()) == 2 + 4
    assert [len(online[m].initializers) for m in (*QKV, UP)] == [2 + 3 + 1, 1, 2 + 1, 1]
    x = normal(1, 3, 64)
    got = run_model(model, x=x)
    for index, pack in enumerate(floats):
        assert close(got[index], reference(x, {m: weights[m] for m in pack}, pack))


def test_what_has_no_nodes_is_refused(linear_model, surround, normal):
    class Strange(BlockHadamard):
        kind = "strange"

    floats = {UP: (normal(16, 512), None)}
    for transform, why in (
        (Strange(signs=torch.ones(512), block=64), "mlp.input: transform strange.*does not run it"),
        (BlockHadamard.random(512, seed=0, stream="s", block=512), "mlp.input: Hadamard block 512.*at most 256"),
    ):
        weights = {UP: surround(floats[UP][0], W4A16, site="mlp.input", transform=transform, rank=0)}
        with pytest.raises(UsageError, match=why):
            lowered(linear_model(floats), weights)
