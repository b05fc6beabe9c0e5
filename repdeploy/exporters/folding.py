"""The squeezer as the optimising pass of an export: norms and scales that no block takes in fold where that is exact."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir

from repdeploy.graph.squeezer import squeeze


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same network, squeezed. Raises VerificationFailed where a region is not its convolution."""
    graph = ir.from_proto(model)
    squeeze(graph)
    return ir.to_proto(graph)


def norms_in(path: Path) -> tuple[str, ...]:
    """The batch norms of a written graph, by the module that their tensors are of."""
    model = onnx.load(path, load_external_data=False)
    return tuple(node.input[1].rpartition(".")[0] for node in model.graph.node if node.op_type == "BatchNormalization")
