"""An interrupted quantization continues where it was and ends in the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qtool.cli.main import main
from qtool.quantize.architectures import architecture_of, linear_names
from qtool.quantize.artifacts import replaced_tensors, store
from qtool.quantize.artifacts.checkpoint_writer import CheckpointWriter
from qtool.quantize.artifacts.journal import LIST, Journal
from qtool.quantize.artifacts.manifest import Manifest
from qtool.quantize.artifacts.recipe import Recipe
from qtool.quantize.artifacts.store import JOURNAL, stage
from qtool.quantize.inputs import open_model
from qtool.quantize.measure import batches
from qtool.quantize.quantizers import quantize_model
from qtool.quantize.quantizers.run_journal import RunJournal, token_digest

Make = Callable[..., Path]
LENGTH, BLOCKS = 16, 3
IDS = np.random.default_rng(2).integers(0, 256, (7, LENGTH))
RECIPES = {
    "gptq": Recipe.preset("W4A8", group_size=32),
    "static": Recipe.preset("W8A8", activation="per_tensor"),
    "rtn": Recipe.preset("W4A16", group_size=32, quantizer="rtn"),
    "side": Recipe.preset("W4A4", group_size=32, transform="quad", rank=4, low_rank=2),
    "first block only": Recipe.preset("W4A8", group_size=32, ignore=["model.layers.[12].*"]),
}


class Stopped(Exception):
    pass


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "TOKENS_PER_BATCH", 2 * LENGTH)


@pytest.fixture
def as_before() -> Iterator[None]:
    """`main` sets the process's signal handlers and threads; put them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGXFSZ)}
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(
    source: Any, recipe: Recipe, output: Path, monkeypatch: pytest.MonkeyPatch, *, stop_after: int = 0
) -> tuple[dict[str, bytes], list[int]]:
    """Every file that was written, and the linears done at each call of `progress`."""
    counts: list[int] = []
    save = RunJournal.save

    def stopping(self: RunJournal, *args: Any) -> None:
        save(self, *args)
        if len(self.steps) == stop_after:
            raise Stopped

    with monkeypatch.context() as patch, stage(output, keep=True) as staging:
        patch.setattr(RunJournal, "save", stopping)
        kept = RunJournal(Journal(staging.path, "aa"))
        writer = CheckpointWriter(kept.folder, source.config)
        report = quantize_model(
            source,
            assignments=recipe.assign(linear_names(source.config)),
            groups=architecture_of(source.config).linear_groups,
            tokens=IDS,
            statistics=None,
            writer=writer,
            progress=lambda done, total, text: counts.append(done),
            journal=kept,
        )
        kept.finish()
        details = {**writer.details, "report": report.to_json()}
        staging.commit(Manifest(kind="checkpoint", parents=(), details=details))
    return contents(output), counts


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("tied", [True, False])
def test_a_run_stopped_after_any_shard_ends_in_the_same_bytes(
    small_batches: None, tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, tied: bool
) -> None:
    source, recipe = open_model(str(tiny_model("qwen2", num_hidden_layers=BLOCKS, tied=tied))), RECIPES[name]
    wanted, all_counts = run(source, recipe, tmp_path / "whole", monkeypatch)
    for stop in range(1, BLOCKS + 2):
        output = tmp_path / str(stop)
        with pytest.raises(Stopped):
            run(source, recipe, output, monkeypatch, stop_after=stop)
        assert not output.exists()
        found, counts = run(source, recipe, output, monkeypatch)
        assert found == wanted
        assert len(counts) < len(all_counts)
    assert not list(tmp_path.glob(".*.partial"))


def test_a_run_stopped_again_and_again(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(str(tiny_model(num_hidden_layers=BLOCKS)))
    for stop in range(1, BLOCKS + 2):
        with pytest.raises(Stopped):
            run(source, RECIPES["gptq"], tmp_path / "out", monkeypatch, stop_after=stop)
    found, counts = run(source, RECIPES["gptq"], tmp_path / "out", monkeypatch)
    assert counts == []
    assert found == run(source, RECIPES["gptq"], tmp_path / "whole", monkeypatch)[0]


def test_a_run_stopped_before_its_commit_has_everything(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_model(str(tiny_model(num_hidden_layers=BLOCKS)))
    wanted, _ = run(source, RECIPES["gptq"], tmp_path / "whole", monkeypatch)
    for name in ("write_file", "_sync_folders"):  # the manifest is about to be written; everything is, but not renamed
        output = tmp_path / name

        def refuse(*_: object) -> None:
            raise Stopped

        with monkeypatch.context() as patch, pytest.raises(Stopped):
            patch.setattr(store, name, refuse)
            run(source, RECIPES["gptq"], output, monkeypatch)
        found, counts = run(source, RECIPES["gptq"], output, monkeypatch)
        assert found == wanted
        assert (counts == []) is (name == "write_file")


def test_only_the_last_hidden_states_are_kept(
    small_batches: None, tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_model(str(tiny_model(num_hidden_layers=BLOCKS)))
    with pytest.raises(Stopped):
        run(source, RECIPES["gptq"], tmp_path / "out", monkeypatch, stop_after=2)
    folder = tmp_path / ".out.partial" / JOURNAL
    shards = [f"tensors-{index:05}.safetensors" for index in range(2)]
    assert sorted(os.listdir(folder)) == sorted(["hidden-0002.f32", LIST, *shards])
    assert (folder / "hidden-0002.f32").stat().st_size == 4 * IDS.size * 64


def test_damaged_hidden_states_are_not_used(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_model(str(tiny_model(num_hidden_layers=BLOCKS)))
    with pytest.raises(Stopped):
        run(source, RECIPES["gptq"], tmp_path / "out", monkeypatch, stop_after=2)
    file = tmp_path / ".out.partial" / JOURNAL / "hidden-0002.f32"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    found, counts = run(source, RECIPES["gptq"], tmp_path / "out", monkeypatch)
    whole, all_counts = run(source, RECIPES["gptq"], tmp_path / "whole", monkeypatch)
    assert (found, counts) == (whole, all_counts)


def test_tokens_tell_themselves_apart() -> None:
    other = IDS.copy()
    other[3, 3] += 1
    assert len({token_digest(None), token_digest(IDS), token_digest(other), token_digest(IDS.reshape(LENGTH, 7))}) == 4


SLOWLY = (  # so that the kill falls between two shards or while one is written, on any machine
    "import sys, time\n"
    "from qtool.cli.main import main\n"
    "from qtool.quantize.quantizers.run_journal import RunJournal\n"
    "save = RunJournal.save\n"
    "RunJournal.save = lambda *args: (time.sleep(0.05), save(*args))\n"
    "main(sys.argv[1:])"
)


def kill_within_a_run(command: list[str], listed: Path, moment: float) -> int:
    """Start the command in its own process, SIGKILL it some seconds after its first shard; the shards it finished."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", SLOWLY, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not listed.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(moment)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return len(json.loads(listed.read_bytes())["steps"])


@pytest.mark.parametrize("options", [(), ("--rotate", "--smooth", "0.5")], ids=["plain", "transformed"])
def test_the_command_continues_after_sigkill(
    tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], as_before: None, options: tuple[str, ...]
) -> None:
    model = tiny_model(num_hidden_layers=8)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} says {i * 7919 % 1000}.\n" for i in range(400)))
    command = ["quantize", str(model), "-o", str(tmp_path / "out"), "--scheme", "W4A8", "--group-size", "32", *options]
    command += ["--text", str(text), "--sequences", "4", "--length", "64", "--threads", "1", "--json"]
    listed = tmp_path / ".out.partial" / JOURNAL / LIST
    done = kill_within_a_run(command, listed, random.Random(3).uniform(0, 0.15))
    assert 1 <= done < 9
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as refused:
        main([*command, "--seed", "7"])
    assert refused.value.code == 2
    assert "--restart" in capsys.readouterr().err
    for output in (tmp_path / "out", tmp_path / "again"):
        command[3] = str(output)
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 0
        assert (f"continuing after shard {done}" in capsys.readouterr().err) is (output.name == "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert not list(tmp_path.glob(".*.partial"))


def test_a_run_stopped_while_distilled_shards_are_written_ends_in_the_same_bytes(
    tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_before: None
) -> None:
    model = tiny_model(num_hidden_layers=BLOCKS)
    options = ["--scheme", "W4A16", "--group-size", "32", "--quantizer", "rtn", "--distill", "1"]
    options += ["--sequences", "9", "--length", "32", "--threads", "1"]
    write, written = replaced_tensors.write_tensors, []

    def stopping(*args: Any) -> None:
        write(*args)
        written.append(args)
        if len(written) == 2:
            raise Stopped

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(replaced_tensors, "write_tensors", stopping)
        main(["quantize", str(model), "-o", str(tmp_path / "out"), *options])
    assert len(written) == 2 and not (tmp_path / "out").exists()
    for output in ("out", "again"):
        with pytest.raises(SystemExit) as stopped:
            main(["quantize", str(model), "-o", str(tmp_path / output), *options])
        assert stopped.value.code == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "again")


def test_restart_discards(tiny_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, as_before: None) -> None:
    model = tiny_model(num_hidden_layers=BLOCKS)
    command = ["quantize", str(model), "-o", str(tmp_path / "out"), "--scheme", "W4A16", "--quantizer", "rtn"]
    save = RunJournal.save

    def stopping(self: RunJournal, *args: Any) -> None:
        save(self, *args)
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(RunJournal, "save", stopping)
        main([*command, "--threads", "1"])
    assert (tmp_path / ".out.partial" / JOURNAL / LIST).exists()
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--threads", "1", "--group-size", "32", "--restart"])
    assert stopped.value.code == 0
