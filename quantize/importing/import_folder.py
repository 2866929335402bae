"""A quantized folder of another tool as a checkpoint: codes, scales and zero points number for number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from qtool.errors import UsageError
from qtool.quantize.architectures import linear_names, tensor_shapes
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter, float_tensor
from qtool.quantize.artifacts.formats import FP8_E4M3, INT8
from qtool.quantize.artifacts.granularity import PerToken, PerTokenGroup, group_size_of
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.rule import Assignment
from qtool.quantize.artifacts.scheme import LayerScheme, TensorScheme
from qtool.quantize.inputs.quantized_folder import QuantizedFolder
from qtool.quantize.inputs.stored_weight import StoredWeight
from qtool.quantize.quantizers.report import Ledger, QuantizationReport

Progress = Callable[[int, int, str], None]
IN_FLOAT = "in float in the imported model"


def import_folder(
    folder: QuantizedFolder, writer: CheckpointWriter, *, activation: str | None, progress: Progress
) -> QuantizationReport:
    """Write a checkpoint's tensors: one shard a decoder block, one for the rest.

    Args:
        folder: what another tool wrote.
        writer: takes the shards.
        activation: "per_token" or "per_token_group" gives linears that read floats INT8 inputs from now on; the codes
            stay what they are. None leaves the inputs as the folder says.
        progress: called with (linears done, linears, name of the last).

    Raises:
        UsageError: an activation that the weights' groups do not allow, naming the layer.
        InputRefused: for what a checkpoint cannot hold exactly, naming the layer.
    """
    config = folder.floats.config
    linears, shapes = linear_names(config), tensor_shapes(config)
    ledger, quantized = Ledger({}), set(folder.modules)
    schemes: dict[str, LayerScheme] = {}
    blocks = list(dict.fromkeys(_block(name) for name in (*linears, *folder.floats.names())))
    done = 0
    for block in sorted(blocks, key=lambda name: (not name, blocks.index(name))):
        tensors: dict[str, QuantizedTensor] = {}
        for module in (name for name in linears if _block(name) == block and name in quantized):
            tensors[module] = _tensor(module, folder.weight(module), activation)
            schemes[module] = tensors[module].scheme
            ledger.quantized(module, tensors[module], None)
            done += 1
            progress(done, len(folder.modules), module)
        floats = {n: float_tensor(folder.floats, n, shapes[n]) for n in folder.floats.names() if _block(n) == block}
        for name, tensor in floats.items():
            ledger.kept(name, tensor)
        writer.add(tensors, floats)
    ledger.assign({m: Assignment(module=m, scheme=schemes.get(m), reason=IN_FLOAT) for m in linears})
    ledger.note(f"imported from {folder.method}: codes, scales and zero points are those of the folder")
    return ledger.report()


def _block(name: str) -> str:
    """ "model.layers.3" for what lies in that block, "" for what lies in none."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if number is None else ".".join(parts[: number + 1])


def _tensor(module: str, stored: StoredWeight, activation: str | None) -> QuantizedTensor:
    codes = torch.from_numpy(stored.codes)
    fp8 = stored.scheme.weight.format is FP8_E4M3
    return QuantizedTensor(
        codes=codes.view(torch.float8_e4m3fn) if fp8 else codes,
        scale=torch.from_numpy(stored.scale),
        zero_point=None if stored.zero_point is None else torch.from_numpy(stored.zero_point),
        input_scale=None if stored.input_scale is None else torch.tensor(stored.input_scale),
        scheme=_with_activation(module, stored.scheme, activation),
    )


def _with_activation(module: str, scheme: LayerScheme, activation: str | None) -> LayerScheme:
    if activation is None or scheme.input is not None:
        return scheme
    group = group_size_of(scheme.weight.granularity)
    if scheme.weight.format is FP8_E4M3 or (activation == "per_token_group" and group is None):
        why = f"has no INT8 activations {activation} beside these weights"
        raise UsageError(f"{module} ({scheme})", why, "leave --activation out, or use per_token")
    granularity = PerToken() if activation == "per_token" or group is None else PerTokenGroup(group)
    return replace(scheme, input=TensorScheme(format=INT8, granularity=granularity, dynamic=True))


def same_codes(folder: QuantizedFolder, checkpoint: QuantizedCheckpoint) -> str:
    """The first linear whose codes, zero points, scales or input scheme are not the same in both; "" where all are."""
    if set(folder.modules) != set(checkpoint.schemes):
        return min(set(folder.modules) ^ set(checkpoint.schemes))
    for module in folder.modules:
        there, here = _tensor(module, folder.weight(module), None), checkpoint.quantized(module)
        pairs = (
            (there.codes.view(torch.uint8), here.codes.view(torch.uint8)),
            (there.scale, here.scale),
            (there.zero_point, here.zero_point),
            (there.input_scale, here.input_scale),
        )
        if there.scheme.input != here.scheme.input or not all(_same(a, b) for a, b in pairs):
            return module
    return ""


def _same(there: Tensor | None, here: Tensor | None) -> bool:
    return there is here if there is None or here is None else torch.equal(there, here)
