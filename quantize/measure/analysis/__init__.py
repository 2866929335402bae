"""What statistics of activations mean: pure functions from numbers to findings."""

from qtool.quantize.measure.analysis.analyse import analyse
from qtool.quantize.measure.analysis.findings import Findings

__all__ = ["Findings", "analyse"]
