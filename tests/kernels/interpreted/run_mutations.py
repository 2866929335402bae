"""A process of its own: imports torch and Triton once, then forks a child for every fault of mutations.py.

    python run_mutations.py ROOT WORKSPACE

A child runs one test on a copy of the package with the fault. Prints {"listed": count, "noticed": count, "wrong": [what
went wrong]}.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch
import triton.language
import triton.runtime.interpreter

# Named so that they are not taken for unused: children start with them in memory.
PRELOADED = (numpy, torch, triton.language, triton.runtime.interpreter)
SETTINGS = "[pytest]\naddopts = --import-mode=importlib -q -p no:cacheprovider\ntimeout = 120\n"
FAILED = 1  # pytest's exit code for a test that failed, rather than broke or was not found


def copy_package(root: Path, to: Path) -> None:
    """The part of the package and of the tests that a kernel's test needs, as real folders."""
    shutil.rmtree(to, ignore_errors=True)
    skip = shutil.ignore_patterns("__pycache__")
    (to / "qtool").mkdir(parents=True)
    for path in (root / "src" / "qtool").glob("*.py"):
        shutil.copy(path, to / "qtool" / path.name)
    shutil.copytree(root / "kernels", to / "qtool" / "kernels", ignore=skip)
    shutil.copytree(root / "tests" / "kernels" / "interpreted", to / "tests" / "interpreted", ignore=skip)
    (to / "pytest.ini").write_text(SETTINGS)


def exit_code_of(tests: list[str], folder: Path) -> int:
    """Pytest's exit code for the tests of a copy, run in a child process."""
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        with Path("output.txt").open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            nodes = [f"tests/interpreted/{test}" for test in tests]
            os._exit(int(pytest.main(["-c", "pytest.ini", "--rootdir", ".", *nodes])))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(root: Path, workspace: Path) -> None:
    """Run every fault and print what came of it."""
    mutations = runpy.run_path(str(root / "tests" / "kernels" / "interpreted" / "mutations.py"))["MUTATIONS"]
    wrong, noticed = [], 0
    sound = workspace / "sound"
    copy_package(root, sound)
    if code := exit_code_of(sorted({m.test for m in mutations}), sound):
        wrong.append(f"without a fault: exit code {code}: {(sound / 'output.txt').read_text()[-2000:]}")
    for mutation in mutations:
        faulty = workspace / "faulty"
        copy_package(root, faulty)
        path = faulty / "qtool" / mutation.file
        text = path.read_text(encoding="utf-8")
        if text.count(mutation.text) != 1:
            wrong.append(f"{mutation.name}: its text is {text.count(mutation.text)} times in {mutation.file}")
            continue
        path.write_text(text.replace(mutation.text, mutation.replacement), encoding="utf-8")
        code = exit_code_of([mutation.test], faulty)
        noticed += code == FAILED
        if code != FAILED:
            wrong.append(f"{mutation.name}: {mutation.test} ended with exit code {code}")
    sys.stdout.write(json.dumps({"listed": len(mutations), "noticed": noticed, "wrong": wrong}, ensure_ascii=False))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
