"""A graph as a torch module, node by node: what torch, on any device, makes of an ONNX file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor, nn

from repdeploy.graph.interpreter import Interpreter, evaluate
from repdeploy.graph.known import Known
from repdeploy.graph.onnx_source import read_onnx
from repdeploy.graph.regions import living


class GraphModule(nn.Module):
    """Inputs by name -> the first output. Weights are buffers, so that it moves like any module.

    Raises InputError as `read_onnx`, CannotInterpret at the first run for an operator that torch cannot run.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        model = read_onnx(path).model
        known = Known(model)
        self._graph, self._interpreter = model.graph, Interpreter(known.opset, torch.float32)
        self._order = living(model.graph, known)
        self._names: dict[ir.Value, str] = {}
        for value in dict.fromkeys(value for node in self._order for value in node.inputs if value is not None):
            if value in known.constants:
                constant = known.constants[value]
                self._names[value] = f"constant{len(self._names)}"
                self.register_buffer(self._names[value], constant.float() if constant.is_floating_point() else constant)

    def forward(self, feeds: Mapping[str, Tensor]) -> Tensor:
        # in whatever it was cast to, as any module
        dtype = next((item.dtype for item in self.buffers() if item.is_floating_point()), torch.float32)
        self._interpreter.dtype = dtype
        constants = {value: self.get_buffer(name) for value, name in self._names.items()}
        fed = {value: feeds[value.name or ""] for value in self._graph.inputs}
        inputs = {value: x.to(dtype) if x.is_floating_point() else x for value, x in fed.items()}
        wanted = self._graph.outputs
        return evaluate(self._interpreter, self._order, {**constants, **inputs}, wanted)[wanted[0]]
