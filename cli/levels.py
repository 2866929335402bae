"""`qtool export --accuracy-level`: which nodes round their activations, by measurement or by an earlier table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qtool.cli.level_options import MAX_ADDED_ERROR, SCHEME, LevelChoice
from qtool.errors import UsageError
from qtool.quantize.artifacts.accuracy_levels import (
    LEVELS_FILE,
    ONE,
    PROMPT,
    LevelTable,
    NodeLevel,
    WithInt8Inputs,
    chosen,
    open_choices,
    read_levels,
)
from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint

if TYPE_CHECKING:
    from qtool.cli.subject import Weights
    from qtool.quantize.inputs import Tokens
    from qtool.quantize.measure.level_errors import AddedError

SEQUENCES, LENGTH = 8, 256
ROUNDS = {ONE: 25, PROMPT: 5}


def choose_levels(
    weights: Weights, choice: LevelChoice, *, threads: int, quiet: bool
) -> tuple[Weights, LevelTable | None]:
    """The weights in the arithmetic that was chosen, which count the text that it was measured on, and the table, which
    is printed unless `quiet`.

    Raises:
        UsageError: nothing to choose, or linears in 8 bits that would have to stay with float activations.
        InputRefused: a table of another checkpoint.
    """
    if choice.source == SCHEME:
        return weights, None
    source = weights.source
    if not isinstance(source, QuantizedCheckpoint) or not open_choices(source):
        why = "chooses for integer weights in groups with 16-bit activations, and there are none"
        remedy = "leave it out, or quantize with --scheme W4A16"
        raise UsageError(f"--accuracy-level {choice.source}", why, remedy)
    if choice.table is not None:
        table = read_levels(choice.table)
    else:
        tokens = _tokens(weights, choice.level_text)
        share = MAX_ADDED_ERROR if choice.max_added_error is None else choice.max_added_error
        table = _measure(source, tokens, share, threads)
    view = chosen(source, table, choice.table or Path("accuracy levels"))
    _refuse_slow(source, table)
    if not quiet:
        print_levels(table)
    windows = tuple(sorted({*weights.calibration_windows, *table.windows}))
    return replace(weights, source=view, calibration_windows=windows), table


def _tokens(weights: Weights, text: Path | None) -> Tokens:
    from qtool.quantize.inputs import builtin_text, read_text, tokenize

    return tokenize(
        weights.tokenizer_files,
        builtin_text("calibration") if text is None else read_text(text),
        sequences=SEQUENCES,
        length=LENGTH,
        vocab_size=weights.source.config["vocab_size"],
    )


def _measure(checkpoint: QuantizedCheckpoint, tokens: Tokens, max_share: float, threads: int) -> LevelTable:
    import onnxruntime as ort

    from qtool.cli.progress import progress
    from qtool.quantize.export.onnx.package import lowered_graph
    from qtool.quantize.measure.level_errors import added_errors
    from qtool.runtime.verification.level_times import level_times

    choices = open_choices(checkpoint)
    # With INT8 everywhere no node is refused; what a level computes has no part in which linears a node holds.
    model, described = lowered_graph(WithInt8Inputs(checkpoint, tuple(choices)))
    with progress("added error") as report:
        errors = added_errors(checkpoint, choices, tokens.ids, progress=report)
    products = {name: node["modules"] for name, node in described.items() if node["op"] == "MatMulNBits"}
    nodes = {}
    with progress("time of both levels") as report:
        for done, (name, modules) in enumerate(products.items()):
            mine = tuple(module for module in modules if module in choices)
            if mine:
                times = level_times(model, name, rounds=ROUNDS, threads=threads)
                nodes[name] = decide(mine, [errors[module] for module in mine], times, max_share)
            report(done + 1, len(products), name)
    measured = {
        "text_sha256": tokens.text_sha256,
        "sequences": SEQUENCES,
        "length": LENGTH,
        "onnxruntime": ort.__version__,
        "threads": threads,
        "rounds": {str(count): rounds for count, rounds in ROUNDS.items()},
    }
    return LevelTable(
        checkpoint=checkpoint.digest, max_share=max_share, measured=measured, windows=tokens.windows, nodes=nodes
    )


def decide(
    modules: tuple[str, ...], errors: list[AddedError], times: Mapping[int, tuple[float, float]], max_share: float
) -> NodeLevel:
    """One node: INT8 where it is faster at one token and its added error stays under the share.

    Args:
        modules: what it computes.
        errors: of each.
        times: tokens → microseconds in float and in INT8.
        max_share: of the weights' error.
    """
    added, weight, energy = (sum(getattr(e, part) for e in errors) for part in ("added", "weights", "energy"))
    share = added / weight if weight > 0 else 0.0 if added == 0 else float(2**31)
    shown = {str(count): tuple(round(time, 1) for time in pair) for count, pair in times.items()}
    slow, fast = shown[str(ONE)]
    faster, small = fast < slow, _rounded(share) <= max_share
    why = "faster, and adds little" if faster and small else "no faster" if small else "adds too much error"
    return NodeLevel(
        modules=modules,
        int8=faster and small,
        why=why,
        added_error=_rounded(added / energy if energy > 0 else 0.0),
        weight_error=_rounded(weight / energy if energy > 0 else 0.0),
        weight_error_from=" and ".join(sorted({error.weights_from for error in errors})),
        share=_rounded(share),
        microseconds=shown,
    )


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _refuse_slow(checkpoint: QuantizedCheckpoint, table: LevelTable) -> None:
    """8-bit weights with float activations are never run: they are unpacked at every call."""
    left = [
        (node.share, module)
        for node in table.nodes.values()
        for module in node.modules
        if not node.int8 and checkpoint.schemes[module].weight.format.bits == 8
    ]
    if left:
        share, module = max(left)
        what = f"{module} ({checkpoint.schemes[module]})"
        why = f"adds {share:.3g} of its weights' error with INT8 activations (limit {table.max_share:g}), as do "
        why += f"{len(left) - 1} more; ONNX Runtime has no fast product of 8-bit weights and float activations"
        raise UsageError(what, why, f"allow it (--max-added-error {share * 1.01:.4g}), or quantize with W8A8 or W4A16")


def record_levels(folder: Path, details: dict[str, Any], table: LevelTable | None) -> None:
    """Put a table, where there is one, into a package's folder and its manifest's details."""
    from qtool.quantize.artifacts.store import write_file

    if table is not None:
        details["accuracy_levels"] = table.to_json()
        write_file(folder / LEVELS_FILE, table.to_bytes())


def print_levels(table: LevelTable) -> None:
    """A row for every role and decision."""
    from qtool.cli.progress import out
    from qtool.cli.progress import table as show

    columns = ["nodes", "", "activations", "why", "error added / weights'", "largest", "1 token, µs", "128, µs"]
    rows = [_row(role, nodes) for role, nodes in _groups(table.nodes)]
    taken = sum(node.int8 for node in table.nodes.values())
    show(f"accuracy levels: {taken} of {len(table.nodes)} nodes with INT8 activations", columns, rows)
    out.print(
        f"error: squared, of a node's output, medians; at most {table.max_share:g} of what rounding the weights did; "
        "times: float → INT8, medians; every node is in accuracy_levels.json, and --accuracy-level "
        "PACKAGE/accuracy_levels.json repeats these bytes",
        markup=False,
    )
    step, prompt = (_total(table, count) for count in (ONE, PROMPT))
    if step is not None and prompt is not None:
        out.print(
            f"nodes with INT8 activations: {step[1] / step[0]:.2f} × their time in float at one token, "
            f"{prompt[1] / prompt[0]:.2f} × at {PROMPT}",
            markup=False,
        )


def _total(table: LevelTable, count: int) -> tuple[float, float] | None:
    """Microseconds of all nodes with INT8 activations, in float and in INT8; None where there are no such nodes."""
    pairs = [node.microseconds[str(count)] for node in table.nodes.values() if node.int8]
    return (sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)) if pairs else None


def _groups(nodes: Mapping[str, NodeLevel]) -> Iterator[tuple[str, list[NodeLevel]]]:
    from qtool.runtime.explain.linears import role_of

    groups: dict[tuple[str, str], list[NodeLevel]] = {}
    for name, node in sorted(nodes.items()):
        role = role_of(name.strip("/").replace("/", ".")).removesuffix(".MatMulNBits").removeprefix("model.")
        groups.setdefault((role, node.why), []).append(node)
    yield from ((role, found) for (role, _), found in groups.items())


def _row(role: str, nodes: list[NodeLevel]) -> list[Any]:
    import statistics

    def times(count: int) -> str:
        pairs = [node.microseconds[str(count)] for node in nodes]
        return " → ".join(f"{statistics.median(pair[i] for pair in pairs):.1f}" for i in (0, 1))

    shares = [node.share for node in nodes]
    level = "INT8" if nodes[0].int8 else "float"
    middle, largest = f"{statistics.median(shares):.3g}", f"{max(shares):.3g}"
    return [role, len(nodes), level, nodes[0].why, middle, largest, times(ONE), times(PROMPT)]
