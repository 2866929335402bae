"""The committed table: what growth is, and that the document shows it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from qtool.kernels.compile_check import Expect, Report, Work, problems
from qtool.kernels.compile_check.instructions import counted, disassembled, main_loop
from qtool.kernels.compile_check.markdown import BEGIN, END, section
from qtool.kernels.compile_check.table import Row, grown, read_table, row, write_table

DOCUMENT = Path(__file__).parents[3] / "docs" / "kernels.md"

LOOP = Counter({"IGMMA": 8, "LOP3": 92})
REPORT = Report("sm_90", 4, 32 << 10, 76, 0, Counter({"wgmma.s8": 8}), Counter({"IGMMA": 8, "LOP3": 392}), LOOP)
WORK = Work(read=128 * 64, products=128 * 128 * 16)
ROW = row("w4a8_gemm", "m16", WORK, REPORT, "3.7.1")

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   IMAD R2, R1, R1, R1 ;
        /*0020*/              @!P0 IMMA.16832.S8.S8 R4, R2.ROW, R3.COL, R4 ;
        /*0030*/                   LOP3.LUT R2, R2, 0xf0, RZ, 0xc0, !PT ;
        /*0040*/               @P0 BRA 0x20 ;
        /*0050*/                   EXIT ;
        /*0060*/                   BRA 0x60 ;
"""


def test_the_document_shows_the_committed_table() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    shown = BEGIN + text.partition(BEGIN)[2].partition(END)[0] + END
    assert shown == section(read_table().values()), "python -m qtool.kernels.compile_check --docs docs/kernels.md"


def test_the_main_loop_is_what_a_branch_goes_back_over() -> None:
    instructions = disassembled(SASS)
    assert len(instructions) == 7
    assert main_loop(instructions) == Counter({"IMMA": 1, "LOP3": 1, "BRA": 1})


def test_weights_in_registers_are_told_from_weights_in_shared_memory() -> None:
    registers = "wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8 {%r1,%r2},{%r3,%r4,%r5,%r6}, %rd1, 1;"
    shared = "wgmma.mma_async.sync.aligned.m64n16k32.s32.s8.s8 {%r1,%r2}, %rd1, %rd2, 1;"
    assert counted(registers) == Counter({"wgmma.s8": 1, "wgmma.rs": 1})
    assert counted(shared) == Counter({"wgmma.s8": 1})


def test_blocks_follow_from_the_scarcest_resource() -> None:
    assert REPORT.blocks == 6  # of registers: 65536 / (76 → 80 × 32 × 4)
    assert replace(REPORT, registers=40).blocks == 6  # of shared memory: 228 KiB / 33 KiB
    assert replace(REPORT, registers=40, shared=1024, warps=8).blocks == 6  # of registers: 65536 / (40 × 32 × 8)


def test_the_share_of_the_floor_is_limited_by_issuing() -> None:
    assert REPORT.share_of_floor(WORK) == 1.0
    slow = replace(REPORT, loop=Counter({"IGMMA": 8, "LOP3": 792}))
    assert slow.share_of_floor(WORK) == pytest.approx(8192 / (4.3e12 / 132 / 1.75e9) / 800)


def test_every_expectation_is_checked() -> None:
    assert problems(REPORT, Expect(has=["wgmma.s8"], min_blocks=6)) == []
    wrong = replace(REPORT, spill=3, shared=300 << 10, registers=255, convert_layout=2)
    expect = Expect(has=["wgmma.rs"], lacks=["wgmma.s8"], max_registers=200, max_convert_layout=0, min_blocks=1)
    assert problems(wrong, expect) == [
        "no wgmma.rs",
        "8 wgmma.s8",
        f"{300 << 10} bytes of shared memory, at most {227 << 10}",
        "255 registers, at most 200",
        "3 spills, at most 0",
        "2 layout conversions, at most 0",
        "0 blocks fit a multiprocessor, at least 1",
    ]
    assert problems(REPORT, Expect(at_most={"wgmma.s8": 7})) == ["8 wgmma.s8, at most 7"]


def test_a_tenth_more_is_growth_and_an_unknown_triton_is_not() -> None:
    committed = {ROW.key: ROW}
    assert grown(replace(ROW, loop=110, registers=80), committed) == []
    assert grown(replace(ROW, loop=111), committed) == ["loop 111, was 100"]
    assert grown(replace(ROW, loop=200, triton="3.9.0"), committed) == []
    assert grown(replace(ROW, case="m17"), committed) != []


def test_the_table_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    other = replace(ROW, case="m128", share=None)
    write_table([ROW, other], path)
    assert read_table(path) == {ROW.key: ROW, other.key: other}
    assert read_table(tmp_path / "none.json") == {}


def test_a_line_of_the_document() -> None:
    amd = Row("w4a8_gemm", "m16", "gfx942", "3.7.1", 0, 0, "mfma.i8", "", 64, 0, 10240, 6, None)
    lines = section([ROW, amd]).splitlines()
    assert "| `m16` | 100 IGMMA | 76 | 6 | 100% | — | — | mfma.i8 / 64 / 6 | LOP3 92 IGMMA 8 |" in lines
