"""A plain second opinion on the maxima: thirty lines over transformers alone, on a real model where one is given.

QTOOL_MODEL names the model (a folder or a .gguf file); without it a tiny one is used.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from qtool.quantize.artifacts.network import load_network
from qtool.quantize.inputs import builtin_text, open_model, tokenize
from qtool.quantize.measure import Text, measure


def test_maxima_agree_exactly(tiny_model: Callable[..., Path]) -> None:
    source = open_model(os.environ.get("QTOOL_MODEL") or str(tiny_model("llama")))
    length = 128
    vocabulary = source.config["vocab_size"]
    ids = tokenize(
        source.tokenizer_files, builtin_text("calibration"), sequences=4, length=length, vocab_size=vocabulary
    ).ids
    text = Text(ids=ids, domains=("text",), domain_of=np.zeros(4, dtype=np.int64), sha256="0" * 64)
    statistics = measure(source, text, progress=lambda *_: None).statistics

    # From here on nothing of the measurement is used: the whole network, one hook a module, plain max.
    network = load_network(source)
    largest: dict[str, tuple[float, int, int, int]] = {}

    def keep(name: str, values: torch.Tensor) -> None:
        flat = values.reshape(len(ids), length, -1)
        place = int(flat.abs().argmax())
        sequence, rest = divmod(place, length * flat.shape[2])
        largest[name] = (float(flat.abs().max()), sequence, *divmod(rest, flat.shape[2]))

    for name, module in network.named_modules():
        if name:
            module.register_forward_hook(
                lambda _, args, out, name=name: (
                    keep(f"{name}.output", out[0] if isinstance(out, tuple) else out)
                    if isinstance(out, torch.Tensor) or (isinstance(out, tuple) and isinstance(out[0], torch.Tensor))
                    else None
                )
            )
            module.register_forward_pre_hook(
                lambda _, args, name=name: keep(f"{name}.input", args[0])
                if args and isinstance(args[0], torch.Tensor) and args[0].dim() == 3
                else None
            )
    with torch.no_grad():
        network(torch.from_numpy(ids))
    compared = 0
    for site, seen in statistics.sites.items():
        if site in largest:
            value, sequence, position, channel = largest[site]
            assert seen.amax == value, site
            assert list(seen.top_places[0][[0, 1, 3]]) == [sequence, position, channel], site
            compared += 1
    assert compared >= 12 * len(statistics.total.sinks)
