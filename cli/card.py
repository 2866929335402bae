"""The model card of a package: the options that add to it, and the facts it is made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from qtool.cli.options import PATH, as_one
from qtool.errors import UsageError

if TYPE_CHECKING:
    from qtool.cli.subject import Weights

# What --target npu makes of a linear in float.
ROUNDED = "W8 per channel, rounded at export"


@dataclass(frozen=True, kw_only=True)
class CardChoice:
    """What the user adds to a card."""

    base_model: str | None = None
    evaluation: Path | None = None


card_options = as_one(
    "card",
    CardChoice,
    click.option("--base-model", metavar="OWNER/NAME", help="The float model on the Hub, for the model card."),
    click.option("--evaluation", type=PATH, help="A report of `qtool evaluate CHECKPOINT -o` for the model card."),
)


def read_evaluation(choice: CardChoice, weights: Weights) -> dict[str, Any] | None:
    """The numbers of the report that the user named.

    Raises:
        UsageError: a base model that is no hub id, or a report of something else than what is exported.
    """
    from qtool.cli.score import summary
    from qtool.quantize.inputs.hub import is_hub_id
    from qtool.runtime.report import EvaluationReport

    if choice.base_model is not None and not is_hub_id(choice.base_model):
        raise UsageError(f"--base-model {choice.base_model}", "is no id on the Hub", "give owner/name")
    if choice.evaluation is None:
        return None
    report = EvaluationReport.read(choice.evaluation)
    if report.subject_digest != weights.source.digest:
        remedy = "score what you export: qtool evaluate CHECKPOINT --reference MODEL -o report.json"
        raise UsageError(choice.evaluation, f"scored something else ({report.subject})", remedy)
    return summary(report)


def write_card(
    folder: Path,
    layout: str,
    details: Mapping[str, Any],
    weights: Weights,
    choice: CardChoice,
    *,
    verification: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
) -> None:
    """Write README.md beside a package's other files, which must all be there."""
    from qtool.quantize.artifacts.checkpoint import QuantizedCheckpoint
    from qtool.quantize.artifacts.store import write_file
    from qtool.quantize.export.model_card import CARD, CardFacts, model_card

    source = weights.source
    schemes: dict[str, str] = {}
    calibration_tokens = [0, 0]
    if isinstance(source, QuantizedCheckpoint):
        schemes = {module: str(scheme) for module, scheme in source.schemes.items()}
        calibration_tokens = source.manifest.details.get("calibration_tokens", calibration_tokens)
    if "npu" in details:
        schemes |= dict.fromkeys(details["npu"]["rounded_at_export"], ROUNDED)
    facts = CardFacts(
        layout=layout,
        details=details,
        schemes=schemes,
        parents=[(parent.kind, parent.digest) for parent in weights.parents],
        size_bytes=sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        verification=verification,
        evaluation=evaluation,
        calibration_tokens=calibration_tokens,
        base_model=choice.base_model,
    )
    write_file(folder / CARD, model_card(facts))
