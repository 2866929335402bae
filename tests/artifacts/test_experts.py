"""Networks filled by qtool compute what transformers' own compute; experts as modules are the packed ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from qtool.quantize.architectures.sites import SITES
from qtool.quantize.artifacts.experts import Experts
from qtool.quantize.artifacts.network import NetworkShell, load_network, run_block
from qtool.quantize.inputs import open_model

Make = Callable[..., Path]
MIXTURES = ("qwen3_moe", "mixtral", "gpt_oss")
ROUTER = {"qwen3_moe": "gate", "mixtral": "gate", "gpt_oss": "router"}
TOKENS = torch.randint(0, 256, (3, 29), generator=torch.Generator().manual_seed(4))


def stock(folder: Path) -> Any:
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return network.eval()


@pytest.mark.parametrize("family", SITES)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers(family: str, tied: bool, tiny_model: Make) -> None:
    window = {"mistral": {"sliding_window": 6}, "mixtral": {"sliding_window": 6}, "phi3": {"sliding_window": 6}}
    folder = tiny_model(family, tied=tied, **window.get(family, {}))
    with torch.no_grad():
        ours = load_network(open_model(str(folder)))(TOKENS).logits
        theirs = stock(folder)(TOKENS).logits
    assert theirs.std() > 0.05
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["mistral", "mixtral", "phi3", "gemma2", "gemma3_text", "gpt_oss"])
def test_a_window_shorter_than_the_text_matters(family: str, tiny_model: Make, tmp_path: Path) -> None:
    """Guards the test above: with the same weights and no window, the logits differ."""
    short = open_model(str(tiny_model(family, sliding_window=6)))
    wide = open_model(str(tiny_model(family, sliding_window=100)))
    with torch.no_grad():
        apart = load_network(short)(TOKENS).logits - load_network(wide)(TOKENS).logits
    assert apart[:, :6].abs().max() < 1e-5 < 1e-3 < apart[:, 8:].abs().max()


@pytest.mark.parametrize("family", SITES)
def test_block_by_block_is_the_whole_network(family: str, tiny_model: Make) -> None:
    folder = tiny_model(family)
    shell = NetworkShell(open_model(str(folder)))
    theirs = stock(folder)
    gave: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        gave.extend([*([] if gave else [args[0]]), output[0] if isinstance(output, tuple) else output])

    for module in theirs.get_submodule(shell.spine.blocks):
        module.register_forward_hook(note)
    with torch.no_grad():
        theirs(TOKENS)
        [(hidden, kwargs)] = shell.block_inputs([TOKENS])
        assert torch.equal(hidden, gave[0])
        for index in range(len(shell.blocks)):
            assert all(parameter.is_meta for parameter in shell.blocks[index].parameters())
            with shell.block(index) as block:
                hidden = run_block(block, hidden, kwargs[index])
            assert all(parameter.is_meta for parameter in shell.blocks[index].parameters())
            size = float(gave[index + 1].abs().max())
            torch.testing.assert_close(hidden, gave[index + 1], rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("family", MIXTURES)
def test_every_expert_reads_the_rows_that_the_router_chose(family: str, tiny_model: Make) -> None:
    folder = tiny_model(family)
    network = load_network(open_model(str(folder)))
    theirs = stock(folder)
    for index, layer in enumerate(network.model.layers):
        routed: dict[str, Any] = {}
        read: dict[int, Tensor] = {}
        experts = layer.mlp.experts
        assert isinstance(experts, Experts) and len(experts) == 4

        def note_router(_: nn.Module, args: tuple[Tensor, ...], output: Any, routed: dict[str, Any] = routed) -> None:
            routed["rows"] = args[0].reshape(-1, 64)
            routed["chosen"] = output[2]

        def note_input(expert: int, read: dict[int, Tensor] = read) -> Callable[..., None]:
            return lambda _, args: read.update({expert: args[0]})

        handles = [theirs.model.layers[index].mlp.get_submodule(ROUTER[family]).register_forward_hook(note_router)]
        handles += [expert.register_forward_pre_hook(note_input(number)) for number, expert in enumerate(experts)]
        with torch.no_grad():
            theirs(TOKENS)
            network(TOKENS)
        for handle in handles:
            handle.remove()
        assert routed["chosen"].shape == (TOKENS.numel(), 2)
        for expert in range(4):
            rows = torch.where((routed["chosen"] == expert).any(dim=1))[0]
            assert len(rows) == len(read.get(expert, ()))
            if len(rows):
                torch.testing.assert_close(read[expert], routed["rows"][rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", MIXTURES)
def test_one_expert_alone_is_transformers_expert(family: str, tiny_model: Make) -> None:
    """Every row sent to one expert with weight one, through both modules."""
    folder = tiny_model(family)
    ours = load_network(open_model(str(folder))).model.layers[1].mlp.experts
    theirs = stock(folder).model.layers[1].mlp.experts
    rows = torch.randn(11, 64, generator=torch.Generator().manual_seed(2)) * 5
    for expert in range(4):
        chosen = torch.full((11, 1), expert)
        with torch.no_grad():
            wanted = theirs(rows, chosen, torch.ones(11, 1))
            torch.testing.assert_close(ours(rows, chosen, torch.ones(11, 1)), wanted, rtol=1e-4, atol=1e-4)
            half = ours(rows, chosen.expand(11, 2), torch.tensor([[0.25, 0.5]]).expand(11, 2))
        torch.testing.assert_close(half, wanted * 0.75, rtol=1e-4, atol=1e-4)
