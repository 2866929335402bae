"""The TensorRT export: one graph of standard operators with dynamic shapes, its types fixed in the file.

forms (which scheme becomes which Q and DQ) → graph (a writer of nodes and constants) → attention, decoder → package,
with the shape profiles and session options that TensorRT needs written beside it.
"""
