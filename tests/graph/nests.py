"""Random graphs of linear nests that know, by construction, how many operators must remain when they are squeezed.

A network is a row of stages with something non-linear between them. A stage of one hull (kernel, stride, pads, dilation,
groups) holds one dense convolution of exactly that hull and any number of branches that fit into it: their sum needs no more
operations than that one convolution, so it must become one. Stages that must stay, or of which a part must stay, count for
themselves.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.graph.onnx_graphs import Writer

OPSETS = (9, 10, 11, 12, 13, 15, 17, 18, 21)
END = int(np.iinfo(np.int64).max)
REPORTED: frozenset[str] = frozenset()
"""What the library cannot do yet and is reported: stages and forms that are not drawn. Empty once they are mended."""
SMALLEST = 6
"""Images stay at least this high and wide, so that every branch has an interior."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class Value:
    """A tensor of a graph: its name and its shape, (batch, channels, height, width) or (batch, channels)."""

    name: str
    shape: tuple[int, ...]

    @property
    def channels(self) -> int:
        return self.shape[1]

    @property
    def size(self) -> Pair:
        return self.shape[2], self.shape[3]


@dataclass(frozen=True)
class Hull:
    """The convolution that a stage must become: `kernel` in taps, `dilation` the step between them."""

    inputs: int
    outputs: int
    kernel: Pair
    stride: Pair = (1, 1)
    pads: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def output_size(self, size: Pair) -> Pair:
        height, width = (
            (size[axis] + self.pads[axis] + self.pads[axis + 2] - (self.kernel[axis] - 1) * self.dilation[axis] - 1)
            // self.stride[axis]
            + 1
            for axis in (0, 1)
        )
        return height, width


@dataclass(frozen=True)
class Part:
    """One convolution or pool of a chain: taps and the step between them, per axis, in pixels of its own input."""

    taps: Pair
    step: Pair
    stride: Pair = (1, 1)


@dataclass(frozen=True)
class Network:
    """A graph and what must be true of it once it is squeezed.

    `remain`: operators, "Conv", "BatchNormalization" and "Linear" (Gemm or MatMul), that must be left; `story`: its stages.
    """

    model: onnx.ModelProto
    feeds: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]] | None
    force: bool
    remain: Counter[str]
    story: tuple[str, ...]


@dataclass
class Nests(Writer):
    """Writes random nests. Every random number comes from `seed`."""

    seed: int = 0
    opset: int = 17
    elem: int = TensorProto.DOUBLE
    force: bool = False
    open_batch: bool = False
    open_image: bool = False
    outputs: list[Value] = field(default_factory=list)
    remain: Counter[str] = field(default_factory=Counter)
    story: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(self.opset, self.elem)
        self.random = random.Random(self.seed)
        self.numbers = np.random.default_rng(self.seed)
        self.weights: dict[tuple[int, ...], list[str]] = {}

    # numbers

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def normal(self, *shape: int) -> np.ndarray:
        return self.numbers.standard_normal(shape)

    def constant(self, array: Any, what: str = "constant") -> str:
        """An initializer, or now and then a Constant node."""
        array = np.asarray(array)
        if not self.chance(0.1):
            return self.store(array, self.name(f"stage{len(self.story)}.{what}"))
        if array.dtype.kind == "f":
            array = array.astype(helper.tensor_dtype_to_np_dtype(self.elem))
        return self.node("Constant", [], value=onnx.numpy_helper.from_array(array))

    def weight(self, *shape: int) -> str:
        """A kernel of about unit gain; now and then one that another node has already."""
        known = self.weights.setdefault(shape, [])
        if known and self.chance(0.15):
            return self.random.choice(known)
        known.append(self.constant(self.normal(*shape) / math.sqrt(max(math.prod(shape[1:]), 1)), "weight"))
        return known[-1]

    def per_channel(self, channels: int, array: np.ndarray) -> np.ndarray:
        """One value per channel, or one for all, in any shape that broadcasts over (batch, channels, height, width)."""
        if self.chance(0.25):
            return array[0].reshape(self.random.choice([(), (1,), (1, 1, 1), (1, 1, 1, 1)]))
        return array.reshape(self.random.choice([(channels, 1, 1), (1, channels, 1, 1)]))

    def groups(self, inputs: int, outputs: int, coarse: int) -> int:
        """Any number of groups that the coarse one divides."""
        fitting = [count for count in range(coarse, inputs + 1, coarse) if inputs % count == 0 == outputs % count]
        return self.random.choice(fitting)

    def width(self, coarse: int, least: int = 1) -> int:
        return self.random.choice([width for width in range(coarse, 13, coarse) if width >= least] or [least])

    # single operators

    def conv_of(
        self, x: Value, outputs: int, kernel: Pair = (1, 1), *, stride: Pair = (1, 1), pads: Sequence[int] = (0, 0, 0, 0),
        dilation: Pair = (1, 1), groups: int = 1, bias: bool | None = None,
    ) -> Value:  # fmt: skip
        biased = self.chance(0.5) if bias is None else bias
        inputs = [x.name, self.weight(outputs, x.channels // groups, *kernel)]
        inputs += [self.constant(self.normal(outputs), "bias")] if biased else []
        attributes: dict[str, Any] = {"strides": stride, "pads": pads, "dilations": dilation, "group": groups}
        plain = {"strides": (1, 1), "pads": (0, 0, 0, 0), "dilations": (1, 1), "group": 1}
        given = {name: item for name, item in attributes.items() if tuple(np.ravel(item)) != tuple(np.ravel(plain[name]))}
        given |= {"kernel_shape": kernel} if self.chance(0.7) else {}
        size = Hull(x.channels, outputs, kernel, stride, tuple(pads), dilation).output_size(x.size)  # type: ignore[arg-type]
        return Value(self.node("Conv", inputs, **given), (x.shape[0], outputs, *size))

    def slice_of(self, x: Value, starts: Pair, ends: Pair, steps: Pair = (1, 1)) -> Value:
        """Rows and columns cut off at the start and at the end, in one of the ways to say so."""
        bounds = []
        for axis in (0, 1):
            size = x.size[axis]
            first = self.random.choice([starts[axis], starts[axis] - size][: 1 if self.open_image else 2])
            last = self.random.choice([-ends[axis] if ends[axis] else END, size - ends[axis]][: 1 if self.open_image else 2])
            bounds.append((axis + 2 - self.random.choice([0, 4]), first, last, steps[axis]))
        plain = [cut for cut, start, end in zip(bounds, starts, ends, strict=True) if start or end or cut[3] > 1]
        axes, first, last, step = zip(*(plain or bounds), strict=True)
        size = tuple(-(-(x.size[axis] - starts[axis] - ends[axis]) // steps[axis]) for axis in (0, 1))
        shape = (*x.shape[:2], *size)
        if self.opset < 10:
            assert set(step) == {1}
            axes = [axis % 4 for axis in axes]
            return Value(self.node("Slice", [x.name], starts=first, ends=last, axes=axes), shape)
        inputs = [np.array(items, np.int64) for items in (first, last, axes, step)]
        inputs = inputs[: 3 if set(step) == {1} and self.chance(0.5) else 4]
        return Value(self.node("Slice", [x.name, *inputs]), shape)

    def pad_of(self, x: Value, pads: Sequence[int], value: float = 0.0) -> Value:
        """Pads as for a convolution: top, left, bottom, right."""
        shape = (*x.shape[:2], x.size[0] + pads[0] + pads[2], x.size[1] + pads[1] + pads[3])
        whole = (0, 0, *pads[:2], 0, 0, *pads[2:])
        if self.opset < 11:
            return Value(self.node("Pad", [x.name], pads=whole, value=value), shape)
        inputs: list[Any] = [x.name, np.array(whole, np.int64)]
        if self.opset >= 18 and self.chance(0.5):
            inputs = [x.name, np.array(pads, np.int64), np.array(value, np.float64), np.array([2, -1], np.int64)]
        elif value or self.chance(0.5):
            inputs.append(np.array(value, np.float64))
        return Value(self.node("Pad", inputs), shape)

    def norm_of(self, x: Value) -> Value:
        channels = x.channels
        gamma = self.normal(channels) + self.random.choice([-1.0, 1.0])
        gamma[self.random.randrange(channels)] *= self.random.choice([1.0, -1.0, 1e-3])
        statistics = [gamma, self.normal(channels), self.normal(channels), self.numbers.uniform(0.3, 3.0, channels)]
        names = [self.constant(item, what) for item, what in zip(statistics, ("gamma", "beta", "mean", "var"), strict=True)]
        epsilon = self.random.choice([1e-5, 1e-3, 0.1])
        return replace(x, name=self.node("BatchNormalization", [x.name, *names], epsilon=epsilon))

    def dropout(self, x: Value) -> Value:
        old = self.opset < 12 and "dropout ratio" not in REPORTED
        attributes = {"ratio": 0.3} if old and self.chance(0.5) else {}
        return replace(x, name=self.node("Dropout", [x.name], **attributes))

    def relu(self, x: Value) -> Value:
        """Something non-linear."""
        kind = self.random.choice(["Relu", "Relu", "Sigmoid", "Tanh", "LeakyRelu", "Mul", "Clip"])
        if kind == "Mul":
            return replace(x, name=self.node("Mul", [x.name, self.node("Sigmoid", [x.name])]))
        if kind == "Clip" and self.opset >= 12:
            return replace(x, name=self.node("Clip", [x.name, np.array(-0.5), np.array(2.0)]))
        return replace(x, name=self.node("Relu" if kind == "Clip" else kind, [x.name]))

    def plus(self, a: Value, b: Value) -> Value:
        """a and b, added or subtracted either way."""
        assert a.shape == b.shape, (a, b)
        op, pair = self.random.choice(["Add", "Add", "Sub", "Sum"]), [a.name, b.name]
        return replace(a, name=self.node(op, pair[:: self.random.choice([1, -1])]))

    # pointwise maps

    def point(self, x: Value, shifting: bool) -> Value:
        """One pointwise map of an image; without `shifting` one that leaves zero at zero."""
        kinds = ["scale", "scale", "divide", "negate", "identity", "dropout"]
        kind = self.random.choice(kinds + (["norm", "norm", "norm", "add", "subtract", "from"] if shifting else []))
        if kind == "norm":
            return self.norm_of(x)
        if kind in ("identity", "negate"):
            return replace(x, name=self.node("Identity" if kind == "identity" else "Neg", [x.name]))
        if kind == "dropout":
            return self.dropout(x)
        vector = self.constant(self.per_channel(x.channels, self.normal(x.channels) + 2.5), kind)
        if kind == "divide":
            return replace(x, name=self.node("Div", [x.name, vector]))
        if kind == "from":
            return replace(x, name=self.node("Sub", [vector, x.name]))
        pair = [x.name, vector]
        if kind == "subtract":
            return replace(x, name=self.node("Sub", pair))
        return replace(x, name=self.node("Mul" if kind == "scale" else "Add", pair[:: self.random.choice([1, -1])]))

    def points(self, x: Value, shifting: bool, most: int = 2) -> Value:
        for _ in range(self.random.randint(0, most)):
            x = self.point(x, shifting)
        return x

    # branches that fit into a hull

    def placed(self, hull: Hull, parts: Sequence[Part]) -> tuple[int, ...]:
        """The pads of a chain of parts that lies somewhere on the taps of the hull; negative ones are crops."""
        before, after = [], []
        for axis in (0, 1):
            reach, stride = 0, 1
            for part in parts:
                reach += (part.taps[axis] - 1) * part.step[axis] * stride
                stride *= part.stride[axis]
            free = (hull.kernel[axis] - 1) * hull.dilation[axis] - reach
            offset = self.random.randint(0, free // hull.dilation[axis]) * hull.dilation[axis]
            before.append(hull.pads[axis] - offset)
            after.append(hull.pads[axis + 2] - (free - offset))
        return (*before, *after)

    def padded(self, x: Value, pads: Sequence[int], clean: bool) -> tuple[Value, tuple[int, ...]]:
        """Crops as a Slice, and now and then pads as a Pad: what is left is what the convolution pads."""
        crops = [-min(side, 0) for side in pads]
        left = tuple(max(side, 0) for side in pads)
        if any(crops):
            x = self.slice_of(x, (crops[0], crops[1]), (crops[2], crops[3]))
        assert clean or not any(left)
        if any(left) and self.chance(0.2):
            return self.pad_of(x, left), (0, 0, 0, 0)
        return x, left

    def tail(self, x: Value, cut: tuple[int, ...]) -> Value:
        """Pointwise maps, and the crop of what was padded too far."""
        x = self.points(x, shifting=True, most=1)
        if any(cut):
            x = self.slice_of(x, (cut[0], cut[1]), (cut[2], cut[3]))
        return self.points(x, shifting=True)

    def dense(self, x: Value, hull: Hull) -> Value:
        """The convolution that fills the hull."""
        x, pads = self.padded(x, hull.pads, clean=True)
        x = self.conv_of(
            x, hull.outputs, hull.kernel, stride=hull.stride, pads=pads, dilation=hull.dilation, groups=hull.groups
        )
        return self.points(x, shifting=True)

    def smaller(self, x: Value, hull: Hull, clean: bool) -> Value:
        """One convolution of fewer taps, somewhere in the hull; it may pad too far and crop behind."""
        taps, steps = [], []
        for axis in (0, 1):
            taps.append(self.random.randint(1, hull.kernel[axis]))
            most = (hull.kernel[axis] - 1) // max(taps[axis] - 1, 1)
            steps.append(self.random.randint(1, max(most, 1)) * hull.dilation[axis])
        part = Part((taps[0], taps[1]), (steps[0], steps[1]), hull.stride)
        pads, cut = self.placed(hull, [part]), (0, 0, 0, 0)
        if clean and self.chance(0.2):
            cut = tuple(self.random.randint(0, 1) for _ in range(4))  # type: ignore[assignment]
            pads = tuple(side + more * hull.stride[index % 2] for index, (side, more) in enumerate(zip(pads, cut, strict=True)))
        x, pads = self.padded(x, pads, clean)
        groups = self.groups(hull.inputs, hull.outputs, hull.groups)
        x = self.conv_of(x, hull.outputs, part.taps, stride=hull.stride, pads=pads, dilation=part.step, groups=groups)
        return self.tail(x, cut)

    def chain(self, x: Value, hull: Hull, clean: bool) -> Value:
        """Convolutions and pools in series: only the first one pads."""
        count = self.random.randint(2, 3)
        strides = [[1, 1] for _ in range(count)]
        parts: list[Part] = []
        spare = [(hull.kernel[axis] - 1) * hull.dilation[axis] for axis in (0, 1)]
        for axis in (0, 1):
            strides[self.random.randrange(count)][axis] = hull.stride[axis]
        before = [1, 1]
        for index in range(count):
            taps, steps = [1, 1], [1, 1]
            for axis in (0, 1):
                # the step in pixels of the hull's input has to be a multiple of the hull's dilation
                unit = math.lcm(before[axis], hull.dilation[axis])
                if spare[axis] >= unit and self.chance(0.6):
                    step = unit * self.random.randint(1, spare[axis] // unit)
                    taps[axis] = 1 + self.random.randint(1, spare[axis] // step)
                    steps[axis] = step // before[axis]
                    spare[axis] -= (taps[axis] - 1) * step
                before[axis] *= strides[index][axis]
            parts.append(Part((taps[0], taps[1]), (steps[0], steps[1]), (strides[index][0], strides[index][1])))
        pads = self.placed(hull, parts)
        x, pads = self.padded(x, pads, clean)
        for index, part in enumerate(parts):
            own = pads if index == 0 else (0, 0, 0, 0)
            last = index == count - 1
            pools = part.step == (1, 1) and max(part.taps) > 1 and self.chance(0.4)
            if pools and (not last or x.channels == hull.outputs):
                x = self.pool_of(x, part, own)
            else:
                outputs = hull.outputs if last else self.width(hull.groups)
                groups = self.groups(x.channels, outputs, hull.groups)
                x = self.conv_of(x, outputs, part.taps, stride=part.stride, pads=own, dilation=part.step, groups=groups)
            x = self.points(x, shifting=True, most=1)
        return x

    def pool_of(self, x: Value, part: Part, pads: Sequence[int]) -> Value:
        """Average pooling; a window that pads more than half of itself is a Pad in front."""
        if any(side > part.taps[index % 2] // 2 for index, side in enumerate(pads)):
            x, pads = self.pad_of(x, pads), (0, 0, 0, 0)
        size = Hull(0, 0, part.taps, part.stride, tuple(pads)).output_size(x.size)  # type: ignore[arg-type]
        attributes: dict[str, Any] = {"count_include_pad": 1} if any(pads) or self.chance(0.5) else {}
        attributes |= {"pads": pads} if any(pads) else {}
        name = self.node("AveragePool", [x.name], kernel_shape=part.taps, strides=part.stride, **attributes)
        return Value(name, (*x.shape[:2], *size))

    def skip(self, x: Value, hull: Hull, clean: bool) -> Value:
        """The image itself, where it lies on the hull: shifted, padded and strided as the hull asks."""
        pads = self.placed(hull, [Part((1, 1), (1, 1), hull.stride)])
        if (any(side > 0 for side in pads) and not clean) or (hull.stride != (1, 1) and self.opset < 10):
            return self.smaller(x, hull, clean)
        if any(side > 0 for side in pads):
            x = self.points(x, shifting=False, most=1)
            x = self.pad_of(x, [max(side, 0) for side in pads])
        crops = [-min(side, 0) for side in pads]
        if any(crops) or hull.stride != (1, 1):
            x = self.slice_of(x, (crops[0], crops[1]), (crops[2], crops[3]), hull.stride)
        return self.points(x, shifting=True)

    def branch(self, x: Value, hull: Hull, depth: int, clean: bool = True) -> Value:
        """Any linear map of x that fits into the hull. `clean`: x has zero outside, so that it may be padded."""
        if not any(side > 0 for side in hull.pads) and self.chance(0.3):
            x, clean = self.point(x, shifting=True), False
        kinds = ["smaller", "chain", *(["skip"] if hull.inputs == hull.outputs else [])]
        kinds += ["before", "behind", "parallel", "shared"] if depth else []
        kind = self.random.choice(kinds)
        if kind == "before":
            return self.branch_before(x, hull, depth, clean)
        if kind == "behind":
            middle = self.width(hull.groups)
            x = self.branch(x, replace(hull, outputs=middle), depth - 1, clean)
            x = self.conv_of(x, hull.outputs, groups=self.groups(middle, hull.outputs, hull.groups))
            return self.points(x, shifting=True)
        if kind == "parallel":
            x = self.sum(*(self.branch(x, hull, depth - 1, clean) for _ in range(self.random.randint(2, 3))))
            return self.points(x, shifting=True)
        if kind == "shared":
            middle = self.width(hull.groups)
            x = self.conv_of(x, middle, groups=self.groups(hull.inputs, middle, hull.groups), bias=False)
            x = self.points(x, shifting=False, most=1)
            inner = replace(hull, inputs=middle)
            return self.sum(*(self.branch(x, inner, depth - 1, clean) for _ in range(2)))
        one = {"smaller": self.smaller, "chain": self.chain, "skip": self.skip}[kind]
        return one(x, hull, clean)

    def branch_before(self, x: Value, hull: Hull, depth: int, clean: bool) -> Value:
        """Something in front: an unbiased pointwise map, or padding first, and then anything."""
        middle = self.width(hull.groups)
        pads = any(side > 0 for side in hull.pads)
        if pads and self.chance(0.3):
            # padded once, in front of everything: what follows may shift
            x = self.pad_of(x, [max(side, 0) for side in hull.pads])
            hull = replace(hull, pads=tuple(min(side, 0) for side in hull.pads))  # type: ignore[arg-type]
            pads, clean = False, False
        x = self.conv_of(x, middle, groups=self.groups(hull.inputs, middle, hull.groups), bias=None if not pads else False)
        clean = clean and pads
        x = self.points(x, shifting=not pads, most=1)
        return self.branch(x, replace(hull, inputs=middle), depth - 1, clean)

    def sum(self, *branches: Value) -> Value:
        """Of branches in any order, in any of the ways to write it."""
        left = list(branches)
        self.random.shuffle(left)
        if len(left) > 2 and self.chance(0.3):
            return replace(left[0], name=self.node("Sum", [branch.name for branch in left]))
        total = left.pop()
        while left:
            total = self.plus(total, left.pop())
        return total

    # stages

    def hull(self, x: Value, *, widest: int = 3, groups: int | None = None) -> Hull:
        """A random hull that fits an image and leaves one of some size."""
        inputs = x.channels
        coarse = groups or self.random.choice([1, 1, 1, 2, 4, inputs])
        coarse = math.gcd(coarse, inputs)
        outputs = inputs if self.chance(0.6) else self.width(coarse, 4)
        for _ in range(20):
            kernel, dilation, stride, sides = [], [], [], []
            for axis in (0, 1):
                kernel.append(self.random.choice([1, 2, 3, 3, 3, 5][: 2 * widest]))
                dilation.append(self.random.choice([1, 1, 1, 2]))
                stride.append(self.random.choice([1, 1, 2, 3]) if x.size[axis] >= 2 * SMALLEST else 1)
                reach = (kernel[axis] - 1) * dilation[axis]
                first = self.random.randint(0, reach)
                sides.append((reach // 2, reach - reach // 2) if self.chance(0.5) else (first, self.random.randint(0, reach)))
            pads = (sides[0][0], sides[1][0], sides[0][1], sides[1][1])
            hull = Hull(
                inputs, outputs, (kernel[0], kernel[1]), (stride[0], stride[1]), pads, (dilation[0], dilation[1]), coarse
            )
            if min(hull.output_size(x.size)) >= SMALLEST:
                return hull
        return Hull(inputs, outputs, (1, 1), groups=coarse)

    def nest(self, x: Value) -> Value:
        """One convolution in the end, however deep."""
        self.remain["Conv"] += 1
        if self.chance(0.2):
            x = self.points(x, shifting=False)
        hull = self.hull(x)
        branches = [self.branch(x, hull, depth=2) for _ in range(self.random.randint(1, 3))]
        y = self.points(self.sum(self.dense(x, hull), *branches), shifting=True)
        if self.chance(0.2):  # a narrower map behind it, which costs less than what it stands behind
            wide = math.lcm(hull.groups, self.random.choice([2, 4]))
            if hull.outputs % wide == 0 and hull.outputs > wide:
                y = self.conv_of(y, wide, groups=self.groups(hull.outputs, wide, hull.groups))
        return y

    def consumed(self, x: Value) -> Value:
        """A branch whose own value is read elsewhere as well: that branch stays, and the sum is one without it."""
        self.remain["Conv"] += 2
        hull = self.hull(x)
        branch = self.smaller(x, hull, clean=True)
        if kinds_above(self, branch) == ["Conv"] and self.chance(0.5):
            self.outputs.append(branch)
        else:
            self.outputs.append(replace(branch, name=self.node("Relu", [branch.name])))
        return self.norm_of(self.sum(self.norm_of(self.dense(x, hull)), branch))

    def watched_sum(self, x: Value) -> Value:
        """The sum is read in front of what follows it: one convolution for it; what follows stays what it is."""
        y = self.sum(self.dense(x, hull := self.hull(x)), self.branch(x, hull, depth=1))
        self.outputs.append(replace(y, name=self.node("Relu", [y.name])) if self.chance(0.5) else y)
        self.remain["Conv"] += 1
        if self.chance(0.5):
            self.remain["BatchNormalization"] += 1
            return self.norm_of(y)
        # two norms are one depthwise convolution, which is less than two norms
        self.remain["Conv"] += 1
        return self.norm_of(self.norm_of(y))

    def planted(self, x: Value) -> Value:
        """Something non-linear in one branch: what stands beside it still becomes one convolution."""
        hull = self.hull(x)
        plain = self.sum(self.dense(x, hull), self.branch(x, hull, depth=1))
        bent = self.relu(self.smaller(x, hull, clean=True))
        self.remain["Conv"] += 3
        bent = self.norm_of(self.conv_of(bent, hull.outputs))
        return self.plus(plain, bent)

    def planted_apart(self, x: Value) -> Value:
        """Three branches of which the middle one is bent: nothing can be summed."""
        hull = self.hull(x)
        first, second = self.dense(x, hull), self.smaller(x, hull, clean=True)
        bent = self.relu(self.smaller(x, hull, clean=True))
        self.remain["Conv"] += 3
        if self.chance(0.5):
            return replace(first, name=self.node("Sum", [first.name, bent.name, second.name]))
        return self.plus(self.plus(first, bent), second)

    def residual(self, x: Value) -> Value:
        """x + f(relu(g(x))): the sum stays."""
        self.remain["Conv"] += 2
        middle = self.width(1, 2)
        y = self.relu(self.norm_of(self.conv_of(x, middle, (3, 3), pads=(1, 1, 1, 1))))
        y = self.norm_of(self.conv_of(y, x.channels, (1, 3), pads=(0, 1, 0, 1)))
        return self.plus(x, y)

    def gate(self, x: Value) -> Value:
        """Squeeze and excite: a factor that the network computes is no constant."""
        self.remain["Conv"] += 2
        pooled = Value(self.node("GlobalAveragePool", [x.name]), (*x.shape[:2], 1, 1))
        gate = self.norm_of(self.conv_of(pooled, 2))
        gate = self.conv_of(replace(gate, name=self.node("Relu", [gate.name])), x.channels)
        return replace(x, name=self.node("Mul", [x.name, self.node("Sigmoid", [gate.name])]))

    def narrow(self, x: Value) -> Value:
        """Wide, narrow, wide: one convolution would cost more."""
        self.remain["Conv"] += 1 if self.force else 2
        kernel = self.random.choice([(1, 1), (3, 3)]) if x.channels >= 6 else (3, 3)
        middle = self.conv_of(x, 2, kernel)
        return self.points(self.conv_of(self.norm_of(middle), 12), shifting=True, most=1)

    def separable(self, x: Value) -> Value:
        """Depthwise, then pointwise: one convolution would cost more."""
        self.remain["Conv"] += 1 if self.force else 2
        y = self.conv_of(x, x.channels, (3, 3), pads=(1, 1, 1, 1), groups=x.channels)
        return self.norm_of(self.conv_of(self.points(y, shifting=True), self.width(1, 4)))

    def border(self, x: Value) -> Value:
        """Zero padding behind a biased map: no single convolution has that border."""
        self.remain["Conv"] += 2
        y = self.norm_of(self.conv_of(x, self.width(1, 4), self.random.choice([(1, 1), (3, 1)])))
        return self.norm_of(self.conv_of(y, self.width(1, 4), (3, 3), pads=(1, 1, 1, 1)))

    def cropped(self, x: Value) -> Value:
        """Zero padding behind a crop: the border of the crop is no zero."""
        self.remain["Conv"] += 2
        y = self.slice_of(self.conv_of(x, self.width(1, 4), (1, 1), bias=False), (0, 1), (0, 0))
        return self.norm_of(self.conv_of(y, self.width(1, 4), (3, 3), pads=(1, 1, 1, 1)))

    def uncounted(self, x: Value) -> Value:
        """An average that leaves the padding out is no convolution; one with a wide map behind it would cost more."""
        self.remain["Conv"] += 1
        pads = self.random.choice([(1, 1, 1, 1), (0, 1, 1, 0)])
        size = Hull(0, 0, (3, 3), (1, 1), pads).output_size(x.size)
        pooled = Value(self.node("AveragePool", [x.name], kernel_shape=(3, 3), pads=pads), (*x.shape[:2], *size))
        return self.norm_of(self.conv_of(pooled, self.width(1, 4)))

    def mirrored(self, x: Value) -> Value:
        """A border that mirrors the image is no constant."""
        self.remain["Conv"] += 1
        pads = (0, 0, 1, 1, 0, 0, 1, 1)
        name = (
            self.node("Pad", [x.name], pads=pads, mode="reflect")
            if self.opset < 11
            else self.node("Pad", [x.name, np.array(pads, np.int64)], mode="reflect")
        )
        padded = Value(name, (*x.shape[:2], x.size[0] + 2, x.size[1] + 2))
        return self.norm_of(self.conv_of(padded, self.width(1, 4), (3, 3)))

    def tokens(self, x: Value) -> Value:
        """Channels last and back again, with one matrix or two between: one convolution."""
        self.remain["Conv"] += 1
        batch, channels, height, width = x.shape
        y = self.node("Transpose", [x.name], perm=(0, 2, 3, 1))
        for _ in range(self.random.randint(1, 2)):
            y = self.node("MatMul", [y, self.weight(channels, channels)])
            if self.chance(0.6):
                y = self.node("Add", [y, self.normal(channels)])
        y = self.node("Transpose", [y], perm=(0, 3, 1, 2))
        return self.points(Value(y, (batch, channels, height, width)), shifting=True)

    def mixer(self, x: Value) -> Value:
        """ConvNeXt: depthwise, then channels last through two matrices with something non-linear between."""
        batch, channels, height, width = x.shape
        y = self.conv_of(x, channels, (3, 3), pads=(1, 1, 1, 1), groups=channels)
        self.remain["Conv"] += 1
        y = Value(self.node("Transpose", [y.name], perm=(0, 2, 3, 1)), (batch, height, width, channels))
        first = self.node("Add", [self.node("MatMul", [y.name, self.weight(channels, 6)]), self.normal(6)])
        second = self.node("MatMul", [self.node("Relu", [first]), self.weight(6, channels)])
        second = self.node("Mul", [self.node("Add", [second, self.normal(channels)]), self.normal(channels)])
        # the second matrix, its bias and its scale become a pointwise convolution behind the transposition
        self.remain["Linear"] += 1
        self.remain["Conv"] += 1
        y = Value(self.node("Transpose", [second], perm=(0, 3, 1, 2)), x.shape)
        return self.plus(x, y)

    def stages(self) -> tuple[Callable[[Value], Value], ...]:
        """Every kind of stage, the common ones more often."""
        found = (
            *(self.nest,) * 8, *(self.consumed,) * 2, *(self.watched_sum,) * 2, *(self.planted,) * 2, self.planted_apart,
            self.residual, self.gate, self.narrow, self.separable, self.border, self.cropped, self.uncounted, self.mirrored,
            *(self.tokens,) * 2, self.mixer,
        )  # fmt: skip
        return tuple(stage for stage in found if stage.__name__ not in REPORTED)

    def head(self, x: Value) -> Value:
        """Pooled, flattened, classified: norms and pointwise convolutions on the way become part of the matrix."""
        self.story.append("head")
        self.remain["Linear"] += 1
        classes = self.random.choice([3, 5])
        x = self.points(x, shifting=True)
        if self.chance(0.4):
            x = self.points(self.conv_of(x, 12), shifting=True, most=1)
        pooled = Value(self.pooled(x), (*x.shape[:2], 1, 1))
        if self.chance(0.4):
            pooled = self.points(self.conv_of(pooled, 12), shifting=True, most=1)
        flat = Value(self.flattened(pooled), pooled.shape[:2])
        if self.chance(0.3):
            flat = self.norm_of(flat)
        weight = self.normal(flat.channels, classes) / 3
        if self.chance(0.5):
            gemm = {"transB": 1, "alpha": 0.5} if self.chance(0.5) else {"beta": 1.5}
            matrix = weight.T if "transB" in gemm else weight
            return Value(self.node("Gemm", [flat.name, matrix, self.normal(classes)], **gemm), (x.shape[0], classes))
        product = self.node("MatMul", [flat.name, weight])
        return Value(self.node("Add", [product, self.normal(classes)]), (x.shape[0], classes))

    def pooled(self, x: Value) -> str:
        """Over height and width, in one of three ways."""
        if self.chance(0.5):
            return self.node("GlobalAveragePool", [x.name])
        axes = self.random.choice([[2, 3], [-1, -2]])
        if self.opset >= 18:
            return self.node("ReduceMean", [x.name, np.array(axes, np.int64)])
        return self.node("ReduceMean", [x.name], axes=axes if self.opset >= 11 else [2, 3])

    def flattened(self, x: Value) -> str:
        """(batch, channels, 1, 1) as (batch, channels), in one of three ways."""
        kind = self.random.choice(["Flatten", "Reshape", "Squeeze"])
        if kind == "Flatten":
            return self.node("Flatten", [x.name])
        if kind == "Reshape":
            shape = self.random.choice([(-1, x.channels), (0, -1), (0 if self.open_batch else x.shape[0], -1)])
            return self.node("Reshape", [x.name, np.array(shape, np.int64)])
        if self.opset >= 13:
            return self.node("Squeeze", [x.name, np.array([2, 3], np.int64)])
        if "squeeze axes" in REPORTED:
            return self.node("Flatten", [x.name])
        return self.node("Squeeze", [x.name], axes=[2, 3])


def kinds_above(writer: Writer, value: Value) -> list[str]:
    """The operator that makes a value."""
    return [node.op_type for node in writer.nodes if value.name in node.output]


def network(seed: int, elem: int = TensorProto.DOUBLE) -> Network:
    """The network of a seed: one to three stages, now and then a head, an open batch, or squeezing by force."""
    nests = Nests(seed=seed, elem=elem)
    chosen = nests.random
    nests.opset = chosen.choice(OPSETS)
    nests.force = chosen.random() < 0.2
    nests.open_batch = chosen.random() < 0.2
    nests.open_image = nests.open_batch and chosen.random() < 0.5 and "open image" not in REPORTED
    batch, channels = chosen.choice([1, 2]), chosen.choice([4, 6, 8])
    shape = (batch, channels, chosen.choice([9, 13, 15]), chosen.choice([11, 12, 17]))
    x = Value("x", shape)
    if nests.chance(0.5):
        x = nests.relu(x)
    for _ in range(chosen.choice([1, 1, 2, 2, 3])):
        stage = chosen.choice(nests.stages())
        nests.story.append(stage.__name__)
        x = stage(x)
        x = nests.relu(x)
    if nests.chance(0.25):
        x = nests.head(x)
    nests.outputs.append(x)
    taken = [nests.open_batch, False, nests.open_image, nests.open_image]
    given = [
        name if is_open else size for name, size, is_open in zip(("batch", "", "height", "width"), shape, taken, strict=True)
    ]
    outputs = {value.name: len(value.shape) if nests.open_batch else value.shape for value in nests.outputs}
    model = nests.model({"x": given}, outputs)
    feeds = {"x": nests.normal(*shape).astype(helper.tensor_dtype_to_np_dtype(elem))}
    return Network(model, feeds, {"x": shape} if nests.open_batch else None, nests.force, nests.remain, tuple(nests.story))
