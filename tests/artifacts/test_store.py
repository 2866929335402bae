"""The commit protocol: whole or nothing, never over something else, and every byte checked on the way back in."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from qtool.errors import EnvironmentFault, InputRefused, UsageError
from qtool.quantize.artifacts.manifest import MANIFEST, Manifest, Parent, read_manifest
from qtool.quantize.artifacts.store import check_free_space, check_output, open_artifact, stage, write_file


def write(output: Path, **files: bytes) -> Path:
    with stage(output) as staging:
        (staging.path / "folder").mkdir()
        write_file(staging.path / "folder" / "inner.bin", b"inner")
        for name, data in files.items():
            write_file(staging.path / name, data)
        staging.commit(Manifest(kind="checkpoint", seed=3, parents=(Parent(kind="model", digest="0" * 64),)))
    return output


def test_a_committed_artifact_opens(tmp_path: Path) -> None:
    output = write(tmp_path / "out", a=b"hello", b=b"")
    manifest = open_artifact(output, kind="checkpoint")
    assert sorted(manifest.files) == ["a", "b", "folder/inner.bin"]
    assert manifest.files["a"].size_bytes == 5
    assert manifest.parent("model") == "0" * 64 and manifest.parent("text") is None
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "one", a=b"x"), write(tmp_path / "two", a=b"x")
    assert (first / MANIFEST).read_bytes() == (second / MANIFEST).read_bytes()
    assert read_manifest(first).digest == read_manifest(second).digest


def test_a_mode_of_0600_is_opened_up_to_the_umask(tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staging:
        path = staging.path / "private"
        path.touch(mode=0o600)
        staging.commit(Manifest(kind="checkpoint"))
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out" / "private").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("make", ["folder", "file", "dangling link"])
def test_an_existing_output_is_never_touched(tmp_path: Path, make: str) -> None:
    output = tmp_path / "out"
    if make == "folder":
        output.mkdir()
    elif make == "file":
        output.write_text("mine")
    else:
        output.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="already exists"), stage(output):
        raise AssertionError("entered")
    assert output.is_symlink() or output.exists()
    assert len(list(tmp_path.iterdir())) == 1


def test_an_output_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with pytest.raises(UsageError, match="appeared"), stage(output) as staging:
        output.mkdir()
        (output / "mine").write_text("mine")
        staging.commit(Manifest(kind="checkpoint"))
    assert [p.name for p in output.iterdir()] == ["mine"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt()])
def test_an_error_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    with pytest.raises(type(failure)), stage(tmp_path / "out") as staging:
        write_file(staging.path / "half", b"data")
        raise failure
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_commit_leaves_nothing(tmp_path: Path) -> None:
    with stage(tmp_path / "out") as staging:
        write_file(staging.path / "half", b"data")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_environment_fault(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="full"), stage(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(EnvironmentFault, match="GB free"):
        check_free_space(tmp_path / "out", 10**18)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_or_read_only_parent_is_refused_before_work(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="not a folder"):
        check_output(tmp_path / "no" / "out")


CHILD = textwrap.dedent("""
    import os, sys, time
    from pathlib import Path
    from qtool.quantize.artifacts import store
    from qtool.quantize.artifacts.manifest import Manifest

    output, moment = Path(sys.argv[1]), sys.argv[2]
    if moment == "before rename":
        os.rename = lambda *_: os._exit(9)
    if moment == "in manifest":
        store.write_file = lambda path, data: (path.write_bytes(data[:40]), os._exit(9))
    with store.stage(output) as staging:
        (staging.path / "half").write_bytes(b"data")
        if moment == "hold":
            print("holding", flush=True)
            sys.stdin.readline()
        if moment == "in stage":
            os._exit(9)
        staging.commit(Manifest(kind="checkpoint"))
        if moment == "after commit":
            os._exit(9)
""")


def child(output: Path, moment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(output), moment]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)


@pytest.mark.parametrize("moment", ["in stage", "in manifest", "before rename"])
def test_a_kill_leaves_nothing_visible_and_the_next_run_succeeds(tmp_path: Path, moment: str) -> None:
    output = tmp_path / "out"
    with child(output, moment) as process:
        assert process.wait(60) == 9
    assert not output.exists()
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    write(output, a=b"after")
    assert sorted(open_artifact(output).files) == ["a", "folder/inner.bin"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_kill_after_the_commit_leaves_the_whole_artifact(tmp_path: Path) -> None:
    with child(tmp_path / "out", "after commit") as process:
        assert process.wait(60) == 9
    assert list(open_artifact(tmp_path / "out").files) == ["half"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_two_writers_of_one_output(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with child(output, "hold") as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == "holding\n"
        with pytest.raises(EnvironmentFault, match="another run") as refused, stage(output):
            raise AssertionError("entered")
        assert refused.value.exit_code == 4
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.wait(60) == 0
    assert list(open_artifact(output).files) == ["half"]


@pytest.mark.parametrize("name", ["a", "folder/inner.bin"])
@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "remove", "link"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, name: str, damage: str) -> None:
    output = write(tmp_path / "out", a=bytes(range(256)))
    path = output / name
    data = path.read_bytes()
    if damage == "flip":
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    elif damage == "cut":
        path.write_bytes(data[:-1])
    elif damage == "grow":
        path.write_bytes(data + b"\0")
    else:
        path.unlink()
        if damage == "link":
            (tmp_path / "elsewhere").write_bytes(data)
            path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputRefused, match=path.name.replace(".", r"\.")):
        open_artifact(output)


def test_an_extra_file_is_refused_even_without_hashing(tmp_path: Path) -> None:
    output = write(tmp_path / "out", a=b"x")
    (output / "folder" / "extra").write_text("x")
    with pytest.raises(InputRefused, match="extra"):
        open_artifact(output, verify=False)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"kind": "checkpoint"', '"kind": "model"', "kind"),
        ('"schema_version": 1', '"schema_version": 2', "newer"),
        ('"schema_version": 1', '"schema_version": "1"', "newer"),
        ('"seed": 3', '"seed": 3, "surprise": 1', "surprise"),
        ("{", "", "not a manifest"),
        ('"size_bytes": 1', '"size_bytes": -1', "size_bytes"),
    ],
)
def test_a_manifest_that_was_edited_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    output = write(tmp_path / "out", a=b"x")
    text = (output / MANIFEST).read_text()
    assert old in text
    (output / MANIFEST).write_text(text.replace(old, new, 1))
    with pytest.raises(InputRefused, match=message):
        open_artifact(output)


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        open_artifact(tmp_path / "nothing")
    with pytest.raises(InputRefused, match="not a qtool artifact"):
        open_artifact(tmp_path)
    output = write(tmp_path / "out")
    with pytest.raises(InputRefused, match="is a checkpoint, not a package"):
        open_artifact(output, kind="package")
