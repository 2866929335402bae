"""Valid folders are accepted, tensors come out exact, and notes say what was decided."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qtool.errors import InputRefused
from qtool.quantize.architectures import tensor_shapes
from qtool.quantize.inputs import check_finite, open_model

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_family_equals_what_transformers_wrote(
    family: str, tied: bool, tiny_model: Callable[..., Path]
) -> None:
    from safetensors.numpy import load_file

    folder = tiny_model(family, tied=tied)
    model, written = open_model(str(folder)), load_file(folder / "model.safetensors")
    assert list(model.names()) == sorted(written)
    for name, array in written.items():
        read = model.read(name)
        assert read.dtype == np.float32 and read.flags.c_contiguous and read.flags.writeable
        np.testing.assert_array_equal(read, array)
    assert model.float_bytes == 4 * sum(a.size for a in written.values())
    assert set(model.tokenizer_files) == {"tokenizer.json", "tokenizer_config.json"}
    assert model.notes[0].startswith("embeddings are tied" if tied else "embeddings are not tied")


@pytest.mark.parametrize(
    ("family", "flags"), [("llama", {"attention_bias": True, "mlp_bias": True}), ("qwen3", {"attention_bias": True})]
)
def test_biases_the_config_switches_on(family: str, flags: dict[str, bool], tiny_model: Callable[..., Path]) -> None:
    model = open_model(str(tiny_model(family, **flags)))
    assert model.read("model.layers.1.self_attn.o_proj.bias").shape == (64,)


def test_transformers_rebuilds_the_same_network_from_the_checked_config(tiny_model: Callable[..., Path]) -> None:
    from transformers import AutoConfig

    for family, rope in (
        ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
        ("qwen2", {"rope_theta": 1e6}),
        ("mistral", {"sliding_window": 32}),
        ("qwen3", {"rope_theta": 1e6}),
    ):
        folder = tiny_model(family, **rope)
        ours = AutoConfig.for_model(**open_model(str(folder)).config).to_dict()
        theirs = AutoConfig.from_pretrained(folder).to_dict()
        for key in tensor_shapes_keys(theirs):
            assert ours[key] == theirs[key], (family, key)


def tensor_shapes_keys(config: dict[str, Any]) -> list[str]:
    wanted = "vocab hidden intermediate num_ head_dim rope rms tie sliding layer_types bos eos attention_bias max_pos"
    return [key for key in config if key.startswith(tuple(wanted.split()))]


@pytest.mark.parametrize(("dtype", "kind"), [("F16", np.float16), ("BF16", ml_dtypes.bfloat16), ("F32", np.float32)])
def test_stored_dtypes_widen_exactly(dtype: str, kind: Any, tiny_folder: Any, pack_safetensors: Any) -> None:
    narrow = {name: array.astype(kind) for name, array in tiny_folder.tensors.items()}
    tiny_folder.write_weights(pack_safetensors(narrow, dtype))
    model = open_model(str(tiny_folder.path))
    for name, array in narrow.items():
        assert model.stored_dtype(name) == dtype
        np.testing.assert_array_equal(model.read(name), array.astype(np.float32))


def test_shards_equal_the_single_file(tiny_folder: Any) -> None:
    single = open_model(str(tiny_folder.path))
    values = {name: single.read(name) for name in single.names()}
    tiny_folder.shard()
    sharded = open_model(str(tiny_folder.path))
    assert sharded.names() == single.names()
    for name, value in values.items():
        np.testing.assert_array_equal(sharded.read(name), value)


def test_old_rotary_buffers_and_an_equal_tied_head_are_left_out(tiny_folder: Any) -> None:
    tiny_folder.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tiny_folder.tensors[HEAD] = tiny_folder.tensors[EMBEDDING].copy()
    tiny_folder.save()
    model = open_model(str(tiny_folder.path))
    assert list(model.names()) == sorted(tensor_shapes(model.config))
    assert any("equal to model.embed_tokens.weight" in note for note in model.notes)


def test_the_hub_cache_layout_is_accepted(tiny_folder: Any, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for index, file in enumerate(sorted(tiny_folder.path.iterdir())):
        shutil.copy(file, blobs / str(index))
        (snapshot / file.name).symlink_to(f"../../blobs/{index}")
    assert open_model(str(snapshot)).digest == open_model(str(tiny_folder.path)).digest


def test_a_folder_reached_through_a_link_is_accepted(tiny_folder: Any, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_folder.path)
    assert open_model(str(tmp_path / "link")).names()


def test_digest_is_of_content_not_of_time_or_place(tiny_folder: Any, tmp_path: Path) -> None:
    first = open_model(str(tiny_folder.path)).digest
    shutil.copytree(tiny_folder.path, tmp_path / "copy")
    assert open_model(str(tmp_path / "copy")).digest == first
    tiny_folder.tensors[EMBEDDING][0, 0] += 1
    tiny_folder.save()
    assert open_model(str(tiny_folder.path)).digest != first
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"rope_theta": 5.0}))
    assert open_model(str(tmp_path / "copy")).digest != first


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_a_bad_value_is_refused_by_name(bad: float, tiny_folder: Any) -> None:
    name = "model.layers.1.post_attention_layernorm.weight"
    tiny_folder.tensors[name][3] = bad
    tiny_folder.save()
    model = open_model(str(tiny_folder.path))
    model.read(EMBEDDING)
    with pytest.raises(InputRefused, match=name):
        model.read(name)
    with pytest.raises(InputRefused, match=name):
        check_finite(model)


def test_check_finite_reports_progress_over_all_tensors(tiny_folder: Any) -> None:
    calls: list[tuple[int, int, str]] = []
    model = open_model(str(tiny_folder.path))
    check_finite(model, lambda *call: calls.append(call))
    assert calls == [(i, len(model.names()), name) for i, name in enumerate(model.names())]


def test_an_unknown_tensor_is_a_key_error(tiny_folder: Any) -> None:
    with pytest.raises(KeyError):
        open_model(str(tiny_folder.path)).read("nothing")


def test_code_in_the_config_is_ignored_with_a_note(tiny_folder: Any) -> None:
    tiny_folder.config |= {"auto_map": {"AutoModel": "evil.Model"}, "_attn_implementation_internal": "x/y", "zzz": 1}
    tiny_folder.save()
    (tiny_folder.path / "evil.py").write_text("raise SystemExit('executed')")
    model = open_model(str(tiny_folder.path))
    assert not {"auto_map", "_attn_implementation_internal", "zzz"} & set(model.config)
    text = "\n".join(model.notes)
    assert "auto_map is ignored" in text and "_attn_implementation_internal is ignored" in text and "zzz" in text


def test_a_folder_without_tokenizer_opens_with_a_note(tiny_folder: Any) -> None:
    (tiny_folder.path / "tokenizer.json").unlink()
    assert any("no tokenizer.json" in note for note in open_model(str(tiny_folder.path)).notes)


def test_a_refusal_imports_no_torch_and_takes_under_a_second(tiny_folder: Any) -> None:
    (tiny_folder.path / "config.json").write_text('{"model_type": "bert"}')
    code = (
        "import sys, time; start = time.perf_counter()\n"
        "from qtool.errors import InputRefused\n"
        "from qtool.quantize.inputs import open_model\n"
        f"try: open_model({str(tiny_folder.path)!r})\n"
        "except InputRefused: print('refused', time.perf_counter() - start)\n"
        "print([m for m in ('torch', 'transformers', 'onnxruntime') if m in sys.modules])"
    )
    times = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
        first, second = done.stdout.splitlines()
        assert second == "[]"
        times.append(float(first.removeprefix("refused ")))
    assert min(times) < 1
