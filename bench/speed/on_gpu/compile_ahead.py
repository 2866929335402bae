"""Kernels compiled by several processes into Triton's cache, so that what times them only loads them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from functools import partial
from multiprocessing import get_context

import torch

from on_gpu.contenders import BY_NAME, OURS, Contender
from on_gpu.shapes import Case
from on_gpu.timing import attempt

MOST_PROCESSES = 12
# What a model multiplies beside the grid: gate and up merged, and the head of Llama 3.
OF_MODELS = tuple(Case(4096, n, m) for n in (28672, 128256) for m in (1, 16, 64, 2048))


def compile_ahead(cases: Sequence[Case], seconds: float, contenders: Sequence[Contender] = OURS) -> tuple[int, int]:
    """How many of how many (contender, case) pairs were run once in this time, in the order of the cases."""
    items = [(contender.name, case) for case in cases for contender in contenders]
    end = time.monotonic() + seconds
    pool = ProcessPoolExecutor(processes(), mp_context=get_context("spawn"))
    futures = [pool.submit(run_once, name, case) for name, case in items]
    done, _ = wait(futures, timeout=max(end - time.monotonic(), 0))
    # What is in the middle of a compilation ends it, since nothing may run beside what is timed.
    pool.shutdown(wait=True, cancel_futures=True)
    return len(done), len(items)


def processes() -> int:
    """One a core, within reason: each holds a context on the GPU."""
    return max(1, min(MOST_PROCESSES, (os.cpu_count() or 2) - 1))


def run_once(name: str, case: Case) -> str:
    """Why it does not run; empty when it does."""
    contender, device = BY_NAME[name], torch.device("cuda")
    return contender.obstacle(case, device) or attempt(partial(_run, contender, case, device))


def _run(contender: Contender, case: Case, device: torch.device) -> None:
    run: Callable[..., object] | None = contender.make(case, device, 1).run
    assert run is not None
    run()
    torch.cuda.synchronize(device)
