"""An ONNX file of one operator with one weight: what a runtime does with nothing around it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from repdeploy.graph.onnx_source import write_proto

OPSET, IR_VERSION = 13, 8
"""Old enough for every runtime; convolutions and matrix products mean the same since."""


def write_single_node(
    path: Path, operator: str, weight: np.ndarray, x: Sequence[int | str], y: Sequence[int | str], **attributes: Any
) -> Path:
    """y = operator(x, weight) in float32, `x` and `y` being shapes with names where they are open. Returns the path."""
    graph = helper.make_graph(
        [helper.make_node(operator, ["x", "weight"], ["y"], name=operator, **attributes)],
        operator,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, y)],
        [numpy_helper.from_array(weight, "weight")],
    )
    write_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION), path)
    return path
