"""A recognised network as a torch module: the skeleton over training-time expressions, or over fused convolutions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repdeploy.algebra import Conv, Linear, fixed
from repdeploy.errors import CannotSqueeze
from repdeploy.facts import Facts
from repdeploy.family import Read
from repdeploy.recognise import Plan


class ExpressionLayer(nn.Module):
    """A block run literally, branch by branch. Its tensors are buffers, so that it moves and exports like any module."""

    def __init__(self, expression: Linear) -> None:
        super().__init__()
        self._names = []
        for path, tensor in expression.tensors():
            self._names.append(path.replace(".", "_"))
            self.register_buffer(self._names[-1], tensor)
        self._expression, self._first = expression, self._buffers[self._names[0]]

    def forward(self, x: Tensor) -> Tensor:
        if self._buffers[self._names[0]] is not self._first:  # moved, cast, or traced: the expression follows its buffers
            current = iter([self.get_buffer(name) for name in self._names])
            self._expression = self._expression.map(lambda _: next(current))
            self._first = self._buffers[self._names[0]]
        return self._expression.run(x)


class ConvLayer(nn.Module):
    """One convolution with a zero border."""

    def __init__(self, conv: Conv) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", conv.weight)
        self.register_buffer("bias", conv.bias)
        self._geometry = conv.stride, conv.pads, conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        stride, pads, dilation, groups = self._geometry
        return Conv(self.weight, self.bias, stride, pads, dilation, groups).run(x)


class VectorLayer(nn.Module):
    """An expression on vectors, run as on maps of one pixel: (batch, in) -> (batch, out)."""

    def __init__(self, expression: Linear) -> None:
        super().__init__()
        self.on_map = ExpressionLayer(expression)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.on_map(x[..., None, None])
        return result.flatten(1)


class LinearLayer(nn.Module):
    """A fully connected layer: (batch, in) -> (batch, out)."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Network(nn.Module):
    """x (batch, channels, height, width) -> the skeleton's output. Buffers carry the dotted names of the deploy layout."""

    def __init__(self, plan: Plan, layers: Mapping[str, tuple[str, nn.Module]]) -> None:
        """`layers`: per slot, the dotted name its tensors go by, and the layer."""
        super().__init__()
        self.plan = plan
        for path, layer in layers.values():
            _place(self, path, layer)
        self._net = Running(plan, {slot: layer for slot, (_, layer) in layers.items()})

    def forward(self, x: Tensor) -> Tensor:
        return self.plan.skeleton.forward(self._net, x)

    def outputs_by_slot(self, x: Tensor) -> dict[str, Tensor]:
        """Every slot's output on the way, in order: to name the first block that differs."""
        seen: dict[str, Tensor] = {}
        self.plan.skeleton.forward(Running(self.plan, self._net.layers, seen), x)
        return seen


class Running:
    """The net that a skeleton sees when the network runs."""

    def __init__(self, plan: Plan, layers: Mapping[str, nn.Module], seen: dict[str, Tensor] | None = None) -> None:
        self.plan, self.layers, self.seen = plan, layers, seen

    def at(self, name: str, x: Tensor, **described: object) -> Tensor:
        """What a skeleton says of a slot is in its layer already."""
        result: Tensor = self.layers[name](x)
        if self.seen is not None:
            self.seen[name] = result
        return result

    def norm(self, name: str, x: Tensor, *, why: str) -> Tensor:
        return self.at(name, x)

    def linear(self, name: str, x: Tensor, *, before: str | None = None) -> Tensor:
        return self.at(name, x)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.plan.keys.shapes[name]

    def fact(self, name: str, convention: Any, **described: object) -> Any:
        return self.plan.facts[name]

    def __contains__(self, name: str) -> bool:
        return name in self.plan.keys

    def children(self, name: str, prefix: str = "") -> tuple[str, ...]:
        return self.plan.keys.children(name, prefix)

    def drop(self, name: str, reason: str) -> None:
        pass

    def pooled(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True, slots=True)
class Description:
    """A recognised network over its tensors, in float64: an expression per slot."""

    plan: Plan
    expressions: Mapping[str, Linear]

    def network(self, *, squeezed: bool, dtype: torch.dtype, static: bool = False) -> Network:
        """`squeezed`: one convolution per slot (a norm that stands alone stays one), else its expression; `static`: with
        generated kernels computed once, for a graph to be exported.

        Raises CannotSqueeze.
        """
        layers: dict[str, tuple[str, nn.Module]] = {}
        for name, expression in self.expressions.items():
            if squeezed or isinstance(expression, Conv):
                conv = squeeze(name, expression)
            slot = self.plan.slots[name]
            if (squeezed and name not in self.plan.norms) or isinstance(expression, Conv):
                conv = conv.map(lambda tensor: tensor.to(dtype))
                fused = LinearLayer(conv.weight.flatten(1), conv.bias) if slot.on_vector else ConvLayer(conv)
                layers[name] = slot.deploy_module, fused
            else:
                literal = (fixed(expression) if static else expression).map(lambda tensor: tensor.to(dtype))
                layers[name] = name, VectorLayer(literal) if slot.on_vector else ExpressionLayer(literal)
        return Network(self.plan, layers).eval()


def squeeze(name: str, expression: Linear) -> Conv:
    """The convolution of a block, to be deployed. Raises CannotSqueeze with the block's name."""
    try:
        return expression.squeeze().zero_filled()
    except CannotSqueeze as reason:
        raise CannotSqueeze(f"block {name or '(the whole file)'}: {reason}", hint=reason.hint) from reason


def describe(plan: Plan, read: Read, facts: Facts, silenced: Mapping[str, Tensor] = MappingProxyType({})) -> Description:
    """Every slot over the tensors that `read` gives in float64; training-time and deploy files alike.

    `silenced`: per slot, which of its outputs (out,) count as zero.
    """
    slots = plan.slots.items()
    return Description(plan, {name: slot.describe_whole(read, facts, plan.keys, silenced.get(name)) for name, slot in slots})


def _place(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Register a layer under a dotted name, making the levels between."""
    *parents, last = path.split(".") if path else ["block"]
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    if isinstance(getattr(root, last, None), nn.Module):
        for name, child in getattr(root, last).named_children():
            layer.add_module(name, child)
    root.add_module(last, layer)


def sample_images(shape: Iterable[int], seed: int) -> Tensor:
    """Structured images in float32: offsets, waves and noise, so that neither a constant nor a symmetry hides a mistake."""
    batch, channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, channels, height, width, generator=generator)
    rows = torch.linspace(0, 1, height).view(1, 1, -1, 1)
    columns = torch.linspace(0, 1, width).view(1, 1, 1, -1)
    waves = torch.rand(batch, channels, 1, 1, generator=generator) * 12
    offset = torch.randn(batch, channels, 1, 1, generator=generator) * 0.5
    return (noise * 0.7 + torch.sin(waves * rows + 3 * waves * columns) + offset).contiguous()
