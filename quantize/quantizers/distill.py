"""Distillation: all scales and 16-bit products of a quantized model at once, against the float model's predictions.

What quantizers minimise is a linear's or a block's own error. Here the loss is what counts, the KL divergence of the
quantized model's next-token distribution from the float model's, and everything that is not a code moves: scales and
side products (EfficientQAT, 2407.11062, trains the scales end to end in a second phase, on the text's own tokens as
labels; its target here is the float model, which the text must not teach anything). The model runs as it will run;
input quantizers and the cache's codes count as the identity in the backward pass.

One sequence in eight is held back, from the quantizers too. After every epoch the model is compared there with the
best so far (see `HeldOutScores.against`); when the start stays the best, nothing is changed. (On text that GPTQ was
fitted to, the start looks better than it is: measured on SmolLM2-135M-Instruct, W4A8 with QUAD 16, KL 0.034 there and
0.048 on other text.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, nll_loss
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.distillation import Distillation
from qtool.quantize.artifacts.network import FINAL_NORM, NetworkShell
from qtool.quantize.artifacts.quantized_linear import QuantizedLinear
from qtool.quantize.artifacts.quantized_tensor import QuantizedTensor
from qtool.quantize.artifacts.weights import WeightSource
from qtool.quantize.measure.hidden_states import HiddenStates
from qtool.quantize.quantizers.block_refinement import straight_through
from qtool.quantize.quantizers.held_out import HeldOutScores
from qtool.quantize.quantizers.report import Distilled
from qtool.quantize.quantizers.trained_scales import TrainedScales

Progress = Callable[[int, int, str], None]
Tokens = npt.NDArray[np.int64]
HELD_BACK = 8  # one sequence in so many
BETAS = (0.9, 0.95)
PRODUCT_SHARE = 1 / 3  # of the scales' rate, in shares of a product's mean size; at 1 it learns the text by heart


class FloatPredictions:
    """A float model's log-probabilities of a text, from its last hidden states, which stay in memory.

    Args:
        source: the float model; one block is in memory at a time.
        tokens: int64 [B, T].
    """

    def __init__(self, source: WeightSource, tokens: Tokens) -> None:
        shell = NetworkShell(source)
        with torch.no_grad():
            states = HiddenStates(shell, [torch.from_numpy(row[None]) for row in tokens])
            for index in range(len(shell.blocks)):
                with shell.block(index) as block:
                    for batch in states.batches():
                        states.hidden[batch] = states.run(block)
            norm = shell.network.get_submodule(FINAL_NORM)
            self._hidden: list[Tensor] = [norm(hidden) for hidden in states.hidden]
        shell.fill_head()
        self._network: Any = shell.network
        setattr(self._network, self._network.base_model_prefix, _Given(self))
        self.number = 0

    def of(self, number: int) -> Tensor:
        """Of one sequence, [1, T, V]."""
        self.number = number
        with torch.no_grad():
            logits: Tensor = self._network(input_ids=None, use_cache=False).logits
            predictions: Tensor = log_softmax(logits, dim=-1)
        return predictions

    @property
    def hidden(self) -> Tensor:
        """The last hidden states [1, T, d] of the sequence in hand."""
        return self._hidden[self.number]


class _Given(nn.Module):
    """Stands in for a network's blocks: what comes out of them is known."""

    def __init__(self, predictions: FloatPredictions) -> None:
        super().__init__()
        self.__dict__["_predictions"] = predictions  # which holds the network that holds this

    def forward(self, **kwargs: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self.__dict__["_predictions"].hidden)


def hold_back(tokens: Tokens) -> tuple[Tokens, Tokens]:
    """Calibration tokens [B, T] in what everything is fitted to, and what distillation is judged on.

    Raises:
        UsageError: with fewer than two sequences.
    """
    if len(tokens) < 2:
        raise UsageError("distill", "needs two calibration sequences or more", "give more text or --sequences")
    held = slice(None, None, HELD_BACK)
    return np.delete(tokens, held, axis=0), tokens[held]


def distill(
    network: PreTrainedModel,
    tensors: Mapping[str, QuantizedTensor],
    source: WeightSource,
    fitted: Tokens,
    judged: Tokens,
    options: Distillation,
    *,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, QuantizedTensor], Distilled]:
    """Train a quantized model's scales and 16-bit products. The whole model is in memory, in float32.

    Args:
        network: the quantized model, with a QuantizedLinear for each of the tensors; it is left at the best iterate.
        tensors: what those were made of, by module.
        source: the float model that was quantized.
        fitted, judged: from `hold_back`.
        options: how long and how fast. The rate falls linearly to 0.
        seed: of the order of sequences.
        progress: (steps done, steps, text).

    Returns:
        What changed by module (nothing, when nothing helped), and the losses.

    Raises:
        UsageError: for a model with nothing to train.
        InputRefused: when the loss is not finite.
    """
    tokens = np.concatenate([fitted, judged])
    held = range(len(fitted), len(tokens))
    target = FloatPredictions(source, tokens)
    network.requires_grad_(False)
    linears = {name: TrainedScales(_linear(network, name), tensor) for name, tensor in tensors.items()}
    optimizer = torch.optim.Adam(_groups(linears, options.rate), betas=BETAS)
    rates = [group["lr"] for group in optimizer.param_groups]
    steps_per_epoch = -(-len(fitted) // options.batch)
    steps = options.epochs * steps_per_epoch
    generator = np.random.default_rng(seed)
    results: dict[str, QuantizedTensor] = {}
    with straight_through(network):
        start = best = _judge(network, target, tokens, held)
        epoch_of_best = 0
        for step in range(steps):
            if step % steps_per_epoch == 0:
                order = generator.permutation(len(fitted)).tolist()
            place = step % steps_per_epoch * options.batch
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / steps)
            _step(network, target, tokens, order[place : place + options.batch], optimizer)
            for linear in linears.values():
                linear.write()
            if (step + 1) % steps_per_epoch == 0:
                found = _judge(network, target, tokens, held)
                if found.against(best).better:
                    best, epoch_of_best = found, (step + 1) // steps_per_epoch
                    results = {name: linear.result() for name, linear in linears.items()}
            progress(step + 1, steps, f"distill: KL {start.mean_kl:.4f}, now {best.mean_kl:.4f}")
    for name, linear in linears.items():
        linear.close(results.get(name, tensors[name]))
    return results, Distilled(
        kl_before=start.mean_kl,
        kl_after=best.mean_kl,
        loss_before=start.mean_loss,
        loss_after=best.mean_loss,
        epoch=epoch_of_best,
    )


def _linear(network: PreTrainedModel, name: str) -> QuantizedLinear:
    linear = network.get_submodule(name)
    assert isinstance(linear, QuantizedLinear)
    return linear


def _groups(linears: Mapping[str, TrainedScales], rate: float) -> list[dict[str, Any]]:
    """Adam's parameters with their rates, which are shares of their values."""
    shifts = [linear.shifts for linear in linears.values() if linear.shifts is not None]
    products = [product for linear in linears.values() for product in linear.products]
    sized = [(product, float(product.detach().square().mean().sqrt())) for product in products]
    groups = [{"params": shifts, "lr": rate}] if shifts else []
    groups += [{"params": [product], "lr": rate * PRODUCT_SHARE * size} for product, size in sized if size > 0]
    if not groups:
        raise UsageError("distill", "finds nothing to train: no plain scales, no 16-bit products", "leave it out")
    return groups


def _step(
    network: PreTrainedModel, target: FloatPredictions, tokens: Tokens, batch: list[int], optimizer: torch.optim.Adam
) -> None:
    optimizer.zero_grad()
    with torch.enable_grad(), _fast_products():
        for number in batch:
            (_score(network, target, tokens, number)[0] / len(batch)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _judge(
    network: PreTrainedModel, target: FloatPredictions, tokens: Tokens, numbers: Sequence[int]
) -> HeldOutScores:
    with torch.no_grad():
        scores = [_score(network, target, tokens, number) for number in numbers]
    kl, losses = zip(*[(float(kl), float(loss)) for kl, loss in scores], strict=True)
    if not math.isfinite(sum(kl)):
        raise InputRefused("the quantized model's output", "is not finite on this text", "use a smaller distill rate")
    return HeldOutScores(kl_nats=kl, losses=losses)


def _score(network: Any, target: FloatPredictions, tokens: Tokens, number: int) -> tuple[Tensor, Tensor]:
    """The mean KL divergence and the mean cross entropy of one sequence's tokens."""
    ids = torch.from_numpy(tokens[number : number + 1])
    found = log_softmax(network(input_ids=ids, use_cache=False).logits, dim=-1)[0]
    kl = kl_div(found, target.of(number)[0], log_target=True, reduction="batchmean")
    return kl, nll_loss(found[:-1], ids[0, 1:])


@contextmanager
def _fast_products() -> Iterator[None]:
    """Products of matrices in the processor's 16-bit units where it has them: steps need no more."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
