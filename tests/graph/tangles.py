"""Random graphs without any plan: operators with odd attributes on whatever values there are: images, rows, tokens, vectors.

Nothing is known about how many operators must remain; that the map stays the same is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from onnx import TensorProto, helper, shape_inference

from tests.graph.nests import Nests, Network, Value

FITS = 4096
"""Elements of a value at most, so that nothing explodes."""


@dataclass
class Tangles(Nests):
    """Keeps every value it wrote, with its shape as onnx infers it."""

    values: list[Value] = field(default_factory=list)

    def sized(self, name: str, *inputs: Value) -> Value | None:
        """The value of the last node, if it is one: onnx decides. Otherwise the node is taken back."""
        node = self.nodes[-1]
        graph = helper.make_graph(
            [item for item in self.nodes if item.op_type == "Constant"] + [node],
            "one",
            [helper.make_tensor_value_info(value.name, self.elem, value.shape) for value in dict.fromkeys(inputs)],
            [helper.make_empty_tensor_value_info(name)],
            [self.stored[given] for given in dict.fromkeys(node.input) if given in self.stored],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)
        try:
            found = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        except shape_inference.InferenceError:
            found = None
        dims = [dim.dim_value for dim in found.graph.output[0].type.tensor_type.shape.dim] if found is not None else [0]
        if min(dims, default=1) < 1 or int(np.prod(dims)) > FITS:
            del self.nodes[-1]
            return None
        return Value(name, tuple(dims))

    def grow(self) -> None:
        """One more node, if it fits."""
        x = self.random.choice(self.values[-6:])
        kinds: list[Callable[[Value], str | None]] = [self.elementwise, self.elementwise, self.pair, self.pair, self.bend]
        if len(x.shape) in (3, 4):
            kinds += [self.any_conv] * 4 + [
                self.any_norm,
                self.any_norm,
                self.any_pool,
                self.any_slice,
                self.any_pad,
                self.turn,
            ]
            kinds += [self.mean, self.left, self.right]
        else:
            kinds += [self.dense_of, self.right, self.any_norm]
        name = self.random.choice(kinds)(x)
        if name is None:
            return
        inputs = [value for value in self.values if value.name in self.nodes[-1].input]
        made = self.sized(name, *inputs)
        if made is not None:
            self.values.append(made)

    def sides(self, rank: int, low: int, high: int) -> list[int]:
        return [self.random.randint(low, high) for _ in range(2 * rank)]

    def any_conv(self, x: Value) -> str:
        rank = len(x.shape) - 2
        groups = self.random.choice([1, 1, x.channels])
        outputs = groups * self.random.randint(1, 3)
        steps = [self.random.choice([1, 1, 1, 2]) for _ in range(rank)]
        kernel = [self.random.choice([1, 1, 2, 3]) for _ in range(rank)]
        kernel = [taps if (taps - 1) * step < size else 1 for taps, step, size in zip(kernel, steps, x.shape[2:], strict=True)]
        inputs = [x.name, self.normal(outputs, x.channels // groups, *kernel) / 3]
        inputs += [self.normal(outputs)] if self.chance(0.4) else []
        attributes: dict[str, Any] = {"group": groups, "dilations": steps}
        attributes |= {"strides": [self.random.randint(1, 2) for _ in range(rank)]} if self.chance(0.4) else {}
        kind = self.random.choice(["", "pads", "pads", "SAME_UPPER", "SAME_LOWER", "VALID"])
        attributes |= {"pads": self.sides(rank, 0, 2)} if kind == "pads" else {"auto_pad": kind} if kind else {}
        return self.node("Conv", inputs, **attributes)

    def any_norm(self, x: Value) -> str:
        return self.norm_of(x).name

    def any_pool(self, x: Value) -> str:
        rank = len(x.shape) - 2
        kernel = [self.random.randint(1, min(3, size)) for size in x.shape[2:]]
        attributes: dict[str, Any] = {"kernel_shape": kernel, "count_include_pad": self.random.randint(0, 1)}
        attributes |= {"strides": [self.random.randint(1, 2) for _ in range(rank)]} if self.chance(0.4) else {}
        if self.chance(0.4):
            attributes["pads"] = [self.random.randint(0, taps // 2) for taps in kernel * 2]
        elif self.opset >= 11:
            attributes["auto_pad"] = self.random.choice(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"])
        return self.node("AveragePool", [x.name], **attributes)

    def any_slice(self, x: Value) -> str | None:
        if self.opset < 10:
            return None
        axes = [self.random.randrange(-len(x.shape), len(x.shape))]
        bounds = [[self.random.choice([0, 1, 0, -3, 2, -99])], [self.random.choice([99, -1, 4, 1 << 40, -2])], axes]
        steps = [self.random.choice([1, 1, 2, 3, -1])]
        return self.node("Slice", [x.name, *(np.array(items, np.int64) for items in (*bounds, steps))])

    def any_pad(self, x: Value) -> str | None:
        if self.opset < 11:
            return None
        rank = len(x.shape) - 2
        first, last = [[0, 0, *self.sides(rank, -1, 2)[:rank]] for _ in range(2)]
        value = self.random.choice([0.0, 0.0, 0.5])
        return self.node("Pad", [x.name, np.array(first + last, np.int64), np.array(value)])

    def turn(self, x: Value) -> str:
        perms = {3: [(0, 2, 1)], 4: [(0, 2, 3, 1), (0, 3, 1, 2), (0, 1, 3, 2)]}
        return self.node("Transpose", [x.name], perm=self.random.choice(perms[len(x.shape)]))

    def mean(self, x: Value) -> str:
        if self.chance(0.5):
            return self.node("GlobalAveragePool", [x.name])
        axes = self.random.choice([list(range(2, len(x.shape))), list(range(1, len(x.shape) - 1))])
        if self.opset >= 18:
            return self.node("ReduceMean", [x.name, np.array(axes)], keepdims=self.random.randint(0, 1))
        return self.node("ReduceMean", [x.name], axes=axes, keepdims=self.random.randint(0, 1))

    def left(self, x: Value) -> str:
        return self.node("MatMul", [self.normal(self.random.randint(1, 6), x.shape[-2]) / 2, x.name])

    def right(self, x: Value) -> str:
        return self.node("MatMul", [x.name, self.normal(x.shape[-1], self.random.randint(1, 6)) / 2])

    def dense_of(self, x: Value) -> str | None:
        if len(x.shape) != 2:
            return None
        outputs, turned = self.random.randint(1, 6), self.random.randint(0, 1)
        shape = (outputs, x.channels) if turned else (x.channels, outputs)
        added = self.random.choice([(outputs,), (1, outputs), (1,), ()])
        return self.node("Gemm", [x.name, self.normal(*shape) / 2, self.normal(*added)], transB=turned, alpha=0.5, beta=2.0)

    def elementwise(self, x: Value) -> str:
        op = self.random.choice(["Mul", "Add", "Sub", "Div", "Neg", "Identity", "Dropout"])
        if op in ("Neg", "Identity", "Dropout"):
            return self.node(op, [x.name])
        shape = self.random.choice([(), (1,), x.shape[1:], x.shape[-1:], (x.shape[1], *(1,) * (len(x.shape) - 2)), (1, 1)])
        constant = self.store(self.normal(*shape) + self.random.choice([-3.0, 3.0]))
        return self.node(op, [x.name, constant] if op == "Div" or self.chance(0.5) else [constant, x.name])

    def pair(self, x: Value) -> str | None:
        """Two values of one shape, now and then of shapes that broadcast."""
        fitting = [value for value in self.values if value.shape == x.shape]
        if self.chance(0.1):
            fitting = [value for value in self.values if len(value.shape) == len(x.shape)]
        other = self.random.choice(fitting)
        return self.node(self.random.choice(["Add", "Sub", "Sum", "Mul"][: 4 if self.chance(0.2) else 3]), [x.name, other.name])

    def bend(self, x: Value) -> str | None:
        return self.node(self.random.choice(["Relu", "Sigmoid", "Abs"]), [x.name]) if self.chance(0.3) else None


def tangle(seed: int) -> Network:
    """The graph of a seed: about a dozen nodes, of which every unused value is an output, and now and then a used one."""
    tangles = Tangles(seed=seed, elem=TensorProto.DOUBLE)
    chosen = tangles.random
    tangles.opset = chosen.choice([10, 11, 13, 17, 18, 21])
    shape: tuple[int, ...] = (chosen.choice([1, 2]), chosen.choice([1, 3, 4]), chosen.choice([4, 7]), chosen.choice([4, 9]))
    shape = shape[: chosen.choice([3, 4, 4, 4])]
    tangles.values.append(Value("x", shape))
    for _ in range(chosen.randint(6, 16)):
        tangles.grow()
    used = {name for node in tangles.nodes for name in node.input}
    outputs = [value for value in tangles.values[1:] if value.name not in used or tangles.chance(0.05)]
    model = tangles.model({"x": shape}, {value.name: value.shape for value in outputs})
    return Network(model, {"x": tangles.normal(*shape)}, None, chosen.random() < 0.5, tangles.remain, ())
