"""`qtool measure` and its subcommands from the command line."""

from __future__ import annotations

import importlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qtool.cli.main import main
from qtool.quantize.artifacts.statistics import Statistics

Make = Callable[..., Path]
Run = Callable[..., "Done"]
SMALL = ("--sequences", "6", "--length", "32", "--threads", "1")


class Done:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        return self.err.strip().splitlines()[-1]


@pytest.fixture
def qtool(capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command line in this process; puts back the signal handlers and threads that `main` sets."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXFSZ)}
    threads = torch.get_num_threads()

    def run(*arguments: str | Path, code: int = 0) -> Done:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        done = Done(int(stopped.value.code or 0), printed.out, printed.err)
        assert done.code == code, done.err
        assert "Traceback" not in done.err
        return done

    yield run
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {i}: {i * 7919 % 1009} and «{i % 17}».\n" for i in range(300)))
    return path


@pytest.fixture
def measured(qtool: Run, tiny_model: Make, text: Path, tmp_path: Path) -> tuple[Path, Path, Done]:
    """A model, its statistics, and what was printed."""
    model, output = tiny_model(), tmp_path / "stats"
    return model, output, qtool("measure", model, "-o", output, "--text", text, *SMALL, "--json")


def test_measure_writes_statistics_and_a_report(qtool: Run, tiny_model: Make, text: Path, tmp_path: Path) -> None:
    report = ("--report", tmp_path / "rep")
    done = qtool("measure", tiny_model(), "-o", tmp_path / "stats", *report, "--text", text, *SMALL)
    assert "× the forward pass alone" in done.out
    statistics = Statistics.load(tmp_path / "stats")
    assert statistics.digest[:16] in done.out
    assert (statistics.shape, statistics.length, list(statistics.domains)) == ((6, 6), 32, ["text"])
    page = (tmp_path / "rep" / "report.html").read_text()
    assert "<html" in page
    assert statistics.model_digest[:16] in page
    assert list((tmp_path / "rep").glob("**/*.png")) and list((tmp_path / "rep").glob("*.md"))
    assert not list(tmp_path.glob(".*.partial"))


def test_json_parses_and_names_the_artifact(measured: tuple[Path, Path, Done]) -> None:
    _, output, done = measured
    assert done.json["output"] == str(output)
    assert done.json["digest"] == Statistics.load(output).digest


def test_two_runs_give_the_same_digest(
    qtool: Run, measured: tuple[Path, Path, Done], text: Path, tmp_path: Path
) -> None:
    model, output, first = measured
    again = qtool("measure", model, "-o", tmp_path / "again", "--text", text, *SMALL, "--json").json
    assert again["digest"] == first.json["digest"]
    other = qtool("measure", model, "-o", tmp_path / "gram", "--text", text, *SMALL, "--gram", "--json").json
    assert other["digest"] != first.json["digest"]
    files = [{p.name: p.read_bytes() for p in folder.iterdir()} for folder in (output, tmp_path / "again")]
    assert files[0] == files[1]


def test_domains_of_ones_own_and_the_built_in_ones(qtool: Run, tiny_model: Make, text: Path, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    (tmp_path / "other.txt").write_text("Ein anderer Text mit Umlauten: äöü. " * 60)
    own = ["--domain", f"lines={text}", "--domain", f"tiny words={tmp_path / 'other.txt'}"]
    qtool("measure", model, "-o", tmp_path / "own", *own, *SMALL)
    statistics = Statistics.load(tmp_path / "own")
    assert list(statistics.domains) == ["lines", "tiny words"]
    assert statistics.shape == (6, 6)
    qtool("measure", model, "-o", tmp_path / "builtin", *SMALL)
    builtin = Statistics.load(tmp_path / "builtin")
    assert len(builtin.domains) == 6
    for bad in ("lines", "=x", f"lines={text}"):
        qtool("measure", model, "-o", tmp_path / "no", "--domain", f"lines={text}", "--domain", bad, *SMALL, code=2)
    assert not (tmp_path / "no").exists()


def test_shards_merge_on_the_command_line(qtool: Run, tiny_model: Make, text: Path, tmp_path: Path) -> None:
    model = tiny_model()
    long = ("--text", text, "--sequences", "10", "--length", "512", "--threads", "1")  # four sequences to a batch
    qtool("measure", model, "-o", tmp_path / "whole", *long)
    for i in (1, 2, 3):
        qtool("measure", model, "-o", tmp_path / f"part{i}", "--shard", f"{i}/3", *long)
    some = qtool("measure", "merge", tmp_path / "part1", tmp_path / "part3", "-o", tmp_path / "some")
    assert "of the text's 10 sequences" in some.err
    parts = [tmp_path / f"part{i}" for i in (3, 1, 2)]
    merged = qtool("measure", "merge", *parts, "-o", tmp_path / "merged", "--json")
    assert "merge the other shards" not in merged.err
    whole, ours = (Statistics.load(tmp_path / name) for name in ("whole", "merged"))
    assert ours.digest == merged.json["digest"]
    assert ours.shape == whole.shape == (10, 10)
    assert list(ours.sites) == list(whole.sites)
    for name, site in whole.sites.items():
        assert ours.sites[name].top_places.tolist() == site.top_places.tolist()
        assert ours.sites[name].channel_high.tolist() == site.channel_high.tolist()
    details = [json.loads((tmp_path / name / "manifest.json").read_bytes())["details"] for name in ("whole", "merged")]
    assert details[0] == details[1]
    assert "same sequences" in qtool("measure", "merge", *parts, parts[0], "-o", tmp_path / "no", code=2).error
    assert "already exists" in qtool("measure", "merge", *parts, "-o", tmp_path / "merged", code=2).error
    many = qtool("measure", model, "-o", tmp_path / "no", "--shard", "4/4", *long, code=2)
    assert "--shard 4/4" in many.error
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_bad_shard_exits_2(shard: str, qtool: Run, tmp_path: Path) -> None:
    done = qtool("measure", "model", "-o", tmp_path / "out", "--shard", shard, code=2)
    assert f"--shard {shard}" in done.error


def test_an_output_that_exists_exits_2_before_any_work(
    qtool: Run, measured: tuple[Path, Path, Done], text: Path, tmp_path: Path
) -> None:
    model, output, _ = measured
    assert "already exists" in qtool("measure", "/nonexistent", "-o", output, code=2).error
    new = tmp_path / "new"
    assert "already exists" in qtool("measure", model, "-o", new, "--report", output, "--text", text, code=2).error
    assert not new.exists()
    assert "already exists" in qtool("measure", "report", output, "-o", output, code=2).error


def test_report_on_the_terminal_as_json_and_as_a_folder(
    qtool: Run, measured: tuple[Path, Path, Done], tmp_path: Path
) -> None:
    _, output, first = measured
    printed = qtool("measure", "report", output, "--json").json
    assert printed | {"output": 0} == first.json | {"output": 0}
    shown = qtool("measure", "report", output, "-o", tmp_path / "rep")
    assert "wrote" in shown.out
    assert (tmp_path / "rep" / "report.html").is_file()


def test_inspect_explains_statistics(qtool: Run, measured: tuple[Path, Path, Done]) -> None:
    _, output, first = measured
    shown = qtool("inspect", output).out
    assert "statistics" in shown and first.json["digest"][:12] in shown.replace("\n", "")
    assert qtool("inspect", output, "--json").json["digest"] == first.json["digest"]
    assert qtool("verify", output).code == 0


def test_changed_or_foreign_files_exit_3(qtool: Run, measured: tuple[Path, Path, Done]) -> None:
    model, output, _ = measured
    file = output / "domain-00.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x55")
    assert "changed" in qtool("measure", "report", output, code=3).error
    assert qtool("measure", "merge", output, "-o", output.parent / "no", code=3)
    assert qtool("measure", "report", model, code=3)
    assert qtool("measure", "report", "/nonexistent", code=2)


def test_validate(qtool: Run, measured: tuple[Path, Path, Done], tiny_model: Make, text: Path) -> None:
    model, output, _ = measured
    small = ("--sequences", "4", "--length", "32", "--threads", "1", "--text", text)
    data = qtool("measure", "validate", model, output, *small, "--json").json
    assert set(data["spearman"]) == {"W8A8 per tensor", "W4A4 per tensor", "W4A4 per token"}
    assert len(data["linears"]) == 3 * 14
    shown = qtool("measure", "validate", model, output, *small)
    assert shown.out.count("Spearman") == 3
    failed = qtool("measure", "validate", model, output, *small, "--min-spearman", "1.01", code=5)
    assert "Spearman" in failed.error
    assert "another model" in qtool("measure", "validate", tiny_model(seed=9), output, *small, code=3).error


def checkpoints(tiny_model: Make, tmp_path: Path, steps: list[int]) -> list[Path]:
    """Models whose embedding has one channel that grows with the training step."""
    from safetensors.numpy import load_file, save_file

    made = []
    for step in steps:
        folder = tiny_model().rename(tmp_path / f"toy-7b-step{step}")
        tensors = load_file(folder / "model.safetensors")
        tensors["model.embed_tokens.weight"][:, 3] += 3.0 * (1 + step) ** 0.3
        save_file(tensors, folder / "model.safetensors")
        made.append(folder)
    return made


def test_a_series_of_checkpoints(qtool: Run, tiny_model: Make, text: Path, tmp_path: Path) -> None:
    steps = [4000, 100, 1000, 16000, 500, 8000]
    models = checkpoints(tiny_model, tmp_path, steps)
    small = ("--sequences", "2", "--length", "16", "--threads", "1", "--text", text)
    data = qtool("measure", "--series", *models, "-o", tmp_path / "dynamics", *small, "--json").json
    assert data["steps"] == sorted(steps)
    assert [layer["layer"] for layer in data["layers"]] == ["model.layers.0.output", "model.layers.1.output"]
    assert all(layer["fit"]["r_squared"] > 0.9 for layer in data["layers"])
    assert data["layers"][0]["ratios"] == sorted(data["layers"][0]["ratios"])
    assert json.loads((tmp_path / "dynamics" / "dynamics.json").read_text()) == data
    assert (tmp_path / "dynamics" / "dynamics.png").read_bytes()[:4] == b"\x89PNG"
    words = ["--steps", "4,1,2,6,3,5"]
    shown = qtool("measure", "--series", *models, "-o", tmp_path / "named", *words, *small)
    assert "wrote" in shown.out
    named = json.loads((tmp_path / "named" / "dynamics.json").read_text())
    assert named["steps"] == [1, 2, 3, 4, 5, 6]
    assert named["layers"][1]["ratios"][0] == data["layers"][1]["ratios"][0]
    assert "3 training steps" in qtool("measure", "--series", *models[:3], "-o", tmp_path / "few", *small, code=2).error
    for bad in ("1,2", "1,2,3,4,5,x", "", "1,2,3,4,5,6,7"):
        qtool("measure", "--series", *models, "-o", tmp_path / "few", "--steps", bad, *small, code=2)
    twice = ("--steps", "1,2,3,4,5,5", "-o", tmp_path / "few")
    assert "one training step" in qtool("measure", "--series", *models, *twice, *small, code=2).error
    nameless = models[0].rename(tmp_path / "final")
    assert "--steps" in qtool("measure", "--series", nameless, *models[1:], "-o", tmp_path / "few", code=2).error
    assert not (tmp_path / "few").exists()


@pytest.mark.parametrize("name", ["", "merge", "report", "validate", "series"])
def test_every_help_has_an_example(name: str, qtool: Run) -> None:
    shown = qtool("measure", *([name] if name else []), "--help").out
    assert "Example" in shown
    call = {"": "measure ./model -o stats", "series": "measure --series step1000"}.get(name, f"measure {name} ")
    assert f"qtool {call}" in shown
    if not name:
        for subcommand in ("merge", "report", "validate", "--series"):
            assert f"qtool measure {subcommand}" in shown


def test_an_interrupted_run_continues_and_another_one_is_refused(
    qtool: Run, tiny_model: Make, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("qtool.quantize.measure.measure")
    model = tiny_model(num_hidden_layers=3)
    command = ("measure", model, "-o", tmp_path / "out", "--text", text, *SMALL, "--json")
    real = module._Pass._block

    def stop(self: Any, index: int) -> None:
        if index == 2:
            raise KeyboardInterrupt
        real(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(module._Pass, "_block", stop)
        assert "interrupted" in qtool(*command, code=130).error
    assert os.listdir(tmp_path / ".out.partial") == ["journal"]
    assert "--restart" in qtool(*command, "--gram", code=2).error
    done = qtool(*command)
    assert "continuing after block 2" in done.err
    again = qtool("measure", model, "-o", tmp_path / "two", "--text", text, *SMALL, "--json")
    assert again.json["digest"] == done.json["digest"]
    assert not list(tmp_path.glob(".*.partial"))


def test_a_subcommands_name_with_a_path_is_still_a_model(qtool: Run, tmp_path: Path) -> None:
    assert "./merge" in qtool("measure", "./merge", "-o", tmp_path / "out", code=2).error
