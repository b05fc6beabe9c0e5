"""ONNX nodes in torch, one at a time, in a floating type of one's choice: what a graph means, whatever a runtime makes of it.

Every floating type of the file is read as the chosen one, so float64 gives the reference that no CPU runtime offers. Operators
that no table entry covers run through onnx's own reference implementation.
Source: ONNX operator specification (onnx.ai/onnx/operators).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
import torch.nn.functional as F
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from repdeploy.errors import InputError, words
from repdeploy.graph.attributes import Window, axes_of, ints, number, text

Values = tuple[Tensor, ...]
NARROW = {
    "FLOAT16": "float16", "BFLOAT16": "bfloat16", "FLOAT8E4M3FN": "float8_e4m3fn", "FLOAT8E5M2": "float8_e5m2",
}  # fmt: skip
"""Narrower types of ONNX that torch rounds to, by their names there."""
WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32)
"""Types that are quantised to here."""
RANDOM = frozenset({"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"})
"""Operators that mean something else at every run."""


class CannotInterpret(InputError):
    """A node that neither the table nor onnx's reference implementation can run."""


class Interpreter:
    """Runs nodes of one opset. `dtype` stands for every floating type; with `rounds`, a Cast to a narrower one rounds to that
    first, as it must where constants are folded (where an image is cast, the noise would say nothing about a graph)."""

    def __init__(self, opset: int, dtype: torch.dtype = torch.float64, *, rounds: bool = False) -> None:
        self.opset, self.dtype, self.rounds = opset, dtype, rounds

    def tensor(self, array: Any) -> Tensor:
        """A stored array as it is computed with. Raises CannotInterpret for strings."""
        array = np.asarray(array)
        if array.dtype.kind in "OSU":
            raise CannotInterpret("strings are not computed with")
        if array.dtype.kind == "V" or array.dtype.name.startswith(("bfloat", "float")):
            return torch.from_numpy(np.array(array, np.float64)).to(self.dtype)
        try:
            return torch.from_numpy(np.array(array))
        except TypeError as reason:
            raise CannotInterpret(f"torch has no type for {array.dtype}") from reason

    def stored(self, graph: ir.Graph) -> dict[ir.Value, Tensor]:
        """A graph's stored tensors as they are computed with. Raises CannotInterpret as `tensor`."""
        held = ((value, value.const_value) for value in graph.initializers.values())
        return {value: self.tensor(tensor.numpy()) for value, tensor in held if tensor is not None}

    def run(self, node: ir.Node, inputs: Sequence[Tensor | None]) -> Values:
        """The outputs of a node. Raises CannotInterpret."""
        if node.op_type in RANDOM:
            raise CannotInterpret(f"{node.op_type} means something else at every run")
        operator = _OPERATORS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        try:
            if operator is not None:
                result = operator(self, node, *inputs)
                if result is not NotImplemented:
                    return result if isinstance(result, tuple) else (result,)
            return self._reference(node, inputs)
        except CannotInterpret:
            raise
        except Exception as reason:  # whatever torch or onnx.reference say to shapes that do not fit
            raise CannotInterpret(f"{node.op_type} {node.name or ''}: {words(reason, 200)}") from reason

    def _reference(self, node: ir.Node, inputs: Sequence[Tensor | None]) -> Values:
        if any(attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attribute in node.attributes.values()):
            raise CannotInterpret(f"{node.op_type} holds a graph of its own")
        names = [f"i{index}" if value is not None else "" for index, value in enumerate(inputs)]
        proto = ir.to_proto(node)
        del proto.input[:], proto.output[:]
        proto.input.extend(names)
        proto.output.extend(f"o{index}" for index in range(len(node.outputs)))
        feeds = {name: value.numpy() for name, value in zip(names, inputs, strict=True) if value is not None}
        # inside a graph: the evaluator runs a bare node in the newest opset
        fed, given = ([onnx.helper.make_value_info(name, onnx.TypeProto()) for name in side] for side in (feeds, proto.output))
        graph = onnx.helper.make_graph([proto], node.op_type, fed, given)
        outputs = ReferenceEvaluator(graph, opsets={"": self.opset}).run(None, feeds)
        return tuple(self.tensor(output) for output in outputs)


def evaluate(
    interpreter: Interpreter,
    nodes: Iterable[ir.Node],
    known: Mapping[ir.Value, Tensor],
    wanted: Sequence[ir.Value],
    *,
    skip: bool = False,
) -> dict[ir.Value, Tensor]:
    """Run nodes in their order, from known values to the wanted ones. A value is freed after its last use.

    Raises CannotInterpret for the first node that cannot run; with `skip`, what such nodes lead to is left out instead.
    """
    order = list(nodes)
    last_use = {value: index for index, node in enumerate(order) for value in node.inputs if value is not None}
    kept = set(wanted) | known.keys()
    found: dict[ir.Value, Tensor] = {}
    for index, node in enumerate(order):
        if skip and any(value is not None and value not in known and value not in found for value in node.inputs):
            continue
        inputs = [None if value is None else known[value] if value in known else found[value] for value in node.inputs]
        try:
            found.update(zip(node.outputs, interpreter.run(node, inputs), strict=False))
        except CannotInterpret:
            if not skip:
                raise
        for value in node.inputs:
            if value is not None and value not in kept and last_use[value] == index:
                found.pop(value, None)
    return {value: known[value] if value in known else found[value] for value in wanted if value in known or value in found}


def _conv(_: Interpreter, node: ir.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    window = Window.of(node, tuple(weight.shape[2:]), tuple(x.shape[2:]))
    convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[weight.dim() - 2]
    x = F.pad(x, window.torch_pads)
    return convolve(x, weight, bias, window.strides, 0, window.dilations, int(number(node, "group", 1)))


def _conv_transpose(_: Interpreter, node: ir.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    rank = weight.dim() - 2
    if text(node, "auto_pad", "NOTSET") != "NOTSET" or ints(node, "output_shape"):
        return NotImplemented
    strides, dilations = ints(node, "strides") or (1,) * rank, ints(node, "dilations") or (1,) * rank
    pads, extra = ints(node, "pads") or (0,) * 2 * rank, ints(node, "output_padding") or (0,) * rank
    transpose = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[rank]
    full: Tensor = transpose(x, weight, bias, strides, 0, extra, int(number(node, "group", 1)), dilations)
    kept = [slice(a, size - b) for a, b, size in zip(pads[:rank], pads[rank:], full.shape[2:], strict=True)]
    return full[(slice(None), slice(None), *kept)]


def _batch_norm(_: Interpreter, node: ir.Node, x: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor) -> Any:
    if number(node, "training_mode", 0) or len(node.outputs) > 1:
        return NotImplemented
    return F.batch_norm(x, mean, var, gamma, beta, training=False, eps=number(node, "epsilon", 1e-5))


def _average_pool(_: Interpreter, node: ir.Node, x: Tensor) -> Any:
    window = Window.of(node, ints(node, "kernel_shape"), tuple(x.shape[2:]))
    if any(step > 1 for step in window.dilations):
        return NotImplemented
    pool = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[x.dim() - 2]
    if window.ceil:  # onnx's reference divides by the wrong counts there
        rank = x.dim() - 2
        if window.pads[:rank] != window.pads[rank:]:
            raise CannotInterpret("an AveragePool rounds up and pads unevenly")
        counted = bool(number(node, "count_include_pad", 0))
        return pool(x, window.kernel, window.strides, window.pads[:rank], True, counted)
    mean = pool(F.pad(x, window.torch_pads), window.kernel, window.strides)
    if number(node, "count_include_pad", 0) or not any(window.pads):
        return mean
    share = pool(F.pad(torch.ones_like(x[:1, :1]), window.torch_pads), window.kernel, window.strides)
    return mean / share


def _max_pool(_: Interpreter, node: ir.Node, x: Tensor) -> Any:
    window = Window.of(node, ints(node, "kernel_shape"), tuple(x.shape[2:]))
    if window.ceil or len(node.outputs) > 1 or not x.is_floating_point():
        return NotImplemented
    pool = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}[x.dim() - 2]
    return pool(F.pad(x, window.torch_pads, value=-math.inf), window.kernel, window.strides, 0, window.dilations)


def _gemm(_: Interpreter, node: ir.Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.transpose(0, 1) if number(node, "transA", 0) else a
    b = b.transpose(0, 1) if number(node, "transB", 0) else b
    product = number(node, "alpha", 1.0) * (a @ b)
    return product if c is None else product + number(node, "beta", 1.0) * c


def _cast(self: Interpreter, node: ir.Node, x: Tensor) -> Any:
    target = ir.DataType(int(number(node, "to", 0)))
    if target == ir.DataType.STRING:
        return NotImplemented
    if target.is_floating_point():
        narrow = getattr(torch, NARROW.get(target.name, ""), None)
        if self.rounds and narrow is None and target.name not in ("FLOAT", "DOUBLE"):
            raise CannotInterpret(f"nothing here rounds to {target.name}")
        rounded = x.to(torch.float32) if target.name == "FLOAT" else x.to(narrow) if narrow is not None else x
        return (rounded if self.rounds else x).to(self.dtype)
    return x.to(torch.from_numpy(np.empty(0, target.numpy())).dtype)


def _pad(
    self: Interpreter, node: ir.Node, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None,
    axes: Tensor | None = None,
) -> Any:  # fmt: skip
    if text(node, "mode", "constant") != "constant" or not x.is_floating_point():
        return NotImplemented
    amounts = list(ints(node, "pads")) if pads is None else pads.tolist()
    filler = number(node, "value", 0.0) if value is None else float(value)
    chosen = range(x.dim()) if axes is None else [axis % x.dim() for axis in axes.tolist()]
    sides = [0] * (2 * x.dim())
    for position, axis in enumerate(chosen):
        sides[2 * (x.dim() - 1 - axis)] = amounts[position]
        sides[2 * (x.dim() - 1 - axis) + 1] = amounts[position + len(chosen)]
    return F.pad(x, sides, value=filler)


def _resize(self: Interpreter, node: ir.Node, x: Tensor, *others: Tensor | None) -> Any:
    """Nearest and linear interpolation as torch has them; everything else is the reference's."""
    scales = others[1] if len(others) > 1 else others[0] if self.opset < 11 else None
    sizes = others[2] if len(others) > 2 else None
    if node.op_type == "Resize" and ints(node, "axes"):
        return NotImplemented
    if sizes is not None and sizes.numel():
        target = tuple(sizes.tolist())
    elif scales is not None and scales.numel():
        target = tuple(math.floor(size * factor) for size, factor in zip(x.shape, scales.tolist(), strict=True))
        if any(round(size * f) != size * f for size, f in zip(x.shape, scales.tolist(), strict=True)):
            return NotImplemented
    else:
        return NotImplemented
    if x.dim() != 4 or target[:2] != tuple(x.shape[:2]):
        return NotImplemented
    mode, spot = text(node, "mode", "nearest"), text(node, "coordinate_transformation_mode", "half_pixel")
    rounding = text(node, "nearest_mode", "round_prefer_floor")
    if self.opset < 11:
        spot, rounding = "asymmetric", "floor"
    if number(node, "antialias", 0) or text(node, "keep_aspect_ratio_policy", "stretch") != "stretch":
        return NotImplemented
    grows = all(new % old == 0 for new, old in zip(target[2:], x.shape[2:], strict=True))
    centred = spot in ("half_pixel", "pytorch_half_pixel") and rounding.startswith("round")
    if mode == "nearest" and grows and (centred or (spot, rounding) == ("asymmetric", "floor")):
        return F.interpolate(x, size=target[2:], mode="nearest")
    if mode == "linear" and spot in ("half_pixel", "pytorch_half_pixel", "align_corners") and min(target[2:]) > 1:
        return F.interpolate(x, size=target[2:], mode="bilinear", align_corners=spot == "align_corners")
    return NotImplemented


def _clip(_: Interpreter, node: ir.Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    if not x.is_floating_point():
        return x if low is None and high is None else torch.clamp(x, low, high)
    least = number(node, "min", -math.inf) if low is None else low
    most = number(node, "max", math.inf) if high is None else high
    return torch.minimum(torch.maximum(x, torch.as_tensor(least, dtype=x.dtype)), torch.as_tensor(most, dtype=x.dtype))


def _reduce(of: Callable[..., Tensor]) -> Callable[..., Any]:
    def reduce(_: Interpreter, node: ir.Node, x: Tensor, axes: Tensor | None = None) -> Any:
        chosen = axes_of(node, axes)
        if chosen is None:
            if number(node, "noop_with_empty_axes", 0):
                return x
            chosen = tuple(range(x.dim()))
        return of(x, dim=tuple(axis % x.dim() for axis in chosen), keepdim=bool(number(node, "keepdims", 1)))

    return reduce


def _softmax(of: Callable[[Tensor, int], Tensor]) -> Callable[..., Any]:
    def softmax(self: Interpreter, node: ir.Node, x: Tensor) -> Tensor:
        if self.opset >= 13:
            return of(x, int(number(node, "axis", -1)))
        axis = int(number(node, "axis", 1)) % x.dim()
        return of(x.reshape(math.prod(x.shape[:axis]), -1), 1).view_as(x)  # over all axes from there on, in those opsets

    return softmax


def _dropout(_: Interpreter, node: ir.Node, x: Tensor, ratio: Tensor | None = None, mode: Tensor | None = None) -> Any:
    if mode is not None and bool(mode):
        raise CannotInterpret("Dropout means something else at every run (training mode)")
    return NotImplemented if len(node.outputs) > 1 else x


def _layer_norm(_: Interpreter, node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    axis = int(number(node, "axis", -1)) % x.dim()
    if len(node.outputs) > 1 or scale.dim() != x.dim() - axis:
        return NotImplemented
    return F.layer_norm(x, x.shape[axis:], scale, bias, number(node, "epsilon", 1e-5))


def _group_norm(self: Interpreter, node: ir.Node, x: Tensor, scale: Tensor, bias: Tensor) -> Any:
    groups = int(number(node, "num_groups", 1))
    per_channel = x.shape[1] // len(scale)  # opset 18 has one factor per group
    scale, bias = scale.repeat_interleave(per_channel), bias.repeat_interleave(per_channel)
    return F.group_norm(x, groups, scale, bias, number(node, "epsilon", 1e-5))


def _split_to_sequence(_: Interpreter, node: ir.Node, x: Tensor, split: Tensor | None = None) -> Any:
    """A sequence is a list of tensors here."""
    axis = int(number(node, "axis", 0))
    if split is not None:
        return (list(torch.split(x, split.tolist(), axis)),)
    parts = torch.split(x, 1, axis)
    return (list(parts) if number(node, "keepdims", 1) else [part.squeeze(axis) for part in parts],)


def _concat_from_sequence(_: Interpreter, node: ir.Node, sequence: list[Tensor]) -> Tensor:
    axis = int(number(node, "axis", 0))
    return torch.stack(sequence, axis) if number(node, "new_axis", 0) else torch.cat(sequence, axis)


def _quantize(self: Interpreter, node: ir.Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Any:
    """onnx's reference has neither of the two before opset 19."""
    stated = ir.DataType(int(number(node, "output_dtype", 0) or ir.DataType.UINT8))
    kind = zero.dtype if zero is not None else torch.from_numpy(np.empty(0, stated.numpy())).dtype
    if number(node, "block_size", 0) or kind not in WHOLE or not x.is_floating_point():
        return NotImplemented
    limits = torch.iinfo(kind)
    shift = 0 if zero is None else _along(node, zero, x).to(x.dtype)
    return (torch.round(x / _along(node, scale, x)) + shift).clamp(limits.min, limits.max).to(kind)


def _dequantize(self: Interpreter, node: ir.Node, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Any:
    if number(node, "block_size", 0) or x.dtype not in WHOLE:
        return NotImplemented
    shift = 0 if zero is None else _along(node, zero, x).to(self.dtype)
    return (x.to(self.dtype) - shift) * _along(node, scale, x).to(self.dtype)


def _along(node: ir.Node, values: Tensor, x: Tensor) -> Tensor:
    """One value for all, or one per place of the axis."""
    if values.numel() == 1:
        return values.reshape(())
    axis = int(number(node, "axis", 1)) % x.dim()
    return values.reshape(-1, *(1,) * (x.dim() - axis - 1))


def _plain(of: Callable[..., Any]) -> Callable[..., Any]:
    return lambda _, node, *inputs: of(*inputs)


def _division(_: Interpreter, node: ir.Node, a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "AveragePool": _average_pool,
    "MaxPool": _max_pool,
    "GlobalAveragePool": _plain(lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True)),
    "GlobalMaxPool": _plain(lambda x: x.amax(tuple(range(2, x.dim())), keepdim=True)),
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "ReduceMax": _reduce(torch.amax),
    "Gemm": _gemm,
    "MatMul": _plain(torch.matmul),
    "Cast": _cast,
    "CastLike": _plain(lambda x, like: x.to(like.dtype)),
    "Pad": _pad,
    "Resize": _resize,
    "Clip": _clip,
    "Add": _plain(torch.add),
    "Sub": _plain(torch.sub),
    "Mul": _plain(torch.mul),
    "Div": _division,
    "Sum": _plain(lambda *xs: sum(xs[1:], xs[0])),
    "Sqrt": _plain(torch.sqrt),
    "Neg": _plain(torch.neg),
    "Abs": _plain(torch.abs),
    "Exp": _plain(torch.exp),
    "Erf": _plain(torch.erf),
    "Relu": _plain(torch.relu),
    "Gelu": lambda _, node, x: F.gelu(x, approximate=text(node, "approximate", "none")),
    "GroupNormalization": _group_norm,
    "Sigmoid": _plain(torch.sigmoid),
    "Tanh": _plain(torch.tanh),
    "HardSigmoid": lambda _, node, x: (number(node, "alpha", 0.2) * x + number(node, "beta", 0.5)).clamp(0, 1),
    "HardSwish": _plain(lambda x: x * (x / 6 + 0.5).clamp(0, 1)),
    "LeakyRelu": lambda _, node, x: F.leaky_relu(x, number(node, "alpha", 0.01)),
    "PRelu": _plain(lambda x, slope: torch.where(x < 0, x * slope, x)),
    "Softmax": _softmax(torch.softmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "Dropout": _dropout,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "Identity": _plain(lambda x: x),
    "Transpose": lambda _, node, x: x.permute(ints(node, "perm") or tuple(reversed(range(x.dim())))),
    "Flatten": lambda _, node, x: x.reshape(math.prod(x.shape[: int(number(node, "axis", 1))]), -1),
    "Concat": lambda _, node, *xs: torch.cat(xs, int(number(node, "axis", 0))),
    "Where": _plain(torch.where),
    "SplitToSequence": _split_to_sequence,
    "SequenceAt": _plain(lambda sequence, index: sequence[int(index)]),
    "SequenceConstruct": _plain(lambda *parts: (list(parts),)),
    "ConcatFromSequence": _concat_from_sequence,
}
