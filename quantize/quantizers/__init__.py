"""From float weights to codes: grids, quantizers, and the block-by-block run over a model."""

from qtool.quantize.quantizers.pipeline import quantize_model
from qtool.quantize.quantizers.report import BitWidthRow, LayerRecord, QuantizationReport
from qtool.quantize.quantizers.table import QUANTIZERS, Quantizer

__all__ = ["QUANTIZERS", "BitWidthRow", "LayerRecord", "QuantizationReport", "Quantizer", "quantize_model"]
