"""What a node is to the algebra: a linear map of one value, a sum of values, something a pointwise map passes through.

The one table that says which ONNX operators are linear, and under which conditions. A condition that fails is a reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir
import torch
from torch import Tensor

from repdeploy.algebra import AveragePool, Conv, Identity, Linear, Norm, Pad, Scale, Shift
from repdeploy.errors import CannotSqueeze
from repdeploy.graph.attributes import Window, axes_of, ints, number, text
from repdeploy.graph.known import QUANTIZED, Known

Layout = Literal["first", "last"]
"""Where the channels are: (batch, channels, spatial ...) or (batch, ..., channels)."""
CONVOLVED = (ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
BFLOAT16_SINCE = 22
"""The opset since which a Conv takes bfloat16."""
OPEN_END = 1 << 30
"""A Slice that ends here or later ends with the image, however large that is."""


@dataclass(frozen=True, slots=True)
class Unary:
    """output = leaf(input). `nodes`: the operators this covers, where it takes several to write one leaf."""

    input: ir.Value
    layout: Layout
    leaf: Linear
    nodes: tuple[ir.Node, ...]
    bound: bool = False
    """Whether it holds at this image size only, because the size is written into the graph."""


@dataclass(frozen=True, slots=True)
class Sum:
    """output = the sum of `sign` times each input."""

    terms: tuple[tuple[ir.Value, int], ...]


@dataclass(frozen=True, slots=True)
class Through:
    """A node that a pointwise map without padding passes unchanged: after it or before it is the same."""

    input: ir.Value
    kind: Literal["pool", "flatten", "transpose"]
    node: ir.Node


Form = Unary | Sum | Through


@dataclass(slots=True)
class Forms:
    """Every node's forms, and why a linear operator has none."""

    known: Known
    of: dict[ir.Node, tuple[Form, ...]] = field(default_factory=dict)
    refused: dict[ir.Node, str] = field(default_factory=dict)

    def read(self, node: ir.Node) -> tuple[Form, ...]:
        """The forms of a node whose inputs were read before. Constants have none."""
        if node.domain not in ("", "ai.onnx") or all(value in self.known.constants for value in node.outputs):
            return ()
        operator = OPERATORS.get(node.op_type)
        dtype = self.known.dtype(node.outputs[0])
        if operator is None or (dtype is not None and not dtype.is_floating_point()):
            return ()
        try:
            if dtype is None or dtype not in CONVOLVED or (dtype == ir.DataType.BFLOAT16 and self.known.opset < BFLOAT16_SINCE):
                raise CannotSqueeze(f"opset {self.known.opset} has no convolution of its type ({dtype or 'unknown'})")
            self.of[node] = found = tuple(operator(self.known, node))
        except CannotSqueeze as reason:
            self.refused[node] = str(reason)
            return ()
        return found


def channel_axis(layout: Layout, rank: int) -> int:
    return 1 if layout == "first" else rank - 1


def rank_of(known: Known, value: ir.Value) -> int:
    shape = known.shape(value)
    if shape is None:
        raise CannotSqueeze("nothing tells the shape of its input")
    return len(shape)


def channels_of(known: Known, value: ir.Value, layout: Layout) -> int:
    """Raises CannotSqueeze where the number of channels is open."""
    sizes = known.sizes(value)
    found = sizes[channel_axis(layout, len(sizes))] if sizes is not None and len(sizes) > 1 else None
    if not found:
        raise CannotSqueeze("nothing tells how many channels its input has")
    return found


def layouts_of(known: Known, value: ir.Value) -> tuple[Layout, ...]:
    """The layouts it may have: where the channels would be, the size is fixed."""
    rank = rank_of(known, value)
    possible: tuple[Layout, ...] = ("first", "last") if rank in (3, 4) else ("first",) if rank == 2 else ("last",)
    sizes = known.sizes(value) or ()
    return tuple(layout for layout in possible if rank > 1 and sizes[channel_axis(layout, rank)])


def _value(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _dynamic(known: Known, node: ir.Node, index: int = 0) -> ir.Value:
    value = _value(node, index)
    if value is None or value in known.constants:
        raise CannotSqueeze("its input is a constant")
    return value


def _constant(known: Known, node: ir.Node, index: int, what: str) -> Tensor | None:
    """An optional constant input. Raises CannotSqueeze where it is computed from the network's input."""
    value = _value(node, index)
    if value is None:
        return None
    if value not in known.constants:
        producer = value.producer()
        is_quantized = producer is not None and producer.op_type in QUANTIZED
        raise CannotSqueeze(f"its {what} is " + ("quantized" if is_quantized else "computed from the network's input"))
    return known.constants[value]


def _needed(known: Known, node: ir.Node, index: int, what: str) -> Tensor:
    found = _constant(known, node, index, what)
    if found is None:
        raise CannotSqueeze(f"it has no {what}")
    return found


def _spatial(known: Known, value: ir.Value) -> tuple[int | None, ...]:
    sizes = known.sizes(value)
    if sizes is None or len(sizes) not in (3, 4):
        raise CannotSqueeze(
            "nothing tells the shape of its input" if sizes is None else f"its input has {len(sizes)} dimensions, not 3 or 4"
        )
    return sizes[2:]


def _pair(items: tuple[int, ...], filler: int) -> tuple[int, int]:
    """Along one axis as along two: a one-dimensional convolution is one of width 1."""
    return (items[0], items[1]) if len(items) == 2 else (items[0], filler)


def _sides(pads: tuple[int, ...]) -> tuple[int, int, int, int]:
    return (pads[0], pads[1], pads[2], pads[3]) if len(pads) == 4 else (pads[0], 0, pads[1], 0)


def _conv(known: Known, node: ir.Node) -> Iterator[Form]:
    x = _dynamic(known, node)
    weight, bias = _needed(known, node, 1, "kernel"), _constant(known, node, 2, "bias")
    if weight.dim() not in (3, 4):
        raise CannotSqueeze(f"it is a convolution over {weight.dim() - 2} dimensions")
    window = Window.of(node, tuple(weight.shape[2:]), _spatial(known, x))
    kernel = weight if weight.dim() == 4 else weight.unsqueeze(3)
    leaf = Conv(
        kernel, bias, _pair(window.strides, 1), _sides(window.pads), _pair(window.dilations, 1), int(number(node, "group", 1))
    )
    yield Unary(x, "first", leaf, (node,), bound=_is_automatic(node))


def _is_automatic(node: ir.Node) -> bool:
    return text(node, "auto_pad", "NOTSET").startswith("SAME")


def _norm(known: Known, node: ir.Node) -> Iterator[Form]:
    x = _dynamic(known, node)
    if number(node, "training_mode", 0) or len([value for value in node.outputs if value.name]) > 1:
        raise CannotSqueeze("it computes batch statistics (training mode)")
    gamma, beta, mean, var = (_needed(known, node, index, "parameter") for index in range(1, 5))
    yield Unary(x, "first", Norm(mean, var, gamma, beta, number(node, "epsilon", 1e-5)), (node,))


def _average_pool(known: Known, node: ir.Node) -> Iterator[Form]:
    x = _dynamic(known, node)
    window = Window.of(node, ints(node, "kernel_shape"), _spatial(known, x))
    if window.ceil:
        raise CannotSqueeze("its windows run over the edge (ceil_mode), where they average fewer values")
    if any(window.pads) and not number(node, "count_include_pad", 0):
        raise CannotSqueeze("it averages fewer values at the border (count_include_pad is off)")
    if any(step > 1 for step in window.dilations):
        raise CannotSqueeze("its window is dilated")
    like = _like(channels_of(known, x, "first"))
    kernel, strides, pads = _pair(window.kernel, 1), _pair(window.strides, 1), _sides(window.pads)
    leaf: Linear = AveragePool(like, kernel, strides, pads[:2])
    if pads[:2] != pads[2:] or any(2 * side > taps for side, taps in zip(pads, kernel, strict=False)):
        leaf = Pad(torch.zeros_like(like), pads) >> AveragePool(like, kernel, strides)
    yield Unary(x, "first", leaf, (node,), bound=_is_automatic(node) or bool(number(node, "ceil_mode", 0)))


def _like(channels: int) -> Tensor:
    return torch.zeros(channels, dtype=torch.float64)


def _identity(known: Known, node: ir.Node) -> Iterator[Form]:
    x = _dynamic(known, node)
    if node.op_type == "Dropout":
        mode = _constant(known, node, 2, "mode")
        if mode is not None and bool(mode):
            raise CannotSqueeze("it drops values at random (training mode)")
        if len(node.outputs) > 1 and node.outputs[1].uses():
            raise CannotSqueeze("its mask is used")
    for layout in layouts_of(known, x):
        yield Unary(x, layout, Identity(_like(channels_of(known, x, layout))), (node,))


def _pad(known: Known, node: ir.Node) -> Iterator[Form]:
    x, sides, value = padding_of(known, node)
    yield Unary(x, "first", Pad(_like(channels_of(known, x, "first")) + value, _sides(sides)), (node,))


def padding_of(known: Known, node: ir.Node) -> tuple[ir.Value, tuple[int, ...], float]:
    """What a Pad node pads, its spatial pads and its value. Raises CannotSqueeze where it is no border of one value."""
    x = _dynamic(known, node)
    if text(node, "mode", "constant") != "constant":
        raise CannotSqueeze(f"it pads by {text(node, 'mode', 'constant')}, not with one value")
    rank = len(_spatial(known, x)) + 2
    given, filler, axes = (_constant(known, node, index, what) for index, what in ((1, "pads"), (2, "value"), (3, "axes")))
    amounts = ints(node, "pads") if given is None else tuple(int(item) for item in given.tolist())
    chosen = range(rank) if axes is None else [int(axis) % rank for axis in axes.tolist()]
    pads = [0] * (2 * rank)
    for position, axis in enumerate(chosen):
        pads[axis], pads[axis + rank] = amounts[position], amounts[position + len(chosen)]
    if any(pads[axis] for axis in (0, 1, rank, rank + 1)):
        raise CannotSqueeze("it pads the batch or the channels")
    value = number(node, "value", 0.0) if filler is None or not filler.numel() else float(filler)
    return x, (*pads[2:rank], *pads[rank + 2 :]), value


def _slice(known: Known, node: ir.Node) -> Iterator[Form]:
    x = _dynamic(known, node)
    size, rank = _spatial(known, x), rank_of(known, x)
    if len(node.inputs) > 1:
        starts, ends = (_needed(known, node, index, "bounds").tolist() for index in (1, 2))
        axes, steps = (_constant(known, node, index, "axes and steps") for index in (3, 4))
    else:
        starts, ends, axes, steps = list(ints(node, "starts")), list(ints(node, "ends")), None, None
        axes = torch.tensor(ints(node, "axes")) if "axes" in node.attributes else None
    chosen = [int(axis) % rank for axis in axes.tolist()] if axes is not None else list(range(len(starts)))
    strides, crops, bound = [1] * len(size), [0] * (2 * len(size)), False
    for position, axis in enumerate(chosen):
        step = 1 if steps is None else int(steps[position])
        if axis < 2:
            if starts[position] == 0 and ends[position] >= OPEN_END and step == 1:
                continue
            raise CannotSqueeze("it cuts the batch or the channels")
        before, after, depends = _crop(starts[position], ends[position], step, size[axis - 2])
        crops[axis - 2], crops[axis - 2 + len(size)], strides[axis - 2] = -before, -after, step
        bound = bound or depends
    like = _like(channels_of(known, x, "first"))
    leaf: Linear = Pad(like, _sides(tuple(crops)))
    if any(step > 1 for step in strides):
        one = torch.ones_like(like).view(-1, 1, 1, 1)
        leaf = leaf >> Conv(one, stride=_pair(tuple(strides), 1), groups=len(like))
    yield Unary(x, "first", leaf, (node,), bound)


def _crop(start: int, end: int, step: int, size: int | None) -> tuple[int, int, bool]:
    """Rows cut off before and after, and whether that holds at this size only."""
    if step < 1:
        raise CannotSqueeze("it reverses the image")
    if size is None:
        if start < 0 or 0 <= end < OPEN_END:
            raise CannotSqueeze("where it cuts depends on the size of the image, which is open")
        return start, 0 if end >= OPEN_END else -end, False
    first = min(max(start + size if start < 0 else start, 0), size)
    last = min(max(end + size if end < 0 else end, 0), size)
    if last <= first:
        raise CannotSqueeze("it leaves nothing of the image")
    return first, size - last, start < 0 or 0 < end < OPEN_END


def _per_channel(known: Known, x: ir.Value, constant: Tensor, layout: Layout) -> Tensor | None:
    """A constant as one value per channel of x; None where it is something else in this layout."""
    rank, channels = rank_of(known, x), channels_of(known, x, layout)
    if constant.dim() > rank:
        return None
    shape = (1,) * (rank - constant.dim()) + tuple(constant.shape)
    axis = channel_axis(layout, rank)
    if any(size != 1 for position, size in enumerate(shape) if position != axis) or shape[axis] not in (1, channels):
        return None
    return constant.reshape(-1).expand(channels) if constant.numel() == 1 else constant.reshape(-1)


def _elementwise(leaf: Callable[[Tensor, bool], Linear], what: str) -> Callable[[Known, ir.Node], Iterator[Form]]:
    """Of one dynamic and one constant input. `leaf` takes the constant per channel, and whether it came first."""

    def read(known: Known, node: ir.Node) -> Iterator[Form]:
        dynamic = [value for value in node.inputs if value is not None and value not in known.constants]
        if not dynamic:
            raise CannotSqueeze("its inputs are constants")
        if len(dynamic) > 1:
            yield from _sum(known, node, what)
            return
        reversed_ = dynamic[0] is not node.inputs[0]
        constant = _needed(known, node, 0 if reversed_ else 1, what)
        found = False
        for layout in layouts_of(known, dynamic[0]):
            vector = _per_channel(known, dynamic[0], constant, layout)
            if vector is not None:
                found = True
                yield Unary(dynamic[0], layout, leaf(vector, reversed_), (node,))
        if not found:
            raise CannotSqueeze(f"its {what} of shape {tuple(constant.shape)} is not one value per channel")

    return read


def _sum(known: Known, node: ir.Node, what: str) -> Iterator[Form]:
    if node.op_type in ("Mul", "Div"):
        raise CannotSqueeze(f"its {what} is computed from the network's input")
    terms = [
        (value, -1 if node.op_type == "Sub" and index else 1) for index, value in enumerate(node.inputs) if value is not None
    ]
    if any(value in known.constants for value, _ in terms):
        raise CannotSqueeze("it sums constants and values in one operator")
    yield Sum(tuple(terms))


def _divided(constant: Tensor, reversed_: bool) -> Linear:
    if reversed_:
        raise CannotSqueeze("it divides by what the network computes")
    if not bool((constant != 0).all()):
        raise CannotSqueeze("it divides by zero")
    return Scale(1 / constant)


def _subtracted(constant: Tensor, reversed_: bool) -> Linear:
    return Scale(-torch.ones_like(constant)) >> Shift(constant) if reversed_ else Shift(-constant)


def _negated(known: Known, node: ir.Node) -> Iterator[Form]:
    x = _dynamic(known, node)
    for layout in layouts_of(known, x):
        yield Unary(x, layout, Scale(-torch.ones_like(_like(channels_of(known, x, layout)))), (node,))


def _gemm(known: Known, node: ir.Node) -> Iterator[Form]:
    x = _dynamic(known, node)
    matrix, added = _needed(known, node, 1, "matrix"), _constant(known, node, 2, "bias")
    if number(node, "transA", 0):
        raise CannotSqueeze("it transposes its input")
    weight = (matrix if number(node, "transB", 0) else matrix.transpose(0, 1)) * number(node, "alpha", 1.0)
    bias = None
    if added is not None:
        if added.numel() not in (1, weight.shape[0]) or (added.dim() > 1 and added.shape[0] != 1):
            raise CannotSqueeze(f"its bias of shape {tuple(added.shape)} is not one value per output")
        bias = added.reshape(-1).expand(weight.shape[0]) * number(node, "beta", 1.0)
    yield Unary(x, "first", Conv(weight[:, :, None, None], bias), (node,))


def _matmul(known: Known, node: ir.Node) -> Iterator[Form]:
    left, right = node.inputs[0], node.inputs[1]
    assert left is not None
    assert right is not None
    if right in known.constants:
        matrix, x = known.constants[right], left
        rank = rank_of(known, x)
        if matrix.dim() == 2 and rank >= 2:
            yield Unary(x, "first" if rank == 2 else "last", Conv(matrix.transpose(0, 1)[:, :, None, None]), (node,))
            return
    elif left in known.constants:
        matrix, x = known.constants[left], right
        if matrix.dim() == 2 and rank_of(known, x) == 3:
            yield Unary(x, "first", Conv(matrix[:, :, None, None]), (node,))
            return
    else:
        raise CannotSqueeze("both of its matrices are computed from the network's input")
    raise CannotSqueeze(f"its matrix has {matrix.dim()} dimensions and its input {rank_of(known, x)}")


def _pool(known: Known, node: ir.Node) -> Iterator[Form]:
    x = _dynamic(known, node)
    rank = rank_of(known, x)
    if node.op_type == "ReduceMean":
        axes = axes_of(node, _constant(known, node, 1, "axes"))
        if axes is None or {axis % rank for axis in axes} != set(range(2, rank)):
            raise CannotSqueeze("it averages over something else than the image")
    if rank > 2:
        yield Through(x, "pool", node)


def _flatten(known: Known, node: ir.Node) -> Iterator[Form]:
    """(batch, channels, 1, 1) -> (batch, channels); every other change of shape moves values between channels."""
    x = _dynamic(known, node)
    before, after = known.shape(x), known.shape(node.outputs[0])
    if before is None or after is None or len(before) < 3 or len(after) != 2:
        return
    if all(size == 1 for size in before[2:]) and isinstance(before[1], int) and before[1] == after[1]:
        yield Through(x, "flatten", node)  # what is left for the first axis is the batch


def _transpose(known: Known, node: ir.Node) -> Iterator[Form]:
    x = _dynamic(known, node)
    if ints(node, "perm") in TRANSPOSED:
        yield Through(x, "transpose", node)


TRANSPOSED: Mapping[tuple[int, ...], tuple[Layout, ...]] = {
    (0, 2, 3, 1): ("first",),
    (0, 3, 1, 2): ("last",),
    (0, 2, 1): ("first", "last"),
}
"""Permutations that move the channels from one end to the other, and the layouts they do it for."""

PASSED = frozenset({"GlobalAveragePool", "ReduceMean", "Flatten", "Reshape", "Squeeze", "Transpose", "Identity", "Dropout"})
"""Operators that have no linear map of their own to be squeezed: that they stay needs no reason."""
OPERATORS: Mapping[str, Callable[[Known, ir.Node], Iterator[Form]]] = {
    "Conv": _conv,
    "BatchNormalization": _norm,
    "AveragePool": _average_pool,
    "Identity": _identity,
    "Dropout": _identity,
    "Pad": _pad,
    "Slice": _slice,
    "Add": _elementwise(lambda constant, _: Shift(constant), "summand"),
    "Sub": _elementwise(_subtracted, "summand"),
    "Mul": _elementwise(lambda constant, _: Scale(constant), "factor"),
    "Div": _elementwise(_divided, "divisor"),
    "Sum": lambda known, node: _sum(known, node, "summand"),
    "Neg": _negated,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "GlobalAveragePool": _pool,
    "ReduceMean": _pool,
    "Flatten": _flatten,
    "Reshape": _flatten,
    "Squeeze": _flatten,
    "Transpose": _transpose,
}
