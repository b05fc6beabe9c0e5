"""ResRep's compactors with the official key names (arXiv:2007.03260), the networks they stand in, and their training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sample_models.acnet import conv_norm, fused
from sample_models.backbones import Layer

THRESHOLD = 1e-5
"""A row of a compactor whose norm is below is a channel that training has given up (the official converter's)."""
SHARE = 0.6
"""Of all rows, those that training is to forget."""
STRENGTH = 0.05
"""Of the group lasso; the paper's 1e-4 is for 180 epochs of ImageNet."""
BEGINS, ENDS = 0.1, 0.5
"""The parts of training behind which the first and the last rows are chosen: the rest of it brings them to zero."""


class Compactor(nn.Module):
    """A 1x1 convolution without a bias, the identity at first. `mask` (channels,) gates its gradient; forward never reads it.

    x (batch, channels, height, width), same shape out.
    """

    mask: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.pwc = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.dirac_(self.pwc.weight)
        self.register_buffer("mask", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pwc(x)
        return y

    def norms(self) -> Tensor:
        """(channels,) float64: of the rows."""
        norms: Tensor = torch.linalg.vector_norm(self.pwc.weight.detach().double(), dim=(1, 2, 3))
        return norms

    def forgotten(self, threshold: float = THRESHOLD) -> Tensor:
        """(channels,) bool: the rows that go; the largest one never does."""
        norms = self.norms()
        small = norms < threshold
        if small.all():
            small[norms.argmax()] = False
        return small


@dataclass(frozen=True, slots=True)
class Layers:
    """The official builder: every convolution in one form, whatever follows it."""

    make: Callable[[Layer], nn.Module]

    def normed(self, layer: Layer) -> nn.Module:
        return self.make(layer)

    def activated(self, layer: Layer) -> nn.Module:
        return self.make(layer)

    def shortcut(self, layer: Layer) -> nn.Module:
        return self.make(layer)


TRAINING = Layers(conv_norm)
DEPLOYED = Layers(partial(fused, name="conv"))


def layers(model: nn.Module) -> dict[str, nn.Sequential]:
    """Name -> convolution with what stands behind it, in the order of construction: the official conv indices."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Sequential) and hasattr(layer, "conv")}


def compacted(model: nn.Module, targets: Iterable[int | str] | None = None) -> nn.Module:
    """Put a compactor behind the norm of these layers (conv indices or names; all when left out), in place."""
    found = layers(model)
    names = list(found)
    for target in names if targets is None else targets:
        layer = found[names[target] if isinstance(target, int) else target]
        layer.add_module("compactor", Compactor(layer[0].out_channels))  # type: ignore[arg-type]
    return model


def inner_layers(model: nn.Module) -> list[str]:
    """All but the last convolution of each residual block: the official targets of src56 and sres50."""
    names = [name for name in layers(model) if ".block" in name]
    return [name for name in names if f"{name[:-1]}{int(name[-1]) + 1}" in names]


def compactors(model: nn.Module) -> dict[str, Compactor]:
    """Name of the layer -> its compactor."""
    found = {name: layer.get_submodule("compactor") for name, layer in layers(model).items() if hasattr(layer, "compactor")}
    return {name: compactor for name, compactor in found.items() if isinstance(compactor, Compactor)}


def without_forgotten(model: nn.Module) -> nn.Module:
    """A copy whose forgotten rows are zero: what pruning is to keep, where nobody adds to those channels."""
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        for compactor in compactors(pruned).values():
            compactor.pwc.weight[compactor.forgotten()] = 0
    return pruned


class Forgetting:
    """The updates of compactors (section 3.3): Q -= rate * (mask * dL/dQ + strength * Q_row / |Q_row|).

    The rows of smallest norm get mask 0, more and more of them, and the penalty alone moves those to zero. There is no
    momentum: a row at zero swings by no more than one step, rate * strength, so it ends below the threshold with the rate.
    """

    def __init__(self, model: nn.Module, share: float = SHARE, strength: float = STRENGTH) -> None:
        self.compactors, self.share, self.strength = list(compactors(model).values()), share, strength
        own = {id(compactor.pwc.weight) for compactor in self.compactors}
        self.others = [parameter for parameter in model.parameters() if id(parameter) not in own]

    def step(self, rate: float, done: float) -> None:
        """Behind the backward pass; `done`: the part of training that is over, 0 to 1."""
        part = min(max((done - BEGINS) / (ENDS - BEGINS), 0), 1)
        self._choose(int(self.share * part * sum(len(compactor.mask) for compactor in self.compactors)))
        with torch.no_grad():
            for compactor in self.compactors:
                weight = compactor.pwc.weight
                assert weight.grad is not None
                gradient = compactor.mask.view(-1, 1, 1, 1) * weight.grad + self.strength * F.normalize(weight, dim=1)
                weight -= rate * gradient
                weight.grad = None

    def _choose(self, count: int) -> None:
        """Mask the `count` smallest rows of the whole network, but never the largest one of a compactor."""
        if not self.compactors:
            return
        norms = [compactor.norms() for compactor in self.compactors]
        for rows in norms:
            rows[rows.argmax()] = torch.inf
        masks = torch.ones(sum(map(len, norms)))
        masks[torch.cat(norms).argsort()[:count]] = 0
        for compactor, mask in zip(self.compactors, masks.split([len(rows) for rows in norms]), strict=True):
            compactor.mask.copy_(mask)
