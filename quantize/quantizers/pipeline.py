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
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from qtool.errors import UsageError
from qtool.quantize.artifacts.cache_scheme import CacheScheme
from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter
from qtool.quantize.artifacts.network import HEAD, NetworkShell, parent_of
from qtool.quantize.artifacts.quantized_cache import quantize_cache
from qtool.quantize.artifacts.rule import Assignment
from qtool.quantize.artifacts.shared_inputs import SharedInputs
from qtool.quantize.artifacts.statistics import Statistics
from qtool.quantize.artifacts.tensor_file import row_pieces
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.quantizers.calibration import Calibration, Inputs
from qtool.quantize.quantizers.data_needs import DataNeeds, block_prefix
from qtool.quantize.quantizers.head_rows import CodesInFile, dequantized_rows, divisible, quantize_in_rows
from qtool.quantize.quantizers.hessian import Hessian
from qtool.quantize.quantizers.input_range import with_input_scales
from qtool.quantize.quantizers.layers import QuantizedLayer, quantize_linears, static_input_scales
from qtool.quantize.quantizers.refined_layers import Refinable, refine_layers
from qtool.quantize.quantizers.report import Ledger, QuantizationReport
from qtool.quantize.quantizers.run_journal import RunJournal
from qtool.quantize.quantizers.shards import Shards
from qtool.quantize.quantizers.token_weights import TokenWeights

Progress = Callable[[int, int, str], None]

TIED_HEAD_QUANTIZER = "rtn"
HEAD_PIECE_ELEMENTS = 2**22  # of a large head
HEAD_PIECES_PER_FACTOR = 4  # every call of GPTQ factors the Hessian anew


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
    journal: RunJournal | None = None,
    kv: CacheScheme | None = None,
    token_weights: TokenWeights | None = None,
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
        journal: keeps every finished shard, which the writer then has to write into its folder; a run that finds some
            continues behind them. None when nothing is to be kept.
        kv: what the key-value cache will store, so that whatever reads attention is calibrated on it; None: floats.
        token_weights: of the calibration tokens in second moments; None: all the same.

    Raises:
        UsageError: missing tokens or statistics.
        InputRefused: an activation or Hessian that is not finite, naming the layer.
    """
    if tokens is None and any(a.needs_calibration for a in assignments.values()):
        raise UsageError("gptq", "needs calibration tokens", "give a text, or use quantizer: rtn")
    input_scales = static_input_scales(assignments, statistics)
    lacking = [name for name, a in assignments.items() if a.static_input and name not in input_scales]
    if tokens is None and lacking:
        what = f"{lacking[0]}: per_tensor activations"
        raise UsageError(what, "need measured ranges", "give a text, or run qtool measure and pass --statistics")
    weights = token_weights or TokenWeights({})
    run = _Run(source, assignments, groups, input_scales, writer, progress, seed, journal, kv, weights)
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
        journal: RunJournal | None,
        kv: CacheScheme | None,
        token_weights: TokenWeights,
    ) -> None:
        self._source = source
        self._assignments = dict(assignments)
        self._groups = groups
        self._input_scales = input_scales
        self._progress = progress
        self._seed = seed
        self._journal = journal
        self._kv = kv
        self._token_weights = token_weights
        self._blocks = int(source.config["num_hidden_layers"])
        self._ledger = Ledger(assignments)
        self._shards = Shards(source, writer, self._ledger, journal)
        self._done = 0
        head = self._assignments[HEAD]
        if self._shards.tied and (head.needs_calibration or head.transform is not None):
            # An embedding is looked up: no transform stands in front of it.
            self._assignments[HEAD] = replace(head, quantizer=TIED_HEAD_QUANTIZER, transform=None)
            how = f"with {TIED_HEAD_QUANTIZER}" + ("" if head.transform is None else ", its inputs as they are")
            self._ledger.note(f"{HEAD} is also the embedding, so it was quantized {how}")
        elif head.quantizer == "autoround" and head.scheme is not None:
            self._assignments[HEAD] = replace(head, quantizer=head.options.start)
            self._ledger.note(f"{HEAD} is in no block, so it was quantized with {head.options.start}")
        if kv is not None:
            kv.check_model(source.config)
            self._ledger.note(kv.describe(source.config))
        self._needs = DataNeeds(self._assignments, self._input_scales, self._blocks)

    def run(self, tokens: npt.NDArray[np.int64] | None) -> QuantizationReport:
        """A tied head, all blocks, an untied head, and what is left; what the journal has is not done again."""
        finished = self._shards.restore()
        self._done = min(finished, self._blocks) * sum(len(group) for group in self._groups)
        if finished > self._blocks:
            return self._ledger.report()
        head = self._quantize([HEAD], None) if self._shards.tied else {}
        calibrated, head_wants_data = self._needs.calibrated_blocks, self._needs.inputs(HEAD)
        calibration = None
        if finished < calibrated or head_wants_data:
            assert tokens is not None
            calibration = self._calibration(head, tokens)
        for index in range(finished, self._blocks):
            advance = False
            if calibration is not None and index < calibrated:
                advance = index + 1 < calibrated or head_wants_data
                done = self._calibrated_block(index, calibration, advance=advance)
            else:
                done = self._plain_block(index)
            hidden = calibration.hidden if calibration is not None and advance else ()
            self._shards.write(block_prefix(index), done, hidden)
        if not self._shards.tied:
            hessian = None
            if calibration is not None and self._assignments[HEAD].needs_calibration:
                hessian = Hessian(HEAD)
                calibration.final_norms(hessian.add)
            head = self._quantize([HEAD], hessian, None if calibration is None else calibration.final_norms)
        if calibration is not None:
            head = with_input_scales(head, calibration.final_norms)
        self._shards.write("", head)
        if any(isinstance(layer.tensor, CodesInFile) for layer in head.values()):
            self._shards.head_codes.unlink()
        return self._ledger.report()

    def _calibration(self, head: Mapping[str, QuantizedLayer], tokens: npt.NDArray[np.int64]) -> Calibration:
        calibration = Calibration(self._shell(head), tokens)
        if self._journal and (hidden := self._journal.hidden()):
            calibration.hidden = hidden
        return calibration

    def _shell(self, head: Mapping[str, QuantizedLayer]) -> NetworkShell:
        """The network with the embedding that will run, which is the quantized head where they are tied."""
        embedded = None
        if self._shards.tied and head:
            embedded = partial(dequantized_rows, head[HEAD].tensor)
        shell = NetworkShell(self._source, embedded=embedded)
        if self._kv is not None:
            quantize_cache(shell.network, self._kv)
        return shell

    def _plain_block(self, index: int) -> dict[str, QuantizedLayer]:
        done: dict[str, QuantizedLayer] = {}
        for group in self._groups:
            done |= self._quantize([block_prefix(index) + path for path in group], None)
        return done

    def _calibrated_block(self, index: int, calibration: Calibration, *, advance: bool) -> dict[str, QuantizedLayer]:
        prefix = block_prefix(index)
        left = [path for group in self._groups for path in group]
        done: dict[str, QuantizedLayer] = {}
        refined = [prefix + path for path in left if self._needs.refined(prefix + path)]
        linears: dict[str, Refinable] = {}
        with calibration.shell.block(index) as block:
            examples = calibration.examples(block, self._needs.examples(refined)) if refined else []
            for group in self._groups:
                modules = [prefix + path for path in group]
                inputs = partial(calibration.inputs_of, block, group[0])
                hessian = None
                if self._needs.moments(modules):
                    hessian = Hessian(modules[0], self._token_weights.of(modules[0]))
                    inputs(hessian.add)
                weights = {prefix + path: block.get_parameter(f"{path}.weight").data for path in group}
                last_use = not any(module in refined for module in modules)
                layers = with_input_scales(
                    self._quantize(modules, hessian, inputs, weights, last_use=last_use), inputs
                )
                _install(block, prefix, layers)
                done |= layers
                for module in [module for module in modules if module in refined]:
                    assert hessian is not None
                    linears[module] = Refinable(
                        layer=layers[module],
                        weight=weights[module],
                        hessian=hessian.matrix(),
                        options=self._assignments[module].options,
                    )
                left = left[len(group) :]
                for child in sorted({path.partition(".")[0] for path in group}):
                    if not any(path.partition(".")[0] == child for path in left):
                        calibration.replay(block, child)
            if refined:
                calibration.end_replays(block)
                done |= refine_layers(block, prefix, linears, examples, seed=self._seed + index)
            if advance:
                calibration.advance(block, prefix.rstrip("."))
        return done

    def _quantize(
        self,
        modules: Sequence[str],
        hessian: Hessian | None,
        inputs: Inputs | None = None,
        weights: Mapping[str, Tensor] | None = None,
        *,
        last_use: bool = False,
    ) -> dict[str, QuantizedLayer]:
        """Quantize the linears that read one input, reading their weights from the source where they are not given."""
        assignments = [self._assignments[module] for module in modules]
        matrix = None if hessian is None else hessian.matrix()

        def quantize(given: Mapping[str, Tensor]) -> dict[str, QuantizedLayer]:
            return quantize_linears(
                assignments, given, matrix, self._input_scales, self._seed, inputs, last_use=last_use
            )

        piece = HEAD_PIECE_ELEMENTS * (1 if hessian is None else HEAD_PIECES_PER_FACTOR)
        pieces = list(row_pieces(self._shards.shape(modules[0]), piece=piece))
        if list(modules) == [HEAD] and len(pieces) > 1 and divisible(assignments[0]):
            codes = self._shards.head_codes
            layers = {HEAD: quantize_in_rows(pieces, self._read_head, lambda w: quantize({HEAD: w})[HEAD], codes)}
        else:
            names = [] if weights else [a.module for a in assignments if a.scheme is not None]
            read = {name: torch.from_numpy(self._source.read(self._shards.weight(name))) for name in names}
            layers = quantize(weights or read)
        self._done += len(modules)
        self._progress(self._done, len(self._assignments), modules[-1])
        return layers

    def _read_head(self, rows: slice) -> Tensor:
        return torch.from_numpy(self._source.read_rows(self._shards.weight(HEAD), rows.start, rows.stop))


def _install(block: nn.Module, prefix: str, layers: Mapping[str, QuantizedLayer]) -> None:
    """Put quantized linears in the place of float ones that read one input."""
    shared = SharedInputs()
    for module, layer in layers.items():
        parent, leaf = parent_of(block, module.removeprefix(prefix))
        setattr(parent, leaf, shared.linear(layer.tensor, getattr(parent, leaf).bias))
