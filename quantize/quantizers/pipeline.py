"""A model to a quantized checkpoint, one decoder block at a time.

Within a block the groups of linears are done in the order in which data flows through them, and each finished
group computes its scheme's own arithmetic from then on, so that everything behind it is calibrated on what will
really run. When no rule needs data, no forward pass is run at all.

A tied head is also the embedding. It is done first, and always rounded to nearest, so that every block is calibrated
on the embedding that will run. Measured on SmolLM2-135M-Instruct (float blocks, 4-bit head and embedding in groups of
64, WikiText-2 perplexity, float 19.50): rounded to nearest 21.37, GPTQ on the final norm's outputs 21.75 at damping
0.01 and 21.09 at 0.1. The second would need a float pass over the whole model first, and moves less than one text
differs from another. Nearly all of the loss is the head's: the embedding alone gives 19.62.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qtool.errors import UsageError
from qtool.quantize.artifacts.checkpoint import CheckpointWriter, float_tensor
from qtool.quantize.artifacts.network import EMBEDDING, HEAD, NetworkShell, parent_of
from qtool.quantize.artifacts.quantized_linear import InputQuantizer, InputTransform, QuantizedLinear, input_quantizer
from qtool.quantize.artifacts.rule import Assignment
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.quantizers.calibration import Calibration
from qtool.quantize.quantizers.hessian import Hessian
from qtool.quantize.quantizers.layers import QuantizedLayer, quantize_linears, static_input_scales
from qtool.quantize.quantizers.report import Ledger, QuantizationReport

Progress = Callable[[int, int, str], None]

BLOCKS = "model.layers."
TIED_HEAD_QUANTIZER = "rtn"


def quantize_model(
    source: WeightSource,
    *,
    assignments: Mapping[str, Assignment],
    groups: Sequence[Sequence[str]],
    tokens: npt.NDArray[np.int64] | None,
    statistics: Statistics | None,
    writer: CheckpointWriter,
    progress: Progress,
    seed: int = 0,
) -> QuantizationReport:
    """Quantize a model.

    Args:
        source: the float model.
        assignments: what each linear gets, in forward order; `Recipe.assign` makes it.
        groups: per block, the linears in the order of data flow, those that read one input together.
        tokens: calibration tokens int64 [B, T]; None when no quantizer in use needs data.
        statistics: where the ranges of static activations come from; None when there are none.
        writer: takes one shard per block and one for the rest.
        progress: called with (linears done, linears, name of the last).
        seed: of random rotations.

    Raises:
        UsageError: missing tokens or statistics.
        InputRefused: an activation or Hessian that is not finite, naming the layer.
    """
    if tokens is None and any(a.needs_calibration for a in assignments.values()):
        raise UsageError("gptq", "needs calibration tokens", "give a text, or use quantizer: rtn")
    run = _Run(source, assignments, groups, static_input_scales(assignments, statistics), writer, progress, seed)
    with torch.no_grad():
        return run.run(tokens)


class _Run:
    """What the steps of one `quantize_model` share."""

    def __init__(
        self,
        source: WeightSource,
        assignments: Mapping[str, Assignment],
        groups: Sequence[Sequence[str]],
        input_scales: Mapping[str, Tensor],
        writer: CheckpointWriter,
        progress: Progress,
        seed: int,
    ) -> None:
        self._source = source
        self._assignments = dict(assignments)
        self._groups = groups
        self._input_scales = input_scales
        self._writer = writer
        self._progress = progress
        self._seed = seed
        self._tied = bool(source.config.get("tie_word_embeddings", False))
        self._blocks = int(source.config["num_hidden_layers"])
        self._ledger = Ledger(assignments)
        self._done = 0
        head = self._assignments[HEAD]
        if self._tied and head.needs_calibration:
            self._assignments[HEAD] = replace(head, quantizer=TIED_HEAD_QUANTIZER)
            self._ledger.note(f"{HEAD} is also the embedding, so it was quantized with {TIED_HEAD_QUANTIZER}")

    def run(self, tokens: npt.NDArray[np.int64] | None) -> QuantizationReport:
        """A tied head, all blocks, an untied head, and what is left."""
        head = self._quantize([HEAD], None) if self._tied else {}
        calibrated = self._calibrated_blocks()
        calibration = None
        if calibrated:
            assert tokens is not None
            calibration = Calibration(self._shell(head), tokens)
        for index in range(self._blocks):
            if calibration is not None and index < calibrated:
                advance = index + 1 < calibrated or self._head_wants_data
                done = self._calibrated_block(index, calibration, advance=advance)
            else:
                done = self._plain_block(index)
            self._write(_prefix(index), done)
        if not self._tied:
            hessian = None
            if calibration is not None and self._head_wants_data:
                hessian = Hessian(HEAD)
                calibration.final_norms(hessian.add)
            head = self._quantize([HEAD], hessian)
        self._write("", head)
        return self._ledger.report()

    @property
    def _head_wants_data(self) -> bool:
        return self._assignments[HEAD].needs_calibration

    def _calibrated_blocks(self) -> int:
        """How many blocks, from the first on, the calibration text has to run through."""
        if self._head_wants_data:
            return self._blocks
        needing = [
            index
            for index in range(self._blocks)
            if any(a.needs_calibration for name, a in self._assignments.items() if name.startswith(_prefix(index)))
        ]
        return needing[-1] + 1 if needing else 0

    def _shell(self, head: Mapping[str, QuantizedLayer]) -> NetworkShell:
        shell = NetworkShell(self._source)
        for layer in head.values():
            embedding = shell.network.get_submodule(EMBEDDING)
            embedding.weight = nn.Parameter(layer.tensor.dequantize(), requires_grad=False)
        return shell

    def _plain_block(self, index: int) -> dict[str, QuantizedLayer]:
        done: dict[str, QuantizedLayer] = {}
        for group in self._groups:
            done |= self._quantize([_prefix(index) + path for path in group], None)
        return done

    def _calibrated_block(self, index: int, calibration: Calibration, *, advance: bool) -> dict[str, QuantizedLayer]:
        prefix = _prefix(index)
        left = [path for group in self._groups for path in group]
        done: dict[str, QuantizedLayer] = {}
        with calibration.shell.block(index) as block:
            for group in self._groups:
                modules = [prefix + path for path in group]
                hessian = None
                if any(self._assignments[module].needs_calibration for module in modules):
                    hessian = Hessian(modules[0])
                    calibration.inputs_of(block, group[0], hessian.add)
                layers = self._quantize(modules, hessian)
                _install(block, prefix, layers)
                done |= layers
                left = left[len(group) :]
                for child in sorted({path.partition(".")[0] for path in group}):
                    if not any(path.partition(".")[0] == child for path in left):
                        calibration.replay(block, child)
            if advance:
                calibration.advance(block, prefix.rstrip("."))
        return done

    def _quantize(self, modules: Sequence[str], hessian: Hessian | None) -> dict[str, QuantizedLayer]:
        """Quantize the linears that read one input, reading their weights from the source."""
        assignments = [self._assignments[module] for module in modules]
        weights = {a.module: self._weight(a.module) for a in assignments if a.scheme is not None}
        matrix = None if hessian is None else hessian.matrix()
        layers = quantize_linears(assignments, weights, matrix, self._input_scales, self._seed)
        self._done += len(modules)
        self._progress(self._done, len(self._assignments), modules[-1])
        return layers

    def _weight(self, module: str) -> Tensor:
        tied_head = module == HEAD and self._tied
        return torch.from_numpy(self._source.read(f"{EMBEDDING if tied_head else module}.weight"))

    def _write(self, prefix: str, layers: Mapping[str, QuantizedLayer]) -> None:
        """One shard: the quantized linears, and the tensors under `prefix` ("": outside all blocks) left in float."""
        replaced = {f"{EMBEDDING if m == HEAD and self._tied else m}.weight" for m in layers}
        names = [n for n in self._source.names() if n not in replaced and n.startswith(prefix)]
        if not prefix:
            names = [n for n in names if not n.startswith(BLOCKS)]
        floats = {name: float_tensor(self._source, name) for name in names}
        self._writer.add({module: layer.tensor for module, layer in layers.items()}, floats)
        for module, layer in layers.items():
            self._ledger.quantized(module, layer.tensor, layer.record)
        for name, tensor in floats.items():
            self._ledger.kept(name, tensor)


def _prefix(index: int) -> str:
    return f"{BLOCKS}{index}."


def _install(block: nn.Module, prefix: str, layers: Mapping[str, QuantizedLayer]) -> None:
    """Put quantized linears in the place of float ones; those with the same input arithmetic share its result."""
    quantizers: dict[object, InputQuantizer] = {}
    transforms: dict[str, InputTransform] = {}
    for module, layer in layers.items():
        tensor = layer.tensor
        quantize = quantizers.setdefault((tensor.site, tensor.scheme.input), input_quantizer(tensor))
        transform = None
        if tensor.transform is not None:
            transform = transforms.setdefault(tensor.site, InputTransform(tensor.transform.input))
        parent, leaf = parent_of(block, module.removeprefix(prefix))
        setattr(parent, leaf, QuantizedLinear(tensor, getattr(parent, leaf).bias, quantize, transform))
