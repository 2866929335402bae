"""`qtool export --accuracy-level`: measured, recorded, repeated byte for byte, and verified as it ships."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx
import pytest
from click.testing import CliRunner

from qtool.cli.levels import decide
from qtool.errors import InputRefused, UsageError
from qtool.quantize.artifacts.accuracy_levels import LEVELS_FILE, read_levels
from qtool.quantize.measure.level_errors import AddedError
from qtool.runtime.verification import level_times

SLOW, FAST = 100.0, 20.0
PRODUCTS = 2 * 4  # a layer: q, k and v; o; gate and up; down


def qtool(name: str, *arguments: Any) -> str:
    command = import_module(f"qtool.cli.{name}").command
    done = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, write_model: Any) -> Callable[..., Path]:
    """make(scheme, seed=0) -> a checkpoint of a tiny model in groups of 32, the head in float."""
    place = tmp_path_factory.mktemp("levels")

    def checkpoint(scheme: str, seed: int = 0) -> Path:
        path = place / f"{scheme}-{seed}"
        if not path.exists():
            model = write_model(place / f"model-{scheme}-{seed}", "llama", seed=seed)
            options = ("--scheme", scheme, "--group-size", 32, "--quantizer", "rtn", "--ignore", "lm_head")
            qtool("quantize", model, "-o", path, *options, "--threads", 1)
        return path

    return checkpoint


@pytest.fixture(autouse=True)
def steady(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Times that do not wander: INT8 is faster, but for nodes whose name holds what steady(part) was called with."""
    slow_in_int8 = ["nothing"]

    def times(model: Any, name: str, *, rounds: Any, threads: int) -> dict[int, tuple[float, float]]:
        pair = (SLOW, SLOW + 1) if slow_in_int8[0] in name else (SLOW, FAST)
        return {count: (count * pair[0], count * pair[1]) for count in rounds}

    monkeypatch.setattr(level_times, "level_times", times)
    return lambda part: slow_in_int8.__setitem__(0, part)


def levels_of(package: Path) -> dict[str, int]:
    graph = onnx.load(package / "model.onnx", load_external_data=False).graph
    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    return {node.name: next(a.i for a in node.attribute if a.name == "accuracy_level") for node in nodes}


def test_levels_are_chosen_by_node_verified_recorded_and_repeated(
    make: Callable[..., Path], tmp_path: Path, steady: Callable[[str], None]
) -> None:
    checkpoint, first, limited, again = make("W4A16"), *(tmp_path / name for name in ("first", "limited", "again"))
    steady("o_proj")
    measured = ("--accuracy-level", "measured", "--threads", 1)
    qtool("export", checkpoint, "-o", first, *measured, "--max-added-error", 1000, "--no-verify")
    table = read_levels(first / LEVELS_FILE)
    assert len(table.nodes) == PRODUCTS
    assert {name for name, node in table.nodes.items() if not node.int8} == {n for n in table.nodes if "o_proj" in n}
    shares = sorted(node.share for node in table.nodes.values())
    assert 0 < shares[0] < shares[-1] < 1

    limit = shares[PRODUCTS // 2]
    options = (*measured, "--max-added-error", limit, "--json")
    written = json.loads(qtool("export", checkpoint, "-o", limited, *options))
    checks = {check["name"]: check["outcome"] for check in written["verification"]["checks"]}
    assert checks["nodes"] == checks["model"] == checks["decode"] == "pass"
    table = read_levels(limited / LEVELS_FILE)
    reasons = Counter(node.why for node in table.nodes.values())
    assert set(reasons) == {"faster, and adds little", "adds too much error", "no faster"}
    for name, node in table.nodes.items():
        assert node.int8 is (node.share <= limit and "o_proj" not in name)
        assert node.share == pytest.approx(node.added_error / node.weight_error, rel=1e-2)
        assert node.microseconds["1"] == ([SLOW, SLOW + 1] if "o_proj" in name else [SLOW, FAST])
        assert levels_of(limited)[name] == (4 if node.int8 else 1)
    manifest = json.loads((limited / "manifest.json").read_text())
    assert manifest["details"]["accuracy_levels"] == written["accuracy_levels"] == table.to_json()
    assert set(table.windows) <= set(manifest["details"]["calibration_windows"])
    card = (limited / "README.md").read_text()
    rounded = len(table.modules)
    assert f"| linears in W4A8 g32 act per_token_group | {rounded} |" in card
    assert f"| linears in W4A16 g32 | {7 * 2 - rounded} |" in card

    steady("nothing")  # other times, which a table does not ask for
    printed = qtool("export", checkpoint, "-o", again, "--accuracy-level", limited / LEVELS_FILE, "--threads", 1)
    files = {path.relative_to(limited): path.read_bytes() for path in limited.rglob("*") if path.is_file()}
    assert files == {path.relative_to(again): path.read_bytes() for path in again.rglob("*") if path.is_file()}
    assert f"accuracy levels: {reasons['faster, and adds little']} of {PRODUCTS} nodes" in printed
    assert f"INT8 activations: {FAST / SLOW:.2f} × their time in float at one token" in printed
    qtool("verify", again, "--threads", 1)
    assert f"{reasons['faster, and adds little']} of {PRODUCTS} nodes with INT8" in qtool("inspect", again)


def test_the_default_is_the_scheme_and_says_nothing(make: Callable[..., Path], tmp_path: Path) -> None:
    printed = qtool("export", make("W4A16"), "-o", tmp_path / "package", "--no-verify", "--threads", 1)
    assert set(levels_of(tmp_path / "package").values()) == {1}
    assert "accuracy levels" not in printed
    assert not (tmp_path / "package" / LEVELS_FILE).exists()


def test_eight_bits_are_rounded_or_refused_but_never_run_in_float(make: Callable[..., Path], tmp_path: Path) -> None:
    options = ("--accuracy-level", "measured", "--threads", 1)
    with pytest.raises(UsageError, match="no fast product of 8-bit") as caught:
        qtool("export", make("W8A16"), "-o", tmp_path / "package", *options)
    share = str(caught.value).partition("--max-added-error ")[2].partition(")")[0]
    qtool("export", make("W8A16"), "-o", tmp_path / "package", *options, "--max-added-error", share)
    assert set(levels_of(tmp_path / "package").values()) == {4}


def test_a_head_and_linears_that_are_rounded_already_join_in(
    tmp_path: Path, write_model: Any
) -> None:
    """k and v get what q has, and are computed with it in one node; a tied head's rows are looked up as before."""
    recipe = tmp_path / "recipe.yaml"
    rule = "scheme: {}, group_size: 32, quantizer: rtn"
    recipe.write_text(
        f'version: 1\nrules:\n  - {{match: "*", {rule.format("W4A16")}}}\n'
        f'  - {{match: "model.layers.0.self_attn.q_proj", {rule.format("W4A8")}}}\n'
    )
    model, checkpoint, package = write_model(tmp_path / "model", "llama"), tmp_path / "checkpoint", tmp_path / "package"
    qtool("quantize", model, "-o", checkpoint, "--recipe", recipe, "--threads", 1)
    written = json.loads(
        qtool("export", checkpoint, "-o", package, "--accuracy-level", "measured", "--threads", 1, "--json")
    )
    assert written["verification"]["passed"]
    assert len(levels_of(package)) == PRODUCTS + 1
    assert set(levels_of(package).values()) == {4}
    nodes = read_levels(package / LEVELS_FILE).nodes
    attention = "model.layers.0.self_attn"
    first = nodes["/model/layers.0/self_attn/qkv_proj/MatMulNBits"].modules
    assert first == (f"{attention}.k_proj", f"{attention}.v_proj")
    assert nodes["/lm_head/MatMulNBits"].int8


def test_real_times_are_taken_too(make: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    options = ("--accuracy-level", "measured", "--no-verify", "--threads", 1)
    qtool("export", make("W4A16"), "-o", tmp_path / "package", *options)
    table = read_levels(tmp_path / "package" / LEVELS_FILE)
    assert all(time > 0 for node in table.nodes.values() for pair in node.microseconds.values() for time in pair)
    assert table.measured["rounds"] == {"1": 25, "128": 5}


def test_a_table_of_something_else_is_refused(make: Callable[..., Path], tmp_path: Path) -> None:
    options = ("--accuracy-level", "measured", "--no-verify", "--threads", 1)
    qtool("export", make("W4A16"), "-o", tmp_path / "package", *options)
    table, other = tmp_path / "package" / LEVELS_FILE, tmp_path / "other"
    with pytest.raises(InputRefused, match="of another checkpoint"):
        qtool("export", make("W4A16", seed=1), "-o", other, "--accuracy-level", table)
    data = json.loads(table.read_bytes())
    broken = {
        "a node less": {**data, "nodes": dict(list(data["nodes"].items())[1:])},
        "another version": {**data, "schema": 99},
        "one key more": {**data, "more": 1},
        "no decision": {**data, "nodes": {name: {**n, "int8": "yes"} for name, n in data["nodes"].items()}},
        "a time less": {**data, "nodes": {n: {**x, "microseconds": {"1": [2, 1]}} for n, x in data["nodes"].items()}},
        "a list": [data],
    }
    for name, content in broken.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        with pytest.raises(InputRefused, match="measure"):
            qtool("export", make("W4A16"), "-o", other, "--accuracy-level", path)
    with pytest.raises(InputRefused, match="no table"):
        qtool("export", make("W4A16"), "-o", other, "--accuracy-level", tmp_path / "missing.json")
    assert not other.exists()


@pytest.mark.parametrize(
    ("scheme", "options", "why"),
    [
        ("W4A8", ("--accuracy-level", "measured"), "there are none"),
        ("W4A16", ("--max-added-error", 0.1), "add --accuracy-level measured"),
        ("W4A16", ("--level-text", "text.txt"), "add --accuracy-level measured"),
        ("W4A16", ("--accuracy-level", "measured", "--target", "npu"), "--target cpu"),
        ("W4A16", ("--accuracy-level", "measured", "--format", "compressed-tensors"), "--target cpu"),
        ("W4A16", ("--accuracy-level", "measured", "--evaluation", "report.json"), "score the package"),
    ],
)
def test_what_does_not_go_together_is_refused(
    scheme: str, options: tuple[Any, ...], why: str, make: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError) as caught:
        qtool("export", make(scheme), "-o", tmp_path / "package", *options)
    assert why in str(caught.value)
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize(
    ("added", "weights", "fast", "int8", "why"),
    [
        (1.0, 10.0, 50.0, True, "faster, and adds little"),  # just at the limit
        (1.01, 10.0, 50.0, False, "adds too much error"),
        (0.5, 10.0, 100.0, False, "no faster"),
        (5.0, 10.0, 200.0, False, "adds too much error"),
        (0.0, 0.0, 50.0, True, "faster, and adds little"),
        (0.1, 0.0, 50.0, False, "adds too much error"),
    ],
)
def test_decisions(added: float, weights: float, fast: float, int8: bool, why: str) -> None:
    error = AddedError(added=added / 2, weights=weights / 2, energy=1000.0, weights_from="steps")
    node = decide(("a", "b"), [error, error], {1: (100.0, fast), 128: (9.0, 99.0)}, 0.1)
    assert (node.int8, node.why, node.modules) == (int8, why, ("a", "b"))
    assert node.added_error == pytest.approx(added / 2000)
    assert node.microseconds == {"1": (100.0, fast), "128": (9.0, 99.0)}
