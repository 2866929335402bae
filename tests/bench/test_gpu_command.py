"""The command itself on a CPU: a tiny model, tiny products, the references."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import outer_torch
from on_gpu import checks
from on_gpu.random_model import SHAPES, linears
from on_gpu.tokens import PLANS, VARIANTS, source_of
from on_gpu.transformers_peer import rows_of_process, static_step
from qtool.quantize.artifacts.network import load_network
from qtool.runtime.native import NativeSession
from qtool.runtime.reference import ReferenceSession

SPEED = Path(__file__).parents[2] / "bench" / "speed"


@pytest.fixture(scope="module")
def command() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_speed_gpu", SPEED / "gpu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_everything_on_the_references(command: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.json"
    asked = ["--shape", "tiny", "--device", "cpu", "--no-checks", "--minutes", "5", "--output", str(output)]
    assert command.main(asked) == 0
    found = json.loads(output.read_text())
    kinds = {row["kind"] for row in found["rows"]}
    assert kinds == {"product", "rows", "tokens"}
    assert found["left_out"] == []
    tokens = [row for row in found["rows"] if row["kind"] == "tokens"]
    assert [row for row in tokens if "reason" in row] == []
    assert {row["name"] for row in tokens} == {"transformers bf16", *(variant.name for variant in VARIANTS)}
    assert {(row["phase"], row["batch"]) for row in tokens} == {("prefill", 1), ("decode", 1), ("decode", 3)}
    assert all(list(row["times_transformers"]) == ["eager"] for row in tokens if row["ours"])
    # What runs is what the name says.
    ran = {row["name"]: row["operations"] for row in tokens if row["ours"]}
    assert ran["w4a8 g128"] == {"w4a8_gemm": 8, "w8a8_gemm": 1}
    assert ran["bf16"] == {"float": 9} and ran["fp8"] == {"fp8_gemm": 9}
    assert ran["w4a16 g128"] == {"w4a16_gemm": 8, "float": 1}
    assert "rows in" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([]) == 4
    assert "--device cpu" in " ".join(capsys.readouterr().out.split())
    assert command.main(["--tune", "--device", "cpu"]) == 2


def test_nothing_is_timed_when_a_check_fails(
    command: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    output = tmp_path / "rows.json"
    failed = checks.Checked({"test_x.py": "1 failed, 3 passed"}, ["test_x.py: exit 1\nFAILED test_x.py::test_w4a8"])
    monkeypatch.setattr(command, "check", lambda seconds: failed)
    assert command.main(["--shape", "tiny", "--device", "cpu", "--output", str(output)]) == 1
    assert "FAILED test_x.py::test_w4a8" in capsys.readouterr().out
    assert not output.exists()


def test_checks_tell_passed_failed_and_skipped_files_apart(tmp_path: Path) -> None:
    texts = {
        "passes": "def test_a():\n    pass\n",
        "fails": "def test_b():\n    assert 1 == 2\n",
        "skips": "import pytest\npytest.skip('no GPU', allow_module_level=True)\n",
    }
    for name, text in texts.items():
        (tmp_path / f"test_{name}.py").write_text(text)
    found = checks.check(120, [tmp_path / f"test_{name}.py" for name in texts])
    assert len(found.summaries) == 3 and "1 passed" in found.summaries["test_passes.py"]
    assert len(found.failures) == 2
    assert "test_b" in found.failures[0] and "nothing ran" not in found.failures[0]
    assert found.failures[1].startswith("test_skips.py")


def test_rows_of_a_process_that_fails_or_hangs_are_kept() -> None:
    said = "print('noise'); print('{\"kind\": \"tokens\", \"name\": \"peer\"}', flush=True); "
    first = {"kind": "tokens", "name": "peer"}
    for ending, seconds, reason in (
        ("", 60, ""),
        ("raise ValueError('no graph')", 60, "ValueError: no graph"),
        ("import time; time.sleep(600)", 8, "not done after 8 s"),
    ):
        found = rows_of_process([sys.executable, "-c", said + ending], seconds, {"kind": "tokens"})
        assert found[0] == first
        assert found[1:] == ([{"kind": "tokens", "reason": reason}] if reason else [])


def test_a_torch_without_cuda_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = outer_torch.site_packages(tmp_path)
    target.mkdir(parents=True)
    monkeypatch.setattr("sys.argv", ["outer_torch.py", str(tmp_path)])
    monkeypatch.setattr(torch.version, "cuda", None)
    outer_torch.main()
    assert list(target.iterdir()) == []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    outer_torch.main()
    folders = (target / outer_torch.NAME).read_text().splitlines()
    assert str(Path(torch.__file__).parents[1]) in folders and all(Path(folder).is_dir() for folder in folders)


def test_there_is_something_to_check() -> None:
    assert len(list(checks.TESTS.glob("test_*.py"))) >= 6


def test_the_random_8b_model_has_the_published_size() -> None:
    config = SHAPES["llama-3-8b"]
    in_linears = sum(n * k for n, k in linears(config).values())
    norms = (2 * config["num_hidden_layers"] + 1) * config["hidden_size"]
    assert in_linears + config["vocab_size"] * config["hidden_size"] + norms == 8_030_261_248


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_a_random_models_logits_are_the_references(variant: object) -> None:
    source = source_of(variant, "tiny", torch.device("cpu"))  # type: ignore[arg-type]
    tokens = torch.arange(5, 17)[None]
    with NativeSession(source, device="cpu", max_length=16) as session, ReferenceSession(source) as reference:
        got, wanted = session.prefill(tokens.numpy()), reference.prefill(tokens.numpy())
    assert wanted.std() > 0.05
    assert np.linalg.norm(got - wanted) < 0.02 * np.linalg.norm(wanted)


def test_transformers_static_step_stays_one_place_behind_the_context() -> None:
    network = load_network(source_of(VARIANTS[1], "tiny", torch.device("cpu")))
    with torch.inference_mode():
        step, ids = static_step(network, PLANS["tiny"], 2)
        ids.fill_(7)
        first, second = step(), step()
        prompt = torch.cat((torch.zeros(2, PLANS["tiny"].context, dtype=torch.int64), ids), dim=1)
        wanted = network(input_ids=prompt).logits[:, -1]
    assert torch.allclose(first, wanted, atol=1e-4) and torch.allclose(second, wanted, atol=1e-4)
