"""An interrupted measurement continues where it was and ends in the same bytes."""

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
from qtool.errors import UsageError
from qtool.quantize.artifacts.journal import LIST, Journal
from qtool.quantize.artifacts.manifest import Manifest
from qtool.quantize.artifacts.store import JOURNAL, stage
from qtool.quantize.inputs import open_model
from qtool.quantize.measure import PassJournal, Text, batches, fingerprint, measure

Make = Callable[..., Path]
LENGTH = 16
IDS = np.random.default_rng(2).integers(0, 256, (7, LENGTH))
TEXT = Text(ids=IDS, domains=("prose", "a/b code"), domain_of=np.array([0] * 4 + [1] * 3), sha256="cd" * 32)
BLOCKS = 3


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


def run(
    source: Any, output: Path, *, stop_after: int = 0, mark: str = "aa", restart: bool = False
) -> tuple[str, str, list[int]]:
    """Digest of what was written, the journal's note, and the blocks that were run."""
    blocks: list[int] = []

    def progress(done: int, total: int, _: str) -> None:
        blocks.append(done)
        if done == stop_after:
            raise Stopped

    with stage(output, keep=True) as staging:
        journal = Journal(staging.path, fingerprint(model=mark), restart=restart)
        done = measure(source, TEXT, progress=progress, gram=True, journal=PassJournal(journal))
        journal.close()
        done.statistics.save(staging.path)
        manifest = staging.commit(Manifest(kind="statistics", parents=()))
    return manifest.digest, journal.note, blocks


@pytest.fixture
def source(small_batches: None, tiny_model: Make, request: pytest.FixtureRequest) -> Any:
    return open_model(str(tiny_model(getattr(request, "param", "llama"), num_hidden_layers=BLOCKS)))


@pytest.mark.parametrize("source", ["llama", "mixtral", "mamba2"], indirect=True)
def test_a_pass_stopped_after_any_block_ends_in_the_same_bytes(source: Any, tmp_path: Path) -> None:
    wanted, _, blocks = run(source, tmp_path / "whole")
    assert blocks == [1, 2, 3]
    for stop in range(1, BLOCKS + 1):
        output = tmp_path / str(stop)
        with pytest.raises(Stopped):
            run(source, output, stop_after=stop)
        assert not output.exists()
        assert run(source, output) == (wanted, "", list(range(stop + 1, BLOCKS + 1)))
        assert not (output / JOURNAL).exists()
    assert not list(tmp_path.glob(".*.partial"))


def test_a_pass_stopped_again_and_again(source: Any, tmp_path: Path) -> None:
    for stop in (1, 2, 3):
        with pytest.raises(Stopped):
            run(source, tmp_path / "out", stop_after=stop)
    digest, note, blocks = run(source, tmp_path / "out")
    assert (digest, note, blocks) == (run(source, tmp_path / "whole")[0], "", [])


def test_only_the_last_hidden_states_are_kept(source: Any, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(source, tmp_path / "out", stop_after=3)
    kept = sorted(os.listdir(tmp_path / ".out.partial" / JOURNAL))
    assert kept == ["hidden-0003.safetensors", LIST, *(f"recorded-{i:04}.safetensors" for i in (1, 2, 3))]


def test_another_run_is_refused_and_restart_discards_it(source: Any, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(source, tmp_path / "out", stop_after=2)
    with pytest.raises(UsageError, match="--restart"):
        run(source, tmp_path / "out", mark="bb")
    with pytest.raises(Stopped):  # what was refused is still there
        run(source, tmp_path / "out", stop_after=3)
    digest, note, blocks = run(source, tmp_path / "out", mark="bb", restart=True)
    assert (digest, note, blocks) == (run(source, tmp_path / "whole")[0], "", [1, 2, 3])


def test_a_fingerprint_tells_what_decides_the_result() -> None:
    one = fingerprint(model="a", shard=(0, 2), gram=False)
    assert one == fingerprint(gram=False, shard=(0, 2), model="a")
    others = [fingerprint(model="b", shard=(0, 2), gram=False), fingerprint(model="a", shard=(1, 2), gram=False)]
    assert len({one, *others, fingerprint(model="a", shard=(0, 2), gram=True)}) == 4


@pytest.mark.parametrize("which", ["hidden-0002.safetensors", "recorded-0001.safetensors", LIST])
def test_a_flipped_bit_is_noted_and_the_result_is_right(which: str, source: Any, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        run(source, tmp_path / "out", stop_after=2)
    file = tmp_path / ".out.partial" / JOURNAL / which
    data = bytearray(file.read_bytes())
    data[0 if which == LIST else len(data) // 2] ^= 4
    file.write_bytes(data)
    digest, note, blocks = run(source, tmp_path / "out")
    assert "dropped" in note
    assert (digest, blocks) == (run(source, tmp_path / "whole")[0], [1, 2, 3])


def test_the_command_continues_after_sigkill(
    tiny_model: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], as_before: None
) -> None:
    model = tiny_model(num_hidden_layers=8)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"Line {i} says {i * 7919 % 1000}.\n" for i in range(400)))
    options = ["--text", str(text), "--sequences", "4", "--length", "64", "--threads", "1", "--json"]
    command = ["measure", str(model), "-o", str(tmp_path / "out"), *options]
    slowly = (  # so that the kill falls between two blocks or while one is written, on any machine
        "import sys, time\n"
        "from qtool.cli.main import main\n"
        "from qtool.quantize.measure import PassJournal\n"
        "save = PassJournal.save\n"
        "PassJournal.save = lambda *args: (time.sleep(0.05), save(*args))\n"
        "main(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", slowly, *command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    listed = tmp_path / ".out.partial" / JOURNAL / LIST
    deadline = time.monotonic() + 60
    while not listed.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(random.Random(3).uniform(0, 0.15))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = len(json.loads(listed.read_bytes())["steps"])
    assert 1 <= done < 8
    assert not (tmp_path / "out").exists()
    digests = []
    for output in (tmp_path / "out", tmp_path / "again"):
        command[3] = str(output)
        with pytest.raises(SystemExit) as stopped:
            main(command)
        assert stopped.value.code == 0
        printed = capsys.readouterr()
        assert (f"continuing after block {done}" in printed.err) is (output.name == "out")
        digests.append(json.loads(printed.out)["digest"])
    assert digests[0] == digests[1]
    assert not list(tmp_path.glob(".*.partial"))
