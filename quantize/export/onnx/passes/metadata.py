"""Where the file comes from, inside the file: producer and metadata_props. No time, no path, no host."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

import qtool


class Metadata(ir.passes.InPlacePass):
    """Set the producer and replace all metadata; what the front end left on nodes and values is cleared.

    Args:
        properties: metadata_props, keys as they appear in the file ("qtool.source", …).
    """

    def __init__(self, properties: Mapping[str, str]) -> None:
        super().__init__()
        self._properties = dict(sorted(properties.items()))

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """See the class."""
        for value in model.graph.initializers.values():
            value.metadata_props.clear()
        for node in model.graph:
            node.metadata_props.clear()
            node.doc_string = None
            for output in node.outputs:
                output.metadata_props.clear()
        model.producer_name, model.producer_version = "qtool", qtool.__version__
        model.doc_string, model.graph.doc_string, model.graph.name = None, None, "model"
        model.graph.metadata_props.clear()
        model.metadata_props.clear()
        model.metadata_props.update(self._properties)
        return ir.passes.PassResult(model, True)
