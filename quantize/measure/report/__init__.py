"""The report of a measurement: a page to look at, figures for slides, a section for a model card, and plain JSON."""

from qtool.quantize.measure.report.as_json import findings_json
from qtool.quantize.measure.report.tables import terminal_tables
from qtool.quantize.measure.report.write import write_report

__all__ = ["findings_json", "terminal_tables", "write_report"]
