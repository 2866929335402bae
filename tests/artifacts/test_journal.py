"""The journal of a long command: what it finished is there after any interruption, and nothing else is believed."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from qtool.errors import UsageError
from qtool.quantize.artifacts.journal import LIST, Journal
from qtool.quantize.artifacts.store import JOURNAL


def test_steps_and_files_are_there_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "aa")
    journal.append({"block": 1}, {"one": b"1", "state-1": b"s1"})
    journal.append({"block": 2}, {"two": b"2", "state-2": b"s2"}, drop=["state-1"])
    again = Journal(tmp_path, "aa")
    assert again.steps == [{"block": 1}, {"block": 2}] and again.note == ""
    assert [again.read(name) for name in ("one", "two", "state-2")] == [b"1", b"2", b"s2"]
    assert sorted(os.listdir(tmp_path / JOURNAL)) == [LIST, "one", "state-2", "two"]
    again.append({"block": 3}, {"three": b"3"}, drop=["state-2"])
    assert Journal(tmp_path, "aa").steps == [{"block": 1}, {"block": 2}, {"block": 3}]
    again.close()
    assert os.listdir(tmp_path) == []


def test_files_that_the_caller_wrote_are_kept_and_handed_over(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "aa")
    (journal.folder / "shard").write_bytes(b"large")
    journal.append(1, {}, written=["shard"])
    again = Journal(tmp_path, "aa")
    assert (again.note, again.read("shard")) == ("", b"large")
    again.release(["shard"])
    assert (tmp_path / "shard").read_bytes() == b"large"
    assert Journal(tmp_path, "aa").steps == [1]  # until the output is committed, nothing is lost


def test_a_file_system_without_links_hands_over_by_moving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    journal = Journal(tmp_path, "aa")
    journal.append(1, {"shard": b"large"})
    monkeypatch.setattr(os, "link", refuse)
    journal.release(["shard"])
    assert (tmp_path / "shard").read_bytes() == b"large"
    assert "dropped" in Journal(tmp_path, "aa").note


def test_a_fresh_one_is_empty(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "aa")
    assert (journal.steps, journal.note) == ([], "")


def test_another_fingerprint_is_refused_and_nothing_is_lost(tmp_path: Path) -> None:
    Journal(tmp_path, "aa").append(1, {"one": b"1"})
    with pytest.raises(UsageError, match="--restart"):
        Journal(tmp_path, "bb")
    assert Journal(tmp_path, "aa").steps == [1]


def test_restart_drops_what_was_there(tmp_path: Path) -> None:
    Journal(tmp_path, "aa").append(1, {"one": b"1"})
    fresh = Journal(tmp_path, "bb", restart=True)
    assert (fresh.steps, fresh.note) == ([], "")
    assert os.listdir(tmp_path / JOURNAL) == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "link", "list", "not json"])
def test_damage_is_noted_and_the_work_dropped(tmp_path: Path, damage: str) -> None:
    Journal(tmp_path, "aa").append(1, {"one": b"11"})
    file, listed = tmp_path / JOURNAL / "one", tmp_path / JOURNAL / LIST
    if damage == "flip":
        flip(file)
    elif damage == "cut":
        file.write_bytes(b"1")
    elif damage == "remove":
        file.unlink()
    elif damage == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif damage == "list":
        listed.write_bytes(b'{"fingerprint": "aa"}')
    else:
        flip(listed)
    journal = Journal(tmp_path, "aa")
    assert "dropped" in journal.note
    assert journal.steps == []
    journal.append(7, {"one": b"new"})
    assert Journal(tmp_path, "aa").steps == [7]


def test_files_that_were_never_listed_are_removed(tmp_path: Path) -> None:
    Journal(tmp_path, "aa").append(1, {"one": b"1"})
    (tmp_path / JOURNAL / "two").write_bytes(b"half")
    (tmp_path / JOURNAL / f"{LIST}.new").write_bytes(b"{")
    Journal(tmp_path, "aa")
    assert sorted(os.listdir(tmp_path / JOURNAL)) == [LIST, "one"]


def test_a_kill_between_any_two_calls_leaves_a_whole_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop `append` before each thing it does to the disk; what is found then is the old state or the new one."""
    from qtool.quantize.artifacts import journal as module

    class Killed(Exception):
        pass

    def run(folder: Path, stop_at: int) -> int:
        folder.mkdir()
        one = Journal(folder, "aa")
        one.append(1, {"one": b"1", "state-1": b"s1"})
        calls = 0

        def counted(real: object) -> object:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal calls
                calls += 1
                if calls == stop_at:
                    raise Killed
                return real(*args, **kwargs)  # type: ignore[operator]

            return call

        with monkeypatch.context() as patch:
            patch.setattr(module, "write_file", counted(module.write_file))
            patch.setattr(Path, "replace", counted(Path.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            with suppress(Killed):
                one.append(2, {"two": b"2", "state-2": b"s2"}, drop=["state-1"])
        return calls

    total = run(tmp_path / "whole", 0)
    assert total >= 5
    for stop_at in range(1, total + 1):
        folder = tmp_path / str(stop_at)
        run(folder, stop_at)
        again = Journal(folder, "aa")
        assert again.note == ""
        assert again.steps in ([1], [1, 2])
        assert again.read(f"state-{len(again.steps)}") == f"s{len(again.steps)}".encode()


def test_a_kill_at_a_random_moment(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from qtool.quantize.artifacts.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]), 'aa')\n"
        "assert not journal.note\n"
        "print('ready', len(journal.steps), flush=True)\n"
        "for step in range(len(journal.steps) + 1, 100000):\n"
        "    drop = [f'state-{step - 1}'] if step > 1 else []\n"
        "    files = {f'recorded-{step}': b'r' * 100, f'state-{step}': str(step).encode() * 5000}\n"
        "    journal.append(step, files, drop=drop)\n"
    )
    moments = random.Random(5)
    before = 0
    for _ in range(4):
        command = [sys.executable, "-P", "-c", program, str(tmp_path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == f"ready {before}\n"
        time.sleep(moments.uniform(0.005, 0.06))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        journal = Journal(tmp_path, "aa")
        assert journal.note == ""
        assert journal.steps == list(range(1, len(journal.steps) + 1))
        assert len(journal.steps) >= before
        before = len(journal.steps)
        if before:
            assert journal.read(f"state-{before}") == str(before).encode() * 5000
    assert before > 0
