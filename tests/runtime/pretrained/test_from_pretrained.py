"""`from_pretrained` on a checkpoint folder: the native runtime's logits, transformers' generation, clear refusals."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from qtool import transformers_hook  # with it, qtool registers its quantizer
from qtool.cli.main import main
from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
from qtool.runtime.generate import generate
from qtool.runtime.native import NativeSession
from qtool.runtime.pretrained import sequences

LENGTHS = [20, 7, 13]
PAD = 256
CHECKPOINTS = {
    "w4a8 kv int8": ("--scheme", "W4A8", "--activation", "per_token", "--kv", "int8"),
    "w4a8 quad": ("--scheme", "W4A8", "--activation", "per_token", "--transform", "quad", "--rank", "8"),
    "w4a4 smoothed": ("--scheme", "W4A4", "--group-size", "32", "--runtime-smooth", "robust", "--lm-head", "float"),
    "fp8": ("--scheme", "FP8_DYNAMIC"),
    "w4a16": ("--scheme", "W4A16"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Callable[[str], Path]:
    """folders(name): the checkpoint of this name, made when it is first asked for."""
    root = tmp_path_factory.mktemp("pretrained")
    model = write_model(root / "model", "qwen2", tied=True)

    def folder(name: str) -> Path:
        output = root / name.replace(" ", "-")
        if not output.exists():
            small = ("--quantizer", "rtn", "--sequences", "4", "--length", "64", "--threads", "1")
            with pytest.raises(SystemExit) as stop:
                main(["quantize", str(model), "-o", str(output), *CHECKPOINTS[name], *small])
            assert not stop.value.code
        return output

    return folder


@pytest.fixture(scope="module")
def folder(folders: Callable[[str], Path]) -> Path:
    """One of them, with a quantized cache and a quantized tied head."""
    return folders("w4a8 kv int8")


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def padded(tokens: np.ndarray, *, left: bool = True) -> dict[str, torch.Tensor]:
    """The sequences' first LENGTHS tokens as transformers takes a batch."""
    longest = max(LENGTHS)
    ids = torch.full((len(LENGTHS), longest), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        place = slice(longest - length, None) if left else slice(None, length)
        ids[row, place] = torch.from_numpy(tokens[row, :length])
        mask[row, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_padded_batches_have_the_bits_of_the_native_session(
    folders: Callable[[str], Path], tokens: np.ndarray, name: str
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folders(name))
    with NativeSession(QuantizedCheckpoint(folders(name)), max_length=64) as session:
        wanted = session.prefill(tokens[:, :20], LENGTHS)
        stepped = session.decode(tokens[:, 20])
    batch = padded(tokens)
    found = model(**batch)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_array_equal(found.logits[row, -length:].numpy(), wanted[row, :length])
        assert not found.logits[row, :-length].any()
    mask = torch.cat((batch["attention_mask"], torch.ones(3, 1, dtype=torch.int64)), dim=1)
    step = model(torch.from_numpy(tokens[:, 20:21]), attention_mask=mask, past_key_values=found.past_key_values)
    np.testing.assert_array_equal(step.logits[:, 0].numpy(), stepped)


def test_padding_may_stand_behind_a_sequence(model: Any, tokens: np.ndarray) -> None:
    left, right = model(**padded(tokens)).logits, model(**padded(tokens, left=False)).logits
    for row, length in enumerate(LENGTHS):
        assert torch.equal(left[row, -length:], right[row, :length])


def test_generation_of_a_batch_is_each_sequence_s_own(
    folder: Path, model: Any, tokens: np.ndarray
) -> None:
    with NativeSession(QuantizedCheckpoint(folder), max_length=64) as session:
        wanted = [
            list(generate(session, tokens[row, :length], max_new_tokens=8)) for row, length in enumerate(LENGTHS)
        ]
    plain: dict[str, Any] = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": PAD}
    assert model.generate(**padded(tokens), **plain)[:, 20:].tolist() == wanted
    uncached = model.generate(**padded(tokens), **plain, use_cache=False)
    assert uncached[:, 20:].tolist() == wanted


def pieces(model: Any, ids: torch.Tensor, *cuts: int) -> tuple[torch.Tensor, Any]:
    """The logits of a text that is handed in piece by piece, and the cache."""
    found: list[torch.Tensor] = []
    cache = None
    for first, last in pairwise((0, *cuts, ids.shape[1])):
        out = model(ids[:, first:last], past_key_values=cache)
        cache = out.past_key_values
        found.append(out.logits)
    return torch.cat(found, dim=1), cache


def test_memory_grows_with_the_text(model: Any, tokens: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, memory = torch.from_numpy(tokens[:, :24]), model.model._loaded.memory
    wanted, cache = pieces(model, ids, 7, 8, 9, 10)
    assert cache._memory.length == 256
    del cache
    monkeypatch.setattr(sequences, "SMALLEST", 1)
    monkeypatch.setattr(memory, "_spare", None)
    _, small = pieces(model, ids[:, :7])
    found, cache = pieces(model, ids, 7, 8, 9, 10)
    assert (small._memory.length, cache._memory.length) == (8, 32)
    assert torch.equal(found, wanted)


def test_beams_and_guesses_move_the_cache(model: Any, tokens: np.ndarray) -> None:
    batch = padded(tokens)
    beams: dict[str, Any] = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6, "pad_token_id": PAD}
    cached = model.generate(**batch, **beams)
    assert torch.equal(cached, model.generate(**batch, **beams, use_cache=False))
    one = {"input_ids": torch.from_numpy(tokens[:1, :12]), "attention_mask": torch.ones(1, 12, dtype=torch.int64)}
    plain = model.generate(**one, do_sample=False, max_new_tokens=10, pad_token_id=PAD)
    guessed = model.generate(**one, do_sample=False, max_new_tokens=10, pad_token_id=PAD, prompt_lookup_num_tokens=3)
    assert torch.equal(plain, guessed)


def test_a_cache_can_be_cut_and_rearranged(model: Any, tokens: np.ndarray) -> None:
    ids = torch.from_numpy(tokens[:, :12])
    _, cache = pieces(model, ids[:, :10])
    prefix = copy.deepcopy(cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 6 and cache.lengths == [6, 6, 6]
    cache.batch_select_indices(torch.tensor([2, 0]))
    wanted = pieces(model, ids, 6)[0][[2, 0], 6:]
    assert torch.equal(model(ids[[2, 0], 6:], past_key_values=cache).logits, wanted)
    cache.crop(-6)
    cache.batch_repeat_interleave(2)
    assert torch.equal(model(ids[[2, 2, 0, 0], 6:], past_key_values=cache).logits, wanted[[0, 0, 1, 1]])
    with pytest.raises(UsageError, match="crop"):
        cache.crop(3)
    assert torch.equal(model(ids[:, 10:], past_key_values=prefix).logits, pieces(model, ids, 10)[0][:, 10:])


def test_memory_is_used_again_and_nothing_old_is_seen(model: Any, tokens: np.ndarray) -> None:
    ids = torch.from_numpy(tokens[:2, :9])
    first = model(ids)
    memory, wanted = first.past_key_values._memory, first.logits
    del first
    noise = model(torch.from_numpy(tokens[1:, 9:40]))
    assert noise.past_key_values._memory is memory
    held = model(ids)
    assert held.past_key_values._memory is not memory
    del noise
    assert torch.equal(model(ids).logits, wanted)
    assert torch.equal(held.logits, wanted)


def test_text_in_text_out_with_the_checkpoint_s_tokenizer(folder: Path, model: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", padding_side="left", pad_token="<pad>")
    batch = tokenizer(["water", "the water boils at"], return_tensors="pt", padding=True)
    found = model.generate(**batch, do_sample=False, max_new_tokens=4)
    assert len(tokenizer.batch_decode(found, skip_special_tokens=True)) == 2


def test_embeddings_and_losses_are_transformers_own(model: Any, tokens: np.ndarray) -> None:
    ids = torch.from_numpy(tokens[:2, :16])
    plain = model(ids, labels=ids)
    by_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids))
    assert torch.equal(plain.logits, by_embeddings.logits)
    wanted = torch.nn.functional.cross_entropy(plain.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert float(plain.loss) == pytest.approx(float(wanted), rel=1e-5)
    assert torch.equal(model(ids, logits_to_keep=1).logits[:, 0], plain.logits[:, -1])


def test_moving_the_model_loads_it_again(folder: Path, tokens: np.ndarray) -> None:
    ids = torch.from_numpy(tokens[:1, :16])
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    rounded = model(ids)
    model.to(torch.float32)
    with pytest.raises(UsageError, match="before it was moved"):
        model(ids, past_key_values=rounded.past_key_values)
    exact, rounded = model(ids).logits, rounded.logits
    assert model.dtype == torch.float32
    error = float((rounded - exact).norm() / exact.norm())
    assert 0 < error < 0.1
    again: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(again(ids).logits, exact)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": torch.float64}, "float32, bfloat16 or float16"),
        ({"device_map": {"model": "cpu", "lm_head": "cuda:0"}}, "runs on one"),
    ],
)
def test_what_cannot_be_loaded_is_refused(folder: Path, options: dict[str, Any], words: str) -> None:
    pytest.importorskip("accelerate", reason="transformers wants it for device maps")
    with pytest.raises(UsageError, match=words):
        AutoModelForCausalLM.from_pretrained(folder, **options)


def test_a_changed_or_newer_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    changed = tmp_path / "copy"
    shutil.copytree(folder, changed)
    config = json.loads((changed / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "qtool", "schema_version": 1}
    (changed / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    with pytest.raises(InputRefused, match="changed since it was written"):
        AutoModelForCausalLM.from_pretrained(changed)
    newer = {**config, "quantization_config": {"quant_method": "qtool", "schema_version": 2}}
    (changed / "config.json").write_text(json.dumps(newer))
    with pytest.raises(InputRefused, match="newer"):
        AutoModelForCausalLM.from_pretrained(changed)


def test_a_folder_of_links_is_refused_with_how_to_get_files(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    with pytest.raises(InputRefused, match="hf download"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda model, ids: model(ids, past_key_values=DynamicCache()), "leave it out"),
        (lambda model, ids: model(ids, output_hidden_states=True), "output_hidden_states"),
        (lambda model, ids: model(ids, attention_mask=torch.ones(3, 4)), "attention_mask"),
        (lambda model, ids: model(ids, attention_mask=torch.tensor([[1], [0], [1]]).repeat(1, 8)), "1 has no token"),
        (lambda model, ids: model(ids, position_ids=torch.arange(8)[None] * 2), "position_ids"),
        (lambda model, ids: model(ids.repeat(1, 40)), "256 positions"),
        (lambda model, ids: model(ids[:2], past_key_values=model(ids).past_key_values), "the cache holds 3"),
        (lambda model, ids: model.save_pretrained("never"), "copy the folder"),
    ],
)
def test_what_the_model_cannot_do_it_refuses(
    model: Any, tokens: np.ndarray, call: Callable[[Any, torch.Tensor], Any], words: str
) -> None:
    with pytest.raises(UsageError, match=words):
        call(model, torch.from_numpy(tokens[:, :8]))
    assert not Path("never").exists()


@pytest.mark.parametrize("order", [("qtool", "transformers"), ("transformers", "qtool")])
def test_the_registry_knows_qtool_in_either_order(order: tuple[str, str]) -> None:
    code = (
        f"import {order[0]}, sys; light = 'torch' not in sys.modules\n"
        f"import {order[1]}\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\n"
        "import qtool.transformers_hook as hook; hook.install(); hook.install()\n"
        "print(light, known['qtool'].__name__)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "QtoolQuantizer"]


def test_an_unknown_registry_is_left_alone_with_a_warning() -> None:
    registry = ModuleType("transformers.quantizers.auto")
    with pytest.warns(UserWarning, match="cannot be opened with from_pretrained"):
        transformers_hook.register(registry)
