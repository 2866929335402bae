"""What is computed again of a Mamba mixer, against what transformers computes and keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qtool.quantize.artifacts.network import load_network
from qtool.quantize.inputs import open_model
from qtool.quantize.measure.state_space import STATE_EVERY, mixer_values, state_positions

Make = Callable[..., Path]
FAMILIES = {
    "mamba": [{}, {"use_conv_bias": False}, {"state_size": 5, "conv_kernel": 3}],
    "mamba2": [{}, {"n_groups": 4}, {"n_groups": 1, "chunk_size": 7}, {"time_step_limit": [0.01, 0.4]}],
}
CASES = [(family, config) for family, configs in FAMILIES.items() for config in configs]
TOKENS = torch.randint(0, 256, (2, STATE_EVERY * 2 + 5), generator=torch.Generator().manual_seed(1))


def run(folder: Path, tokens: Tensor) -> tuple[Any, list[Tensor], Any]:
    """The network, what each block's input projection gave, and the cache after the last token."""
    network = load_network(open_model(str(folder)))
    projected: list[Tensor] = []

    def note(_module: nn.Module, _args: Any, output: Tensor) -> None:
        projected.append(output)

    handles = [layer.mixer.in_proj.register_forward_hook(note) for layer in network.backbone.layers]
    with torch.no_grad():
        cache = network(tokens, use_cache=True).cache_params
    for handle in handles:
        handle.remove()
    return network, projected, cache


def close(ours: Tensor, theirs: Tensor) -> None:
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize(("family", "config"), CASES)
def test_the_last_state_is_the_one_in_the_models_cache(family: str, config: dict[str, Any], tiny_model: Make) -> None:
    network, projected, cache = run(tiny_model(family, **config), TOKENS)
    for index, layer in enumerate(network.backbone.layers):
        with torch.no_grad():
            ours = mixer_values(layer.mixer, projected[index], "state")
        assert ours.shape[:2] == (2, 3)
        close(ours[:, -1], cache.get_recurrent_state(index).flatten(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_states_in_the_middle_are_those_of_a_shorter_text(family: str, tiny_model: Make) -> None:
    folder = tiny_model(family)
    network, projected, _ = run(folder, TOKENS)
    mixer = network.backbone.layers[0].mixer
    with torch.no_grad():
        states = mixer_values(mixer, projected[0], "state")
    for shown, position in enumerate(state_positions(TOKENS.shape[1])):
        _, _, cache = run(folder, TOKENS[:, : position + 1])
        close(states[:, shown], cache.get_recurrent_state(0).flatten(1))


def test_mambas_x_b_and_c_are_what_its_selection_reads_and_gives(tiny_model: Make) -> None:
    network = load_network(open_model(str(tiny_model("mamba"))))
    mixer = network.backbone.layers[1].mixer
    seen: dict[str, Tensor] = {}
    mixer.in_proj.register_forward_hook(lambda _m, _a, out: seen.update(projected=out))
    mixer.x_proj.register_forward_hook(lambda _m, args, out: seen.update(x=args[0], selected=out))
    with torch.no_grad():
        network(TOKENS)
        values = {tap: mixer_values(mixer, seen["projected"], tap) for tap in "xBC"}
    close(values["x"], seen["x"])
    close(values["B"], seen["selected"][..., -16:-8])
    close(values["C"], seen["selected"][..., -8:])


def test_mamba2s_x_b_and_c_are_what_its_scan_reads(tiny_model: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mamba2 import modeling_mamba2

    names = [name for name in vars(modeling_mamba2) if "scan" in name and callable(getattr(modeling_mamba2, name))]
    assert names, "transformers has no scan to look at"
    network = load_network(open_model(str(tiny_model("mamba2"))))
    mixer = network.backbone.layers[0].mixer
    seen: dict[str, Any] = {}
    mixer.in_proj.register_forward_hook(lambda _m, _a, out: seen.update(projected=out))
    for name in names:
        real = getattr(modeling_mamba2, name)

        def scan(*args: Any, real: Any = real, **kwargs: Any) -> Any:
            seen.setdefault("scan", args)
            return real(*args, **kwargs)

        monkeypatch.setattr(modeling_mamba2, name, scan)
        if name in vars(mixer):
            monkeypatch.setattr(mixer, name, scan)
    with torch.no_grad():
        network(TOKENS)
        values = {tap: mixer_values(mixer, seen["projected"], tap) for tap in "xBC"}
    tensors = [each for each in seen["scan"] if isinstance(each, Tensor)]
    x, _, _, b, c = tensors[:5]
    for tap, theirs in zip("xBC", (x, b, c), strict=True):
        close(values[tap], theirs.reshape(values[tap].shape))


@pytest.mark.parametrize(
    ("length", "positions"), [(1, [0]), (31, [30]), (32, [31]), (33, [31, 32]), (70, [31, 63, 69]), (96, [31, 63, 95])]
)
def test_the_positions_of_states(length: int, positions: list[int]) -> None:
    assert state_positions(length) == positions
