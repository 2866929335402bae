"""What is made of times: percentiles, spreads, ratios of the same rounds, floors, and what fits into the minutes."""

from __future__ import annotations

import pytest
import torch

from on_gpu.budget import Budget, Row, Work, run_in_order
from on_gpu.contenders import BY_NAME, OURS, PEERS
from on_gpu.floors import Peaks, floor_of, measure_peaks
from on_gpu.shapes import LLAMA, MIB, Case, copies
from on_gpu.targets import TARGETS, verdicts
from on_gpu.timing import Calls, ClockTimer, GraphTimer, Spread, attempt, ratio
from on_gpu.tokens import compare

H200 = Peaks(4.3e12, {"bf16": 790e12, "fp8": 1580e12, "int8": 1580e12})


def test_percentiles_lie_between_neighbours() -> None:
    found = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0, 6.0])
    assert (found.p20, found.median, found.rounds) == (2.0, 3.5, 6)
    assert found.spread == pytest.approx((5.0 - 2.0) / 3.5)
    assert Spread.of([2e-6]).to_json() == {"p20": 2.0, "median": 2.0, "spread": 0.0, "rounds": 1}


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    # A drift that doubles every time after the first round changes nothing.
    assert ratio([3.0, 6.0, 6.0], [1.0, 2.0, 2.0]) == 3.0


def test_what_fails_has_a_reason_and_the_others_their_times() -> None:
    def refuse(copy: int) -> None:
        raise RuntimeError("self.size(0) needs to be greater than 16\nand more")

    used: list[int] = []
    found = ClockTimer(rounds=4)({"peer": Calls(refuse), "ours": Calls(used.append, copies=3)})
    assert found["peer"] == "RuntimeError: self.size(0) needs to be greater than 16"
    assert len(found["ours"]) == 4 and all(isinstance(each, float) for each in found["ours"])
    assert used == [0, 0, 1, 2, 0]
    assert attempt(lambda: None) == ""


@pytest.mark.parametrize(
    ("name", "case", "microseconds", "bound"),
    [
        ("w4a8", Case(4096, 14336, 1), 6.8, "memory"),
        ("w4a8", Case(4096, 14336, 128), 9.5, "arithmetic"),
        ("w4a8 g128", Case(8192, 28672, 16), 27.6, "memory"),
        ("w4a16 g128", Case(4096, 4096, 64), 2.7, "arithmetic"),
        ("fp8", Case(4096, 14336, 4096), 304, "arithmetic"),
        ("torch bf16", Case(4096, 4096, 1), 7.8, "memory"),
    ],
)
def test_floors_of_an_h200(name: str, case: Case, microseconds: float, bound: str) -> None:
    floor = floor_of(BY_NAME[name], case, H200)
    assert floor.seconds * 1e6 == pytest.approx(microseconds, rel=0.03)
    assert floor.bound == bound


def test_eight_bits_without_a_product_count_as_twice_sixteen() -> None:
    def timer(calls: dict[str, Calls]) -> dict[str, list[float] | str]:
        assert set(calls) == {"copy", "bf16", "fp8", "int8"}
        return {"copy": [1e-3], "bf16": [2e-3, 2e-3], "fp8": "no FP8 here", "int8": [1e-3]}

    peaks, reasons = measure_peaks(torch.device("cpu"), timer)
    assert reasons == {"fp8": "no FP8 here"}
    assert peaks.bandwidth == pytest.approx(2 * 4 * MIB / 1e-3)
    assert peaks.rates["fp8"] == 2 * peaks.rates["bf16"] == peaks.rates["int8"]


def test_copies_are_more_than_the_cache_holds() -> None:
    assert copies(8 * MIB, 60 * MIB) == 23
    assert copies(1000 * MIB, 60 * MIB) == 2


def test_every_shape_of_the_design_is_there_and_the_targets_are_among_them() -> None:
    cases = LLAMA.cases()
    assert len(set(cases)) == 45
    assert {case.m for case in cases} == {1, 8, 16, 32, 64, 128, 512, 2048, 4096}
    assert {(t.k, t.n, t.m) for t in TARGETS if t.n} <= {(case.k, case.n, case.m) for case in cases}
    assert {name for target in TARGETS if target.n for name in target.names} <= set(BY_NAME)
    assert len(BY_NAME) == len(OURS) + len(PEERS)


def test_targets_say_what_was_reached_missed_and_not_timed() -> None:
    def row(name: str, m: int, microseconds: float) -> Row:
        return {"name": name, "k": 4096, "n": 14336, "m": m, "us": {"p20": microseconds}}

    rows = [row("w4a8", 16, 12.0), row("w4a8 g128", 16, 11.0), row("w4a8", 1, 13.0)]
    found = {verdict["text"]: verdict for verdict in verdicts(rows)}
    reached = found["W4A8, M 16, 4096→14336"]
    assert (reached["name"], reached["us"], reached["reached"]) == ("w4a8 g128", 11.0, True)
    assert found["W4A8, M 1, 4096→14336"]["reached"] is False
    assert found["W4A8, M 16, 4096²"]["us"] is None


def test_models_are_compared_with_transformers_on_the_same_work() -> None:
    def row(ours: bool, phase: str, batch: int, how: str, speed: float) -> Row:
        speeds = {"median": speed}
        return {"kind": "tokens", "ours": ours, "phase": phase, "batch": batch, "how": how, "tokens_per_s": speeds}

    rows = [
        row(False, "decode", 1, "eager", 20.0),
        row(False, "decode", 1, "graph, static cache", 50.0),
        row(False, "decode", 16, "eager", 1.0),
        row(True, "decode", 1, "graph", 100.0),
        row(True, "prefill", 1, "eager", 100.0),
        {"kind": "tokens", "ours": True, "phase": "decode", "batch": 1, "reason": "out of memory"},
    ]
    compare(rows)
    assert rows[3]["times_transformers"] == {"eager": 5.0, "graph, static cache": 2.0}
    assert rows[4]["times_transformers"] == {}
    assert "times_transformers" not in rows[5] and "times_transformers" not in rows[0]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def work(clock: Clock, name: str, value: float, seconds: float, took: float, kind: str = "products") -> Work:
    def run() -> list[Row]:
        clock.now += took
        return [{"name": name}]

    return Work(name=name, kind=kind, value=value, seconds=seconds, run=run)


def test_the_most_valuable_come_first_and_what_does_not_fit_is_named() -> None:
    clock = Clock()
    works = [
        work(clock, "last", 9, 5, 5),
        work(clock, "first", 1, 5, 5),
        work(clock, "large", 2, 50, 50),
        work(clock, "second", 3, 5, 5),
    ]
    rows, left_out = run_in_order(works, Budget(12, clock), lambda work, rows: None)
    assert [row["name"] for row in rows] == ["first", "second"]
    assert left_out == ["large", "last"]


def test_a_unit_that_fails_is_a_row_and_the_next_one_runs() -> None:
    clock = Clock()

    def fail() -> list[Row]:
        raise RuntimeError("CUDA error: an illegal memory access")

    works = [Work(name="bad", kind="products", value=0, seconds=1, run=fail), work(clock, "good", 1, 1, 1)]
    rows, _ = run_in_order(works, Budget(10, clock))
    assert rows[0] == {"kind": "failed", "name": "bad", "reason": "RuntimeError: CUDA error: an illegal memory access"}
    assert rows[1] == {"name": "good"}


def test_units_slower_than_expected_are_expected_to_be() -> None:
    clock = Clock()
    works = [work(clock, str(i), i, 1, 4) for i in range(4)] + [work(clock, "other", 9, 2, 1, kind="rows")]
    rows, left_out = run_in_order(works, Budget(11, clock))
    # The third would be over at 12; a kind that nothing is known of is taken at its word.
    assert [row["name"] for row in rows] == ["0", "1", "other"]
    assert left_out == ["2", "3"]


class Context:
    def __init__(self, *given: object) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.at = self.gpu.now

    def elapsed_time(self, other: FakeEvent) -> float:
        return (other.at - self.at) / 1e3


class FakeGraph:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.calls = gpu, list[float]()

    def capture_begin(self) -> None:
        self.gpu.recording = self.calls

    def capture_end(self) -> None:
        self.gpu.recording = None

    def replay(self) -> None:
        self.gpu.now += sum(self.calls)
        self.gpu.replays.append(len(self.calls))


class FakeGpu:
    """Stands in for torch.cuda: a call advances a clock; a graph holds what was called while it was recorded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0  # microseconds
        self.recording: list[float] | None = None
        self.replays: list[int] = []
        monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: FakeEvent(self))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        for name in ("Stream", "stream", "device"):
            monkeypatch.setattr(torch.cuda, name, Context)

    def call(self, microseconds: float) -> None:
        if self.recording is None:
            self.now += microseconds
        else:
            self.recording.append(microseconds)


def test_graphs_are_long_enough_rotate_the_copies_and_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu(monkeypatch)
    copies_used: list[int] = []

    def short(copy: int) -> None:
        copies_used.append(copy)
        gpu.call(2.0)

    def refuse(copy: int) -> None:
        raise ValueError("needs 16 rows")

    timer = GraphTimer(torch.device("cuda"), rounds=4, least=100e-6, most_calls=30)
    calls = {"short": Calls(short, 5), "long": Calls(lambda copy: gpu.call(400.0), 2), "peer": Calls(refuse)}
    found = timer(calls)
    assert found["peer"] == "ValueError: needs 16 rows"
    assert found["short"] == pytest.approx([2e-6] * 4) and found["long"] == pytest.approx([400e-6] * 4)
    # 100 µs would be 11 passes through the five copies; 30 calls are the most. The long one is recorded once.
    assert copies_used == list(range(5)) * 2 + list(range(5)) * 6
    in_rounds = gpu.replays[-15:]
    # An untimed replay, then both; each round begins with another one.
    assert in_rounds == [30, 30, 2, 2, 2, 30, 30, 30, 2, 2, 2, 30, 30, 30, 2]
