"""Measurement: what a model's activations look like before anything is changed."""

from qtool.quantize.measure.measure import measure

__all__ = ["measure"]
