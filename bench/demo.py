"""The whole line on a real model: measure, quantize, export, verify, evaluate, run, check. `make demo` runs this.

Every step is a qtool command that you can copy. All files land in .demo/ at the repository root.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from qtool.cli.progress import out, table
from smollm2 import fetch

WORK = Path(__file__).parents[1] / ".demo"
RUN = WORK / "run"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the closing table."""

    name: str
    folder: str
    quantize: tuple[str, ...] | None
    exported: bool = True


VARIANTS = (
    Variant(name="float32", folder="float", quantize=None),
    Variant(name="W8A8", folder="w8a8", quantize=("--scheme", "W8A8", "--quantizer", "rtn", *("--group-size", "64"),
            "--activation", "per_token_group")),
    Variant(name="FP8 (torch reference)", folder="fp8", quantize=("--scheme", "FP8_DYNAMIC", "--sequences", "16"),
            exported=False),
    Variant(name="W4A8 RTN", folder="w4a8-rtn", quantize=("--scheme", "W4A8", "--quantizer", "rtn")),
    Variant(name="W4A8 GPTQ", folder="w4a8-gptq", quantize=("--scheme", "W4A8", "--quantizer", "gptq")),
)  # fmt: skip
SHOWN = VARIANTS[-1]


def qtool(*arguments: str | Path, expect: int = 0) -> None:
    """Run a qtool command, show it, and insist on its exit code."""
    shown = " ".join(f'"{a}"' if " " in str(a) else str(a) for a in arguments)
    out.print(f"\n$ qtool {shown}", style="bold", markup=False)
    command = [sys.executable, "-m", "qtool.cli", *map(str, arguments)]
    code = subprocess.run(command, cwd=RUN, check=False).returncode
    if code != expect:
        sys.exit(f"error: qtool {arguments[0]} ended with exit code {code}, expected {expect}")


def build(variant: Variant, model: Path) -> None:
    """Checkpoint and package of one row."""
    source: str | Path = model
    if variant.quantize is not None:
        source = f"checkpoint-{variant.folder}"
        qtool("quantize", model, "-o", source, *variant.quantize)
    if variant.exported:
        qtool("export", source, "-o", f"package-{variant.folder}")
    subject = f"package-{variant.folder}" if variant.exported else str(source)
    qtool("evaluate", subject, "--reference", model, "-o", f"report-{variant.folder}.json")


def row(variant: Variant) -> list[str]:
    """The closing table's cells, read from the artifacts."""
    from qtool.runtime.ort import OrtSession
    from qtool.runtime.report import EvaluationReport
    from qtool.runtime.throughput import measure_throughput

    report = EvaluationReport.read(RUN / f"report-{variant.folder}.json")
    folder = RUN / f"{'package' if variant.exported else 'checkpoint'}-{variant.folder}"
    manifest = json.loads((folder / "manifest.json").read_text())
    details = manifest["details"]
    bits = details["bits_per_weight"] if variant.exported else details["report"]["bits_per_weight"]
    size = sum(record["size_bytes"] for record in manifest["files"].values())
    speed = ["–", "–"]
    if variant.exported:
        with OrtSession(folder, max_length=640) as session:
            timed = measure_throughput(session, prompt_tokens=512, decode_tokens=64, rounds=3)
        speed = [f"{timed.prefill_tokens_per_s.median:.0f}", f"{timed.decode_tokens_per_s.median:.0f}"]
    assert report.reference is not None
    agreement, kl = f"{100 * report.reference.top1_agreement:.1f} %", f"{report.reference.kl_nats:.4f}"
    return [variant.name, f"{bits:.2f}", f"{size / 1e6:.0f}", f"{report.perplexity:.3f}", kl, agreement, *speed]


def main() -> None:
    started = time.monotonic()
    model = fetch(WORK)
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir()
    qtool("measure", model, "-o", "statistics", "--sequences", "12", "--report", "statistics-report")
    for variant in VARIANTS:
        build(variant, model)
    package = f"package-{SHOWN.folder}"
    qtool("verify", package)
    qtool("run", package, "--prompt", "The three primary colours are", "--max-new-tokens", "40")
    qtool("check", package, "--baseline", "baseline.json", "--update-baseline")
    qtool("check", package, "--baseline", "baseline.json")
    out.print("\nThe gate must also fail: round-to-nearest against the GPTQ baseline is a regression (exit 5).")
    qtool("check", "package-w4a8-rtn", "--baseline", "baseline.json", expect=5)

    columns = ["", "bits per weight", "MB", "perplexity", "KL, nats", "top-1", "prefill tok/s", "decode tok/s"]
    out.print()
    table("SmolLM2-135M-Instruct, built-in scoring text, this machine", columns, [row(v) for v in VARIANTS])
    out.print(
        "The model's weights come from a Q4_1 file: they lie on a 32-wide asymmetric 4-bit grid already, and float32 "
        "here is that 4-bit model. The W4A8 rows are symmetric in groups of 64, which that grid does not favour."
    )
    out.print(f"\n{time.monotonic() - started:.0f} s in all; everything is in {RUN}", markup=False)


if __name__ == "__main__":
    main()
