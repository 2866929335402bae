"""Measurement: what a model's activations look like before anything is changed."""

from qtool.quantize.measure.measure import Pass, Text, measure
from qtool.quantize.measure.pass_journal import PassJournal, fingerprint

__all__ = ["Pass", "PassJournal", "Text", "fingerprint", "measure"]
