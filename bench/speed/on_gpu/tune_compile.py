"""Which candidates are worth a launch: those that the compile check has nothing against, and that then run."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import Any

import torch

from on_gpu.compile_ahead import processes
from on_gpu.config_files import Fields
from on_gpu.contenders import BY_NAME, Contender
from on_gpu.shapes import Case
from on_gpu.timing import attempt, reason_of
from qtool.kernels.float_gemm.tilings import Tiling as FloatTiling
from qtool.kernels.float_gemm.tilings import tiling_for
from qtool.kernels.integer_gemm.tilings import Tiling as IntegerTiling
from qtool.kernels.integer_gemm.tilings import tiling_of

# The start of the name of the compile case that is made into a candidate's, and its end.
TEMPLATES = {
    ("w4a8_gemm", "channel"): ("channel m", ""),
    ("w4a8_gemm", "integer"): ("integer128 m", ""),
    ("w4a8_gemm", "float"): ("float128 m", ""),
    ("w8a8_gemm", "channel"): ("channel m", ""),
    ("w4a4_gemm", "channel"): ("channel m", ""),
    ("fp8_gemm", "row"): ("sm_", " row"),
    ("fp8_gemm", "fast"): ("sm_", " fast"),
    ("w4afp8_gemm", "row"): ("sm_", " row"),
    ("w4afp8_gemm", "group"): ("sm_", " g128"),
    ("w4a16_gemm", "group"): ("sm_", " group bf16"),
}


def tiling(row: Fields, case: Case, device: torch.device) -> IntegerTiling | FloatTiling:
    """What a row of either table means for a product."""
    if "block_m" in row:
        return tiling_of(row, (case.m, case.n, case.k), device)
    return tiling_for(row, device, case.m, case.n, case.k)


def refused_by(
    pool: ProcessPoolExecutor, contender: Contender, target: str, rows: Sequence[Fields], cases: Sequence[Case]
) -> list[str]:
    """Why candidates are not worth a launch, "" for those that are; these have then been compiled for their shapes."""
    return list(pool.map(partial(fault_of, contender.name, target, tuple(cases)), rows))


def compilers() -> ProcessPoolExecutor:
    """Processes to compile candidates in."""
    return ProcessPoolExecutor(processes(), mp_context=get_context("spawn"))


def fault_of(name: str, target: str, cases: Sequence[Case], row: Fields) -> str:
    """What is wrong with one candidate's machine code (spills, shared memory), or with its launch."""
    contender, device = BY_NAME[name], torch.device("cuda")
    try:
        fault = compile_fault(contender, target, row)
    except Exception as error:  # Triton's compiler raises types of its own and of LLVM's
        return reason_of(error)
    return fault or attempt(partial(_launch, contender, row, cases, device))


def compile_fault(contender: Contender, target: str, row: Fields) -> str:
    """What the compile check has against a candidate; empty when nothing."""
    from qtool.kernels.compile_check import problems
    from qtool.kernels.compile_check.build import build
    from qtool.kernels.compile_check.case import Expect

    return ", ".join(problems(build(case_of(contender, target, row), target), Expect()))


def case_of(contender: Contender, target: str, row: Fields) -> Any:
    """A compile case of the kernel with a candidate's tile."""
    from qtool.kernels.compile_check.registry import cases

    start, end = TEMPLATES[contender.folder, contender.form]
    template = next(
        case
        for _, case in cases(contender.folder)
        if case.name.startswith(start) and case.name.endswith(end) and target in case.targets
    )
    if "block_m" in row:
        tile = {"BLOCK_M": row["block_m"], "BLOCK_N": row["block_n"]}
        warps, stages = row["num_warps"], row["num_stages"]
    else:
        tile = {"BM": row["tile_m"], "BN": row["tile_n"]}
        warps, stages = row["warps"], row["stages"]
        if "WEIGHTS_FIRST" in template.constexprs:
            tile["WEIGHTS_FIRST"] = row["weights_first"]
    return replace(template, constexprs={**template.constexprs, **tile}, num_warps=warps, num_stages=stages)


def _launch(contender: Contender, row: Fields, cases: Sequence[Case], device: torch.device) -> None:
    for case in cases:
        run = contender.make(case, device, 1).run
        assert run is not None
        run(tiling=tiling(row, case, device))
        torch.cuda.synchronize(device)
