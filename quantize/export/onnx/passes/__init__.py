"""Graph passes on onnx-ir: one pass a file, each an `ir.passes.InPlacePass` that says whether it changed the model."""
