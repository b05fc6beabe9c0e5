"""A fourth reading of a skeleton: which channels belong together, and which are the same constant everywhere.

A network runs on one image, whose numbers mean nothing and whose channels carry a class and, where it is known, a constant. A
convolution starts new classes; what works channel by channel passes them on; a sum couples the channels of its terms. A class
may leave the network when every convolution that reads one of its channels knows it as a constant (or has no tap for it): the
constant then moves into that convolution's bias. Where padding would show a constant's border, where an operation is not known
here, and at the network's input and output, a class stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from repdeploy.algebra import Conv
from repdeploy.network import Running
from repdeploy.recognise import Plan

POINTWISE = {
    F.relu, torch.relu, F.gelu, torch.sigmoid, F.hardsigmoid, F.hardswish, F.silu, F.relu6, torch.tanh,
    Tensor.relu, Tensor.sigmoid, Tensor.tanh,
}  # fmt: skip
"""Applied to a constant, they give a constant."""
BATCH_AND_CHANNELS = 2


class Classes:
    """Channels that can only leave together (disjoint sets), and those of them that stay."""

    def __init__(self) -> None:
        self._above: list[int] = []
        self._staying: set[int] = set()

    def new(self, count: int) -> Tensor:
        """Channels that nothing is known of: (count,) names."""
        names = torch.arange(len(self._above), len(self._above) + count)
        self._above += names.tolist()
        return names

    def of(self, names: Tensor) -> list[int]:
        """The class of every channel, by one member."""
        return [self._top(name) for name in names.tolist()]

    def couple(self, one: Tensor, other: Tensor) -> None:
        for a, b in zip(one.tolist(), other.tolist(), strict=True):
            self._above[self._top(a)] = self._top(b)

    def keep(self, names: Tensor) -> None:
        self._staying.update(names.tolist())

    def kept(self) -> set[int]:
        return {self._top(name) for name in self._staying}

    def _top(self, name: int) -> int:
        while self._above[name] != name:
            self._above[name] = self._above[self._above[name]]
            name = self._above[name]
        return name


Unit = tuple[str, str]
"""A slot and one of its parts: itself, or a norm around it."""


@dataclass(frozen=True, slots=True)
class Met:
    """A convolution as it was met: its channels on both sides, (in,) and (out,), the constants that come in and go out, NaN
    where there are none; `places`: how many it computes for one image."""

    unit: Unit
    conv: Conv
    inputs: Tensor
    outputs: Tensor
    constants: Tensor
    answers: Tensor
    places: int

    @property
    def is_full(self) -> bool:
        """Whether its outputs are channels of their own: neither depthwise nor one factor per channel."""
        return self.conv.groups == 1 or self.conv.groups != self.conv.in_channels


class Traced(Tensor):
    """An image (batch, channels, ...) with the name and the constant of every channel."""

    classes: Classes
    names: Tensor
    constants: Tensor

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **options)
        images = result if isinstance(result, tuple | list) else (result,)
        sources = [item for item in tree_leaves((args, options)) if isinstance(item, Traced)]
        if not sources or not all(isinstance(image, Tensor) for image in images):
            return result  # a shape, for example
        known = _passed_on(func, args, options, result, sources) if isinstance(result, Tensor) else None
        if known is not None:
            return traced(result, sources[0].classes, *known)
        for source in sources:  # an operation that nothing is known of: no channel that enters or leaves it can go
            source.classes.keep(source.names)
        return _unknown(result, sources[0].classes)


def traced(image: Tensor, classes: Classes, names: Tensor, constants: Tensor) -> Traced:
    result = image.as_subclass(Traced)
    result.classes, result.names, result.constants = classes, names, constants
    return result


def nothing(count: int) -> Tensor:
    """No constant is known of so many channels."""
    return torch.full((count,), torch.nan, dtype=torch.float64)


def _unknown(result: Any, classes: Classes) -> Any:
    if isinstance(result, tuple | list):
        return tuple(_unknown(item, classes) for item in result)
    if result.dim() < BATCH_AND_CHANNELS:
        return result
    names = classes.new(result.shape[1])
    classes.keep(names)
    return traced(result, classes, names, nothing(len(names)))


def _passed_on(
    func: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any], result: Tensor, sources: list[Traced]
) -> tuple[Tensor, Tensor] | None:
    """Names and constants behind an operation; None where it is not known here."""
    x = sources[0]
    if args[0] is not x:
        return None
    if func in POINTWISE and len(sources) == 1:
        return x.names, func(x.constants, *args[1:], **options)
    if func in (F.max_pool2d, torch.max_pool2d) or (func is Tensor.mean and _over_places(args, options, x)):
        return x.names, x.constants
    if func is F.avg_pool2d:
        padding = args[3] if len(args) > 3 else options.get("padding", 0)
        shows = padding not in (0, (0, 0))  # the zeros of the padding are counted
        return x.names, torch.where(x.constants == 0, x.constants, torch.nan) if shows else x.constants
    if func is Tensor.flatten and args[1:] == (1,) and x.dim() > BATCH_AND_CHANNELS:
        places = result.shape[1] // max(len(x.names), 1)
        return x.names.repeat_interleave(places), x.constants.repeat_interleave(places)
    if func is Tensor.__getitem__ and _cuts_places_only(args[1]):
        return x.names, x.constants
    if func in (Tensor.add, Tensor.__add__, torch.add) and _alike(sources, args, options):
        x.classes.couple(x.names, sources[1].names)
        return x.names, x.constants + sources[1].constants
    if func in (Tensor.mul, Tensor.__mul__, torch.mul) and _alike(sources, args, options):
        x.classes.couple(x.names, sources[1].names)
        product = x.constants * sources[1].constants
        return x.names, torch.where((x.constants == 0) | (sources[1].constants == 0), 0.0, product)
    return None


def _over_places(args: tuple[Any, ...], options: dict[str, Any], x: Traced) -> bool:
    dims = args[1] if len(args) > 1 else options.get("dim")
    return isinstance(dims, tuple | list) and x.dim() == 4 and {dim % 4 for dim in dims} <= {2, 3}


def _cuts_places_only(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(part, slice) for part in parts) and all(part == slice(None) for part in parts[:BATCH_AND_CHANNELS])


def _alike(sources: list[Traced], args: tuple[Any, ...], options: dict[str, Any]) -> bool:
    """Whether two images of the same channels meet, and nothing else."""
    return (
        not options
        and len(sources) == len(args) == 2
        and sources[0].dim() == sources[1].dim()
        and len(sources[0].names) == len(sources[1].names)
    )


class Channels(Running):
    """The net that a skeleton sees: every slot's convolutions, one by one.

    `convs`: per unit, what it equals.
    """

    def __init__(self, plan: Plan, convs: Mapping[Unit, Conv]) -> None:
        super().__init__(plan, {})
        self.convs, self.classes = convs, Classes()
        self.met: list[Met] = []

    def read(self, image: tuple[int, int, int]) -> None:
        """Run the skeleton once on that shape."""
        names = self.classes.new(image[0])
        self.classes.keep(names)
        x = traced(torch.zeros(1, *image), self.classes, names, nothing(len(names)))
        result = self.plan.skeleton.forward(self, x)
        assert isinstance(result, Traced)
        self.classes.keep(result.names)

    def at(self, name: str, x: Tensor, **described: object) -> Tensor:
        assert isinstance(x, Traced)
        slot = self.plan.slots[name]
        for part in slot.parts:
            x = self._through((name, part.name), x, slot.on_vector)
        return x

    def _through(self, unit: Unit, x: Traced, on_vector: bool) -> Traced:
        conv = self.convs[unit]
        size = () if on_vector else conv.geometry.output_size(x.shape[2], x.shape[3])
        outputs = self.classes.new(conv.out_channels)
        taps = conv.weight.abs().sum((2, 3)) > 0
        # a constant that a padded convolution reads shows at the border, unless it is zero
        steady = (x.constants == 0) if conv.geometry.is_padded else ~x.constants.isnan()
        if conv.groups == 1:
            self.classes.keep(x.names[~steady & taps.any(0)])
            varies = (taps & ~steady).any(1)
            answers = conv.bias_or_zero() + conv.weight.sum((2, 3)) @ x.constants.nan_to_num()
        elif conv.groups == conv.in_channels:
            behind = conv.out_channels // conv.in_channels
            self.classes.couple(outputs, x.names.repeat_interleave(behind))
            varies = taps[:, 0] & ~steady.repeat_interleave(behind)
            answers = conv.bias_or_zero() + conv.weight.sum((1, 2, 3)) * x.constants.nan_to_num().repeat_interleave(behind)
        else:
            self.classes.keep(x.names)
            self.classes.keep(outputs)
            varies, answers = torch.ones(conv.out_channels, dtype=torch.bool), conv.bias_or_zero()
        answers = torch.where(varies, torch.nan, answers)
        self.met.append(Met(unit, conv, x.names, outputs, x.constants, answers, x.shape[0] * math.prod(size)))
        return traced(torch.zeros(x.shape[0], conv.out_channels, *size), self.classes, outputs, answers)


def dispensable(channels: Channels, allowed: Mapping[Unit, Tensor] | None = None) -> set[int]:
    """The classes that may leave; `allowed`: only those whose channels all come from these outputs (out,) of convolutions."""
    classes = channels.classes
    full = [met for met in channels.met if met.is_full]
    gone = {top for met in full for top in classes.of(met.outputs)} - classes.kept()
    if allowed is not None:
        for met in full:
            rows = allowed[met.unit].tolist() if met.unit in allowed else [False] * met.conv.out_channels
            gone -= {top for top, may in zip(classes.of(met.outputs), rows, strict=True) if not may}
    return gone


def leaving(channels: Channels, free: set[int]) -> set[int]:
    """Those of the classes that may leave which do: every convolution keeps at least one channel on either side."""
    gone = set(free)
    for met in channels.met:
        for names in (met.inputs, met.outputs):
            tops = channels.classes.of(names)
            if all(top in gone for top in tops):
                gone.discard(tops[0])
    return gone


def quiet(met: Met, stays: Tensor) -> Conv:
    """The convolution with nothing but a constant, or zero, on the outputs that may leave: they read no channel any more."""
    if bool(stays.all()):
        return met.conv
    rows, constants = stays.to(met.conv.weight.dtype), met.answers.nan_to_num()
    bias = torch.where(stays, met.conv.bias_or_zero(), constants)
    return replace(met.conv, weight=met.conv.weight * rows.view(-1, 1, 1, 1), bias=bias)


def staying(classes: Classes, names: Tensor, gone: set[int]) -> Tensor:
    """Which of these channels stay: bool, in their order."""
    return torch.tensor([top not in gone for top in classes.of(names)], dtype=torch.bool)


def narrowed(met: Met, inputs: Tensor, outputs: Tensor) -> Conv:
    """The convolution on the channels that stay, with the constants of the others in its bias."""
    conv = met.conv
    if conv.groups > 1 and not met.is_full:
        bias = None if conv.bias is None else conv.bias[outputs]
        return Conv(conv.weight[outputs], bias, conv.stride, conv.pads, conv.dilation, int(inputs.sum()))
    if conv.groups > 1 or (bool(inputs.all()) and bool(outputs.all())):
        return conv
    lost = ~inputs
    moved = conv.weight[:, lost].sum((2, 3)) @ met.constants[lost].nan_to_num()
    bias = conv.bias if not moved.any() else conv.bias_or_zero() + moved
    bias = None if bias is None else bias[outputs]
    return Conv(conv.weight[outputs][:, inputs], bias, conv.stride, conv.pads, conv.dilation, 1)
