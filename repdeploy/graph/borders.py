"""Borders that a graph writes by hand: a zero Pad whose border is then overwritten, or has an image of constants added to it.

DBB pads a batch norm with the norm's response to zero (BNAndPad, section 3.2); exporters write that as a Pad and four
ScatterND, this project's own networks as a Pad and an Add. Both are one Pad with a value per channel, at the graph's own size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from torch import Tensor

from repdeploy.algebra import Pad, Pads
from repdeploy.errors import CannotSqueeze
from repdeploy.graph.forms import Unary, padding_of
from repdeploy.graph.interpreter import CannotInterpret
from repdeploy.graph.known import FOLDED_AT_MOST, STANDARD, Known


@dataclass(frozen=True, slots=True, eq=False)
class _Patched:
    """A padded image some of whose elements are constants: `mask` (batch, channels, height, width) says which."""

    inner: ir.Value
    pads: Pads
    mask: Tensor
    values: Tensor
    nodes: tuple[ir.Node, ...]
    open_batch: bool

    def as_pad(self) -> Unary | None:
        """The Pad this is, where the constants are the border, all of it, and one value per channel."""
        top, left, bottom, right = self.pads
        height, width = self.mask.shape[2:]
        border = torch.ones_like(self.mask)
        border[:, :, top : height - bottom, left : width - right] = False
        if not torch.equal(border, self.mask):
            return None
        rows = self.values.transpose(0, 1)[border.transpose(0, 1)].view(self.mask.shape[1], -1)
        if not bool((rows == rows[:, :1]).all()):
            return None
        return Unary(self.inner, "first", Pad(rows[:, 0].clone(), self.pads), self.nodes, bound=True)


class Borders:
    """The patched images of one graph, found node by node."""

    def __init__(self, known: Known) -> None:
        self.known = known
        self._patched: dict[ir.Value, _Patched] = {}

    def read(self, node: ir.Node) -> Unary | None:
        """The Pad that a node completes, if it does."""
        if node.op_type == "Pad":
            if node.domain in STANDARD and any(use.node.op_type in ("ScatterND", "Add") for use in node.outputs[0].uses()):
                self._start(node)
            return None
        patched = next((self._patched[value] for value in node.inputs if value in self._patched), None)
        if patched is None or node.domain not in STANDARD:
            return None
        if node.op_type == "ScatterND":
            patched = self._overwritten(node, patched)
        elif node.op_type == "Add":
            patched = self._added(node, patched)
        else:
            return None
        if patched is None:
            return None
        self._patched[node.outputs[0]] = patched
        return patched.as_pad()

    def _start(self, node: ir.Node) -> None:
        """A Pad whose border is constant already."""
        try:
            inner, sides, value = padding_of(self.known, node)
        except CannotSqueeze:
            return
        sizes = self.known.sizes(node.outputs[0])
        if sizes is None or len(sizes) != 4 or min(sides) < 0 or not any(sides):
            return
        # the batch may stay open where an image of constants is added, which is broadcast over it
        shape = [size if size is not None else 1 if axis == 0 else 0 for axis, size in enumerate(sizes)]
        elements = torch.Size(shape).numel()
        if not 0 < elements <= FOLDED_AT_MOST:
            return
        pads = (sides[0], sides[1], sides[2], sides[3])
        mask = torch.ones(shape, dtype=torch.bool)
        mask[:, :, pads[0] : shape[2] - pads[2], pads[1] : shape[3] - pads[3]] = False
        values = torch.zeros(shape, dtype=torch.float64)
        filled = values.masked_fill(mask, value)
        self._patched[node.outputs[0]] = _Patched(inner, pads, mask, filled, (node,), open_batch=sizes[0] is None)

    def _overwritten(self, node: ir.Node, patched: _Patched) -> _Patched | None:
        known, (data, indices, updates) = self.known.constants, node.inputs[:3]
        if data not in self._patched or indices not in known or updates not in known:
            return None
        if patched.open_batch:  # it writes into the images that it names, not into all
            return None
        if any(item.value != "none" for name, item in node.attributes.items() if name == "reduction"):
            return None
        run = self.known.interpreter.run
        try:
            (values,) = run(node, [patched.values, known[indices], known[updates]])
            ones = torch.ones_like(known[updates], dtype=torch.float64)
            (mask,) = run(node, [patched.mask.double(), known[indices], ones])
        except CannotInterpret:
            return None
        return replace(patched, mask=mask.bool(), values=values, nodes=(*patched.nodes, node))

    def _added(self, node: ir.Node, patched: _Patched) -> _Patched | None:
        image = next((self.known.constants[value] for value in node.inputs if value in self.known.constants), None)
        if image is None:
            return None
        try:
            image = torch.broadcast_to(image, patched.mask.shape)
        except RuntimeError:  # an image of another size
            return None
        if bool((image.masked_fill(patched.mask, 0.0) != 0).any()):
            return None
        return replace(patched, values=patched.values + image, nodes=(*patched.nodes, node))
