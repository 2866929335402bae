"""A shell reads the rows of the embedding that its text needs, and the head only while it is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.quantize.artifacts.network import NetworkShell, load_network
from qtool.quantize.inputs import open_model

Make = Callable[..., Path]
BATCHES = [torch.tensor([[7, 300, 7, 19], [0, 1, 2, 300]]), torch.tensor([[3, 255, 3]])]
FAMILIES = ("llama", "qwen3_moe", "gemma2", "gemma3_text", "phi3", "opt", "gpt_oss", "mamba", "mamba2")


class WithoutWholes:
    """A source that hands out no more than some rows of its ends."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def read(self, name: str) -> Any:
        assert not name.endswith(("embed_tokens.weight", "embeddings.weight", "lm_head.weight")), f"{name} whole"
        return self._source.read(name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_enters_the_blocks_is_what_the_network_hands_them(tiny_model: Make, family: str, tied: bool) -> None:
    source = open_model(str(tiny_model(family, tied=tied)))
    shell, network = NetworkShell(WithoutWholes(source)), load_network(source)
    first: Any = network.get_submodule(f"{shell.spine.blocks}.0")
    entered: list[torch.Tensor] = []
    first.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    for tokens, (hidden, kwargs) in zip(BATCHES, shell.block_inputs(BATCHES), strict=True):
        network(input_ids=tokens)
        assert torch.equal(hidden, entered.pop())
        assert len(kwargs) == len(shell.blocks)
    assert network.get_input_embeddings().weight.device.type == "cpu"
    assert shell.network.get_input_embeddings().weight.is_meta
    assert shell.network.get_output_embeddings().weight.is_meta


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_there_while_it_is_used(tiny_model: Make, tied: bool) -> None:
    source = open_model(str(tiny_model(tied=tied)))
    shell, network = NetworkShell(source), load_network(source)
    for _ in range(2):
        with shell.head() as head:
            assert torch.equal(head.get_parameter("weight"), network.get_output_embeddings().weight)
        assert shell.network.get_output_embeddings().weight.is_meta
    shell.fill_head()
    assert torch.equal(shell.network.get_output_embeddings().weight, network.get_output_embeddings().weight)
    assert shell.network.get_input_embeddings().weight.is_meta


def test_another_embedding_may_stand_in(tiny_model: Make) -> None:
    asked: list[list[int]] = []

    def embedded(numbers: torch.Tensor) -> torch.Tensor:
        asked.append(numbers.tolist())
        return numbers[:, None].float().expand(-1, 64)

    found = NetworkShell(open_model(str(tiny_model())), embedded=embedded).block_inputs(BATCHES)
    assert asked == [[0, 1, 2, 3, 7, 19, 255, 300]]
    assert [hidden[..., 0].tolist() for hidden, _ in found] == [batch.tolist() for batch in BATCHES]
