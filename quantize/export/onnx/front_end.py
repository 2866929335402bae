"""The floating-point graph of a model, from its config alone, and the weights that belong into it.

mobius-onnx writes the graph: Hugging Face's tensor names, GroupQueryAttention with rotary embeddings inside,
fused residual norms, packed QKV weights. It says nothing about our weights: its initializers come without data,
and `bind_weights` gives each one a lazy reader, so that nothing is read before it is written.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from transformers import AutoConfig

from qtool.errors import InputRefused, nearest
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.export.onnx.graph_limits import refuse_uncomputable


def build_float_graph(config: Mapping[str, Any]) -> ir.Model:
    """The float32 decoder graph with a KV cache, weights left without data.

    Args:
        config: the model's config.json, validated.

    Returns:
        A model with inputs input_ids, attention_mask, past_key_values.N.key/value and outputs logits,
        present.N.key/value; MatMul(x, Transpose(W)) for every linear.

    Raises:
        InputRefused: when mobius-onnx does not know the model type, or its graph does not compute the config.
    """
    import mobius

    model_type = str(config.get("model_type"))
    if model_type not in mobius.registry:
        known = nearest(model_type, mobius.registry.architectures())
        raise InputRefused(f"model_type {model_type!r}", "mobius-onnx has no graph for it", known)
    network = mobius.registry.get(model_type)
    config_class = mobius.registry.get_config_class(model_type) or getattr(network, "config_class", None)
    foreign = AutoConfig.for_model(**copy.deepcopy(dict(config)))  # transformers writes into nested values
    refuse_uncomputable(foreign)
    described = (config_class or mobius.ArchitectureConfig).from_transformers(foreign)
    described = dataclasses.replace(described, dtype=ir.DataType.FLOAT)
    package = mobius.build_from_module(network(described), described, "text-generation", execution_provider="cpu")
    model: ir.Model = package["model"]
    return model


def bind_weights(model: ir.Model, source: WeightSource) -> None:
    """Give every initializer without data a lazy float32 reader on the checkpoint.

    Raises:
        InputRefused: when graph and checkpoint do not hold exactly the same tensors.
    """
    wanted = {name: value for name, value in model.graph.initializers.items() if value.const_value is None}
    different = sorted(set(wanted) ^ set(source.names()))
    for name in different[:1]:
        problem = "is missing from the checkpoint" if name in wanted else "has no place in the graph"
        raise InputRefused(name, f"{problem} ({len(different)} such tensors)", "check the model's config.json")
    for name, value in wanted.items():
        value.const_value = _reader(source, name, value)


def _reader(source: WeightSource, name: str, value: ir.Value) -> ir.LazyTensor:
    assert value.shape is not None
    shape = value.shape

    def read() -> ir.TensorProtocol:
        array = source.read(name)
        if array.shape != tuple(shape.numpy()):
            raise InputRefused(name, f"has shape {array.shape}, the graph asks for {shape}", "check the model")
        return ir.tensor(array)

    return ir.LazyTensor(read, dtype=ir.DataType.FLOAT, shape=shape, name=name)
