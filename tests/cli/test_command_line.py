"""The command line itself: fast help, lazy imports, exit codes and the form of an error."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qtool.cli.main import COMMANDS
from qtool.errors import MAX_MESSAGE_CHARS, GateFailed, InputRefused

HEAVY = ("torch", "transformers", "onnxruntime", "onnx", "numpy", "pydantic", "rich")


def qtool(*arguments: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "qtool.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


def test_help_is_fast_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from qtool.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        f"print('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    )
    best = min(_timed(code) for _ in range(3))
    assert best < 0.5


def _timed(code: str) -> float:
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    return time.perf_counter() - start


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_an_example_in_its_help(name: str) -> None:
    code = (
        "import sys\n"
        "from qtool.cli.main import main\n"
        f"try: main(['{name}', '--help'])\n"
        "except SystemExit: pass\n"
        "print('HEAVY', [m for m in ('torch', 'transformers', 'onnxruntime') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert f"  qtool {name} " in done.stdout
    assert "Example" in done.stdout
    assert "HEAVY []" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("quantise", "x"), "quantize"),
        (("quantize", "x"), "--output"),
        (("run", "package"), "--prompt"),
        (("inspect", "/nonexistent"), "folder"),
        (("quantize", "/nonexistent-model", "-o", "out", "--scheme", "W4A9"), "W4A8"),
    ],
)
def test_usage_errors_exit_2_with_one_line(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    done = qtool(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert words in lines[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = qtool("--debug", "inspect", tmp_path)
    assert done.returncode == 3
    assert "Traceback" in done.stderr


def test_messages_are_escaped_and_bounded() -> None:
    line = InputRefused("evil\x1b[31m\n", "x" * 1000, "do this").line()
    assert len(line) <= MAX_MESSAGE_CHARS
    assert line.isprintable()
    assert line.endswith("; do this")
    assert GateFailed("a", "b").line() == "a: b"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_nothing_behind(number: int, code: int, tmp_path: Path) -> None:
    program = (
        "import sys, time, pathlib\n"
        "from qtool.cli import main as m\n"
        "from qtool.quantize.artifacts.store import stage\n"
        "import click\n"
        "@click.command('inspect')\n"
        "def command():\n"
        "    with stage(pathlib.Path('out')) as staging:\n"
        "        (staging.path / 'x').write_text('x'); print('staged', flush=True); time.sleep(60)\n"
        "import qtool.cli.inspect; qtool.cli.inspect.command = command\n"
        "m.main(['inspect'])"
    )
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "staged\n"
    assert os.listdir(tmp_path) == [".out.partial"]
    process.send_signal(number)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == code
    assert stderr.strip().splitlines()[-1].startswith("error: interrupted")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        ("PermissionError(13, 'Permission denied', 'there')", 4, "there: Permission denied"),
        ("OSError(28, 'No space left on device')", 4, "No space left on device"),
        ("__import__('torch').OutOfMemoryError('CUDA out of memory')", 4, "GPU memory: CUDA out of memory; use fewer"),
        ("KeyError('x')", 1, "internal error: KeyError"),
    ],
)
def test_what_nobody_foresaw_is_one_line_too(raised: str, code: int, words: str) -> None:
    program = (
        "import click, qtool.cli.inspect\n"
        "from qtool.cli.main import main\n"
        "@click.command('inspect')\n"
        f"def command(): raise {raised}\n"
        "qtool.cli.inspect.command = command\n"
        "import sys; main(sys.argv[1:])"
    )
    for flags in ([], ["--debug"]):
        command = [sys.executable, "-P", "-c", program, *flags, "inspect"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == code
        assert words in done.stderr.strip().splitlines()[-1]
        assert ("Traceback" in done.stderr) is bool(flags)
