"""The NPU export: static-shape graphs, every tensor quantized with constants that are in the file.

model_shape → decoder (a plain float graph, from attention, norm, mlp, rotary) → record (ranges of every tensor, by
running it) → quantized_model (Q and DQ around every node) → package. Nothing in it is dynamic: no shape, no scale.
"""
