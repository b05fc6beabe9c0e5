"""What a plugin provides: the blocks of a family as expressions, its deploy names, and the networks it occurs in.

A family file reads like its paper's figure: each `BlockKind` says by which key a block is found, what it is made of,
and under which name the official deploy model keeps the fused convolution. Nothing else is needed to fuse, prove,
export or benchmark it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from repdeploy.algebra import Conv, Identity, Linear, Norm
from repdeploy.errors import InputError
from repdeploy.facts import FactKind, Facts
from repdeploy.keys import Keys, join
from repdeploy.records import Origin
from repdeploy.skeletons import Skeleton

NORM_EPS = 1e-5
"""A checkpoint does not store eps; this is torch's default, and every report states the value used."""


@dataclass(frozen=True, slots=True)
class BlockKind:
    """One key layout of one block.

    `anchor`: one such key, one block. `deploys_as`: where the fused convolution's weight and bias go, "" for the block's
    own name. `describe`: the block as an expression. `inputs`: its input channels where the tensors tell them.
    """

    anchor: str
    deploys_as: str
    describe: Callable[[Block], Linear]
    inputs: Callable[[Block], int | None] = lambda block: None


@dataclass(frozen=True, slots=True)
class Architecture:
    """An official variant: blocks and widths per stage, stem included; the largest group count; facts it settles."""

    depths: tuple[int, ...]
    widths: tuple[int, ...]
    groups: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Family:
    """`title`: the block as the paper writes it; `source`: where; `facts`: what only this family needs to be told."""

    name: str
    title: str
    source: str
    kinds: tuple[BlockKind, ...]
    skeletons: tuple[Skeleton, ...] = ()
    architectures: Mapping[str, Architecture] = field(default_factory=dict)
    facts: tuple[FactKind, ...] = ()


class Block:
    """The tensors under one prefix, seen by a description: parts by name, geometry as facts, all numbers in float64.

    Raises InputError where a part is missing, not finite, or contradicts the others.
    """

    def __init__(
        self,
        name: str,
        kind: BlockKind,
        keys: Keys,
        read: Callable[[str], Tensor],
        facts: Facts,
        *,
        in_channels: int | None = None,
        stride: int = 1,
        origin: Origin = "skeleton",
    ) -> None:
        self.name, self.kind, self.facts = name, kind, facts
        self.consumed: list[str] = []
        self._keys, self._read = keys, read
        self._in_channels, self._stride, self._origin = in_channels, stride, origin

    def path(self, part: str) -> str:
        return join(self.name, part)

    def __contains__(self, part: str) -> bool:
        return self.path(part) in self._keys

    def shape(self, part: str) -> tuple[int, ...]:
        """Raises InputError when the block has no such tensor."""
        path = self.path(part)
        if path not in self._keys.shapes:
            raise InputError(f"{path} is missing, which this block needs beside {self.path(self.kind.anchor)}")
        return self._keys.shapes[path]

    def _kernel(self, part: str) -> tuple[int, ...]:
        shape = self.shape(part)
        if len(shape) != 4 or 0 in shape:
            raise InputError(f"{self.path(part)} has shape {shape}; expected a kernel (out, in / groups, height, width)")
        return shape

    def tensor(self, part: str) -> Tensor:
        """A stored tensor in float64."""
        self.shape(part)
        path = self.path(part)
        if path not in self.consumed:
            self.consumed.append(path)
        return self._read(path)

    @property
    def _anchor_module(self) -> str:
        return self.path(self.kind.anchor).removesuffix(".weight")

    @property
    def stride(self) -> int:
        return self.facts.resolve(
            self.name, "stride", module=self._anchor_module, convention=self._stride, origin=self._origin, read=one_step
        )

    @property
    def dilation(self) -> int:
        return self.facts.resolve(
            self.name, "dilation", module=self._anchor_module, convention=1, origin=self._origin, read=one_step
        )

    def padding(self, convention: int) -> int:
        """The padding of the largest kernel."""
        return self.facts.resolve(
            self.name, "padding", module=self._anchor_module, convention=convention, origin=self._origin, read=one_number
        )

    @property
    def groups(self) -> int:
        """From the input's channels where they are known; else a stated fact; else 1, which no kernel here depends on."""
        within = self._kernel(self.kind.anchor)[1]
        told = self.kind.inputs(self)
        if told is not None and self._in_channels is not None and told != self._in_channels:
            raise InputError(f"{self.name} takes {told} channels by its own tensors, but its input has {self._in_channels}")
        channels = told if told is not None else self._in_channels
        if channels is None:
            return self.facts.resolve(
                self.name, "groups", module=self._anchor_module, convention=1, origin="default", read=one_step
            )
        if channels % within:
            raise InputError(f"{self.name}: {channels} input channels do not divide into groups of {within}")
        return channels // within

    def eps(self, part: str) -> float:
        return self.facts.resolve(
            self.name, "eps", module=self.path(part), convention=NORM_EPS, origin=self._origin, read=positive
        )

    def conv(
        self, part: str, *, stride: int | None = None, padding: int = 0, dilation: int = 1, groups: int | None = None
    ) -> Conv:
        """The convolution of `part`.weight (and .bias): the block's stride and groups unless given."""
        weight_key = f"{part}.weight" if part else "weight"
        self._kernel(weight_key)
        weight = self.tensor(weight_key)
        bias_key = f"{part}.bias" if part else "bias"
        bias = self.tensor(bias_key) if bias_key in self else None
        step = self.stride if stride is None else stride
        return Conv(weight, bias, (step, step), (padding,) * 4, (dilation, dilation), self.groups if groups is None else groups)

    def norm(self, part: str) -> Norm:
        """The batch norm of `part`; without weight and bias it has no affine part."""
        affine = f"{part}.weight" in self
        return Norm(
            self.tensor(f"{part}.running_mean"),
            self.tensor(f"{part}.running_var"),
            self.tensor(f"{part}.weight") if affine else None,
            self.tensor(f"{part}.bias") if affine else None,
            self.eps(part),
        )

    def conv_norm(self, part: str, *, stride: int | None = None, padding: int = 0, dilation: int = 1) -> Linear:
        """`part`.conv, then `part`.bn."""
        return self.conv(f"{part}.conv", stride=stride, padding=padding, dilation=dilation) >> self.norm(f"{part}.bn")

    def identity(self) -> Identity:
        """The input itself, where a branch without parameters passes it on."""
        within = self._kernel(self.kind.anchor)[1]
        return Identity(torch.ones(within * self.groups, dtype=torch.float64, device=self.tensor(self.kind.anchor).device))


MAX_STEP = 1 << 16
"""No stride, padding, dilation or group count is larger."""


def one_number(value: object) -> int:
    """A stride, padding or dilation that is the same along both axes. Raises ValueError."""
    first = value[0] if isinstance(value, tuple) and value else value
    if isinstance(first, bool) or not isinstance(first, int) or not 0 <= first <= MAX_STEP:
        raise ValueError("no small whole number")
    if isinstance(value, tuple) and any(item != first for item in value):
        raise ValueError("differs along the two axes")
    return first


def one_step(value: object) -> int:
    """The same for what must be at least 1. Raises ValueError."""
    if (number := one_number(value)) < 1:
        raise ValueError("not at least 1")
    return number


def positive(value: object) -> float:
    """Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e30:
        return float(value)
    raise ValueError("no positive number")
