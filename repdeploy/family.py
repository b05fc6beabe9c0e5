"""What a plugin provides: the blocks of a family as expressions, its deploy names, and the networks it occurs in.

A family file reads like its paper's figure: each `BlockKind` says by which key a block is found, what it is made of,
and under which name the official deploy model keeps the fused convolution. Nothing else is needed to fuse, prove,
export or benchmark it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from repdeploy.algebra import NORM_EPS, Conv, Identity, Linear, Norm, Pair, Scale
from repdeploy.errors import InputError, NotRecognised
from repdeploy.facts import FactKind, Facts
from repdeploy.keys import Keys, join
from repdeploy.records import Origin
from repdeploy.skeletons import Architecture, Skeleton

Found = Literal["by key", "when named", "in a network"]
"""What it takes to believe that a key is this block's: the key alone; the family's name on the command line (or a pickled
module's class); a known network around it."""


@dataclass(frozen=True, slots=True)
class BlockKind:
    """One key layout of one block.

    `anchor`: one such key, one block; its kernel is the block's largest, unless `largest` is. `deploys_as`: where the fused
    convolution's weight and bias go, "" for the block's own name, None where the official deploy model keeps the layers as
    they are. `describe`: the block as an expression. `inputs`: its input channels where the tensors tell them. `fits`: whether
    the keys and shapes beside the anchor are this block's (no number is read). `classes`: what a pickled model calls the block.
    `eps`: batch norm's by convention. `ordinary_name`: other networks use the deploy name too, so it tells nothing.
    `one_of_several`: more blocks may stand under the same prefix. `identity`: the norm of the input, which such a block has
    exactly where its map keeps width and resolution. `geometry_of`: the submodule whose attributes a pickled
    block's stride, padding and dilation are, where that is not the anchor's. `is_dense`: a fully connected layer, stored as
    (out, in). `fits_fused`: `fits`, for the fused form. `unread`: stored beside the block, and never read in evaluation.
    `gives_up`: which outputs (out,) training has driven to zero, so that they may leave the network, and what is to be said.
    """

    anchor: str
    deploys_as: str | None
    describe: Callable[[Block], Linear]
    inputs: Callable[[Block], int | None] = lambda block: None
    fits: Callable[[Block], bool] = lambda block: True
    found: Found = "by key"
    classes: tuple[str, ...] = ()
    eps: float = NORM_EPS
    ordinary_name: bool = False
    one_of_several: bool = False
    geometry_of: str | None = None
    identity: str | None = None
    is_dense: bool = False
    fits_fused: Callable[[Block], bool] = lambda block: True
    unread: tuple[str, ...] = ()
    gives_up: Callable[[Block], tuple[Tensor, str]] | None = None
    largest: str | None = None

    @property
    def largest_kernel(self) -> str:
        return self.largest or self.anchor


@dataclass(frozen=True, slots=True)
class Family:
    """`title`: the block as the paper writes it; `source`: where; `facts`: what only this family needs to be told;
    `containers`: the files its repository writes."""

    name: str
    title: str
    source: str
    kinds: tuple[BlockKind, ...]
    skeletons: tuple[Skeleton, ...] = ()
    architectures: Mapping[str, Architecture] = field(default_factory=dict)
    facts: tuple[FactKind, ...] = ()
    containers: str = ""

    @property
    def all_facts(self) -> tuple[FactKind, ...]:
        """Its own and those of its networks."""
        return (*self.facts, *(kind for skeleton in self.skeletons for kind in skeleton.facts))


@dataclass(frozen=True, slots=True)
class Place:
    """Where a block stands, as its network says: stride, padding (None: half the largest kernel), channels that arrive, and
    the tile that each place of them holds, if it is one."""

    in_channels: int | None = None
    stride: int = 1
    padding: int | None = None
    origin: Origin = "skeleton"
    tile: Pair | None = None


class Read(Protocol):
    """How a description gets its numbers."""

    def __call__(self, key: str, rows: int | None = None) -> Tensor:
        """A stored tensor, or its first `rows`, in the dtype of the description."""


class Block:
    """The tensors under one prefix, seen by a description: parts by name, geometry as facts, all numbers in float64.

    A part is a module (`rbr_dense.conv`, whose kernel is `rbr_dense.conv.weight`) or a tensor of its own (`vector`).
    Raises InputError where a part is missing, not finite, or contradicts the others.
    """

    def __init__(self, name: str, kind: BlockKind, keys: Keys, read: Read, facts: Facts, place: Place) -> None:
        self.name, self.kind, self.facts, self.place = name, kind, facts, place
        self.consumed: list[str] = []
        self._keys, self._read = keys, read

    def path(self, part: str) -> str:
        return join(self.name, part)

    def __contains__(self, part: str) -> bool:
        return self.path(part) in self._keys

    def holds(self, part: str) -> bool:
        """Whether there is a tensor of that very name; `in` also finds what has parts of its own."""
        return self.path(part) in self._keys.shapes

    def shape(self, part: str) -> tuple[int, ...]:
        """Raises InputError when the block has no such tensor."""
        path = self.path(part)
        if path not in self._keys.shapes:
            raise InputError(f"{path} is missing, which this block needs beside {self.path(self.kind.anchor)}")
        return self._keys.shapes[path]

    def kernel_shape(self, key: str) -> tuple[int, ...]:
        """(out, in / groups, height, width); a fully connected layer has one tap. Raises InputError for anything else."""
        shape = self.shape(key)
        if self.kind.is_dense and len(shape) == 2:
            shape = (*shape, 1, 1)
        if len(shape) != 4 or 0 in shape:
            raise InputError(f"{self.path(key)} has shape {shape}; expected a kernel (out, in / groups, height, width)")
        return shape

    def tensor(self, part: str, rows: int | None = None) -> Tensor:
        """A stored tensor in float64, or only its first `rows`: nothing is asked of the others."""
        shape = self.shape(part)
        if rows is not None and (not shape or shape[0] < rows):
            raise InputError(f"{self.path(part)} has shape {shape}; expected at least {rows} rows")
        path = self.path(part)
        if path not in self.consumed:
            self.consumed.append(path)
        return self._read(path, rows)

    def numbered(self, part: str, prefix: str = "") -> int:
        """How many parts are called prefix + 0, 1, ... under `part`. Raises InputError where one of them is missing."""
        where = self.path(part)
        found = self._keys.children(where, prefix)
        expected = tuple(join(where, f"{prefix}{index}") for index in range(len(found)))
        if found != expected:
            missing = next(name for name in expected if name not in found)
            raise InputError(f"{missing} is missing among {len(found)} parts that are numbered after it")
        return len(found)

    def parts(self, prefix: str) -> tuple[str, ...]:
        """The parts called prefix + a number, in numerical order: "repconv" -> ("repconv1", "repconv3")."""
        return tuple(name.rpartition(".")[2] for name in self._keys.children(self.name, prefix))

    @property
    def _geometry_module(self) -> str:
        """The module whose attributes, in a pickled network, are the block's stride, padding, dilation and groups."""
        if self.kind.geometry_of is not None:
            return self.path(self.kind.geometry_of)
        anchor = self.path(self.kind.largest_kernel)
        return anchor.removesuffix(".weight") if anchor.endswith(".weight") else anchor.rpartition(".")[0]

    def _geometry(self, name: str, convention: int, read: Callable[[object], int], origin: Origin | None = None) -> int:
        return self.facts.resolve(
            self.name,
            name,
            module=self._geometry_module,
            convention=convention,
            origin=origin or self.place.origin,
            read=read,
            is_plain=self.kind is PLAIN or self.kind is DENSE,
        )

    @property
    def has_identity(self) -> bool:
        name = self.kind.identity
        return name is not None and (f"{name}.running_mean" in self or f"{name}.weight" in self)

    @property
    def stride(self) -> int:
        return self._geometry("stride", 1 if self.has_identity else self.place.stride, one_step)

    @property
    def dilation(self) -> int:
        """Of the block's largest kernel."""
        return self._geometry("dilation", 1, one_step)

    def padding(self, convention: int) -> int:
        """Of the block's largest kernel."""
        return self._geometry("padding", convention if self.place.padding is None else self.place.padding, one_number)

    @property
    def groups(self) -> int:
        """From the input's channels where they are known; else a stated fact; else 1, which no kernel here depends on.

        Raises InputError where a stated number contradicts the shapes.
        """
        within = self.kernel_shape(self.kind.largest_kernel)[1]
        if self.kind.is_dense:
            return 1
        told = self.kind.inputs(self)
        if told is None and self.has_identity:
            told = math.prod(self.shape(f"{self.kind.identity}.running_mean"))
        if told is not None and self.place.in_channels is not None and told != self.place.in_channels:
            raise InputError(
                f"{self.name} takes {told} channels by its own tensors, but its input has {self.place.in_channels}"
            )
        channels = told if told is not None else self.place.in_channels
        if channels is None:
            return self._geometry("groups", 1, one_step, "default")
        if channels % within:
            # a layer that any network may have tells of another network, a block of its own kind is damaged
            error = NotRecognised if self.kind.found == "in a network" else InputError
            raise error(f"{self.name}: {channels} input channels do not divide into groups of {within}")
        groups = channels // within
        if self.facts.stated(self.name, "groups") and self._geometry("groups", groups, one_step) != groups:
            raise InputError(
                f"block {self.name or '(the whole file)'} has {groups} groups by its tensors, another number is stated",
                hint="leave --set groups out: shapes tell it",
            )
        return groups

    @property
    def in_channels(self) -> int:
        return self.kernel_shape(self.kind.largest_kernel)[1] * self.groups

    def undilated(self, reason: str) -> None:
        """Raises InputError where somebody states a dilation that the block's own code does not support."""
        if self.dilation != 1:
            raise InputError(
                f"block {self.name or '(the whole file)'} is said to have dilation {self.dilation}, but {reason}",
                hint="take the dilation back; a block that was changed by hand converts with --model once it is there",
            )

    def choice(self, name: str, allowed: tuple[str, ...], convention: str | None, question: str) -> str:
        """A fact that decides between readings of the same keys.

        `allowed`: the readings these keys admit; `convention` None: it must be stated. Raises InputError where it is not, or
        where what was stated contradicts the keys.
        """
        setting = self.facts.stated(self.name, name)
        options = " or ".join(f"--set {name}={value}" for value in allowed)
        if setting is not None and setting.value not in allowed and setting.origin != "file":
            raise InputError(
                f"{self.name or 'the block'}: {name}={setting.value} contradicts its keys, which allow {', '.join(allowed)}",
                hint=f"state {options}",
            )
        if setting is None or setting.value not in allowed:
            if convention is None:
                raise InputError(f"{self.name or 'the block'}: {question}", hint=f"state it: {options}")
            return self.facts.used(self.name, name, convention, self.place.origin)
        return self.facts.resolve(self.name, name, convention=allowed[0])

    def eps(self, part: str) -> float:
        return self.facts.resolve(
            self.name, "eps", module=self.path(part), convention=self.kind.eps, origin=self.place.origin, read=positive
        )

    def conv(self, part: str, *, stride: int | None = None, padding: int | None = None, groups: int | None = None) -> Conv:
        """The convolution with the kernel (and bias) of `part`: the block's stride and groups unless given.

        Unless a padding is given, the kernel looks at the same centre as the block's largest one, whose padding is the
        block's: a 1x1 beside a 3x3, a 1x5 beside a 5x5. The largest kernel's dilation is the block's.
        Raises InputError where a kernel has no centre in common with the largest one.
        """
        module = f"{part}.weight" if part else "weight"
        key = module if module in self or part not in self else part
        *_, height, width = shape = self.kernel_shape(key)
        *_, tall, wide = self.kernel_shape(self.kind.largest_kernel)
        weight = self.tensor(key).view(shape)
        mode = self.facts.attributes.get(self.path(part), {}).get("padding_mode", "zeros")
        if mode != "zeros" and max(height, width) > 1:
            raise InputError(
                f"{self.path(part)} was pickled with padding_mode = {mode!r}; only zero padding is described here",
                hint="its kernels fuse alike, but the deploy convolution must keep the mode: save the state dict alone, "
                "convert that block by block, and load it into a deploy model with that padding",
            )
        bias_key = f"{part}.bias" if part else "bias"
        bias = self.tensor(bias_key) if key == module and bias_key in self else None
        step = self.stride if stride is None else stride
        dilation = self.dilation if (height, width) == (tall, wide) else 1
        if padding is None:
            if (tall - height) % 2 or (wide - width) % 2 or height > tall or width > wide:
                raise InputError(
                    f"{self.path(key)}: a {height}x{width} kernel does not stand at the centre of the block's {tall}x{wide} one"
                )
            if not (tall % 2 and wide % 2) and self.place.padding is None:
                raise InputError(
                    f"{self.path(self.kind.largest_kernel)}: a {tall}x{wide} kernel has no centre; odd sizes are expected"
                )
            whole = self.dilation
            down = self.padding(whole * (tall // 2)) - whole * (tall // 2) + dilation * (height // 2)
            across = self.padding(whole * (wide // 2)) - whole * (wide // 2) + dilation * (width // 2)
        else:
            down = across = padding
        return Conv(
            weight,
            bias,
            (step, step),
            (down, across, down, across),
            (dilation, dilation),
            self.groups if groups is None else groups,
        )

    def biased(self, part: str) -> Conv:
        """The centred convolution of `part`, which has a bias. Raises InputError where that is missing."""
        self.shape(join(part, "bias"))
        return self.conv(part)

    def norm(self, part: str) -> Norm:
        """The batch norm of `part`; without weight and bias it has no affine part."""
        affine = [join(part, "weight"), join(part, "bias")]
        if not any(key in self for key in affine):
            affine = []
        gamma, beta = map(self.tensor, affine) if affine else (None, None)
        mean, var = self.tensor(join(part, "running_mean")), self.tensor(join(part, "running_var"))
        return Norm(mean, var, gamma, beta, self.eps(part))

    def scale(self, part: str) -> Scale:
        """One factor per channel (LayerScale): a tensor of any shape with that many numbers."""
        return Scale(self.tensor(part).flatten())

    def conv_norm(self, part: str, conv: str = "conv", norm: str = "bn") -> Linear:
        """`part`.conv, centred, then `part`.bn."""
        return self.conv(f"{part}.{conv}") >> self.norm(f"{part}.{norm}")

    def with_identity(self, branches: Linear) -> Linear:
        """The branches and the norm of the input (`BlockKind.identity`), where the block has it.

        Raises InputError where a network says that the map keeps its shape, and the norm is not there.
        """
        name = self.kind.identity or ""
        if self.has_identity:
            return branches + self.norm(name)
        keeps = self.place.in_channels == branches.out_channels and self.stride == 1
        if keeps and not self.facts.tells(self.name, "stride", self._geometry_module):
            raise InputError(
                f"{self.path(name)} is missing: {self.name} keeps width and resolution, so it has an identity branch",
                hint=f"if its resolution changes, state it: --set {self.name}.stride=2; else the file is not complete",
            )
        return branches

    def identity(self) -> Identity:
        """The input itself, where a branch without parameters passes it on."""
        return Identity(torch.ones(self.in_channels, dtype=torch.float64, device=self.tensor(self.kind.anchor).device))


PLAIN = BlockKind("weight", None, lambda block: block.conv(""), found="in a network")
"""A convolution that is already one, with or without a bias: squeeze-excite, for example."""
DENSE = replace(PLAIN, fits=lambda block: len(block.shape("weight")) == 2, is_dense=True)
"""A fully connected layer: on a vector, or at every place of a map."""
NORM = BlockKind("running_mean", None, lambda block: block.norm(""), found="in a network")
"""A batch norm that stands alone."""
SCALES = (
    BlockKind("gamma", None, lambda block: block.scale("gamma"), found="in a network"),
    BlockKind("", None, lambda block: block.scale(""), found="in a network"),
)
"""A factor per channel (LayerScale): timm's module, or the tensor itself."""


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
