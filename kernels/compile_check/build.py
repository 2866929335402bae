"""Triton's pipeline for a target given by name, and what its output says."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from qtool.errors import EnvironmentFault, UsageError
from qtool.kernels.compile_check.case import Case
from qtool.kernels.compile_check.instructions import SPILLS, counted, disassembled, main_loop
from qtool.kernels.compile_check.report import Report
from qtool.kernels.compile_check.targets import TARGETS

CHECKERS = ("build", "instructions", "report", "targets")
AMD_FACTS = {"registers": r"\.vgpr_count:\s+(\d+)", "spill": r"\.vgpr_spill_count:\s+(\d+)"}


def build(case: Case, target: str) -> Report:
    """Compile a case for a target; about a second.

    Raises:
        EnvironmentFault: under TRITON_INTERPRET, or when the triton wheel lacks the disassembler.
        UsageError: when the case's arguments are not the kernel's.
    """
    if triton.knobs.runtime.interpret:
        raise EnvironmentFault("compile check", "kernels made under TRITON_INTERPRET cannot be compiled", "unset it")
    gpu = TARGETS[target]
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **case.options}
    compiled = triton.compile(
        _source(case, gpu.nvidia), target=GPUTarget(gpu.backend, gpu.arch, gpu.warp), options=options
    )
    assembly = compiled.asm
    facts = _read_cubin(assembly["cubin"]) if "cubin" in assembly else _read_amdgcn(assembly["amdgcn"])
    return Report(
        target=target,
        warps=getattr(compiled.metadata, "num_warps", case.num_warps),
        shared=compiled.metadata.shared,
        classes=counted(assembly.get("ptx") or assembly["amdgcn"]),
        convert_layout=len(re.findall(r"\bttg\.convert_layout ", str(assembly["ttgir"]))),
        **facts,
    )


def fingerprint(case: Case, target: str) -> str:
    """Of all that decides what `build` and the expectations make of a case: kernel, configuration, and this checker."""
    parts = [
        _source(case, TARGETS[target].nvidia).hash(),
        *map(repr, (case.num_warps, case.num_stages, sorted(case.options.items()), case.expected(target), case.work)),
        *(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8") for name in CHECKERS),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _source(case: Case, nvidia: bool) -> Any:
    function = case.kernel
    while not isinstance(function, triton.JITFunction):
        function = function.fn
    names = function.arg_names
    constexprs = dict(case.constexprs)
    if "ASM" in names:
        constexprs.setdefault("ASM", nvidia)
    wrong = sorted(set(names) ^ (set(case.signature) | set(constexprs)))
    if wrong:
        raise UsageError(f"compile case {case.name}", f"arguments do not match the kernel's: {', '.join(wrong)}")
    signature: dict[str, str] = dict.fromkeys(constexprs, "constexpr")
    hints: dict[tuple[int, ...], list[list[Any]]] = {}
    for name, text in case.signature.items():
        kind, _, hint = text.partition(":")
        signature[name] = kind
        if hint == "1":
            signature[name], constexprs[name] = "constexpr", 1
        elif hint:
            hints[(names.index(name),)] = [["tt.divisibility", int(hint)]]
    ordered = {name: signature[name] for name in names}
    return ASTSource(function, ordered, constexprs, hints)


def _read_cubin(cubin: bytes) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _cuobjdump("--dump-resource-usage", file.name)
        instructions = disassembled(_cuobjdump("--dump-sass", file.name))
    opcodes = Counter(opcode for _, opcode, _ in instructions)
    registers = re.search(r"REG:(\d+)", usage)
    return {
        "registers": int(registers.group(1)) if registers else 0,
        "spill": sum(opcodes[opcode] for opcode in SPILLS),
        "opcodes": opcodes,
        "loop": main_loop(instructions),
    }


def _read_amdgcn(text: str) -> dict[str, Any]:
    found = {name: re.search(pattern, text) for name, pattern in AMD_FACTS.items()}
    return {name: int(match.group(1)) if match else 0 for name, match in found.items()}


def _cuobjdump(option: str, path: str) -> str:
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not (folder / "cuobjdump").exists():
        raise EnvironmentFault(str(folder / "cuobjdump"), "not in this triton wheel", "install triton from PyPI")
    # cuobjdump finds nvdisasm on PATH.
    path_with_tools = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
    return subprocess.run(
        [folder / "cuobjdump", option, path],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PATH": path_with_tools},
    ).stdout
