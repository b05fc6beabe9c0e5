"""ACNet's block in training and deploy form, with the official key names (arXiv:1908.03930), and its engine's files."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from sample_models.backbones import Layer


class Skeleton(nn.Conv2d):
    """A kernel of `size` (height, width) beside a square one of side `kernel`, looking at the same centres.

    Where the square kernel's padding is less than half its side, the input's border is cut off instead of padded.
    """

    def __init__(self, layer: Layer, size: tuple[int, int]) -> None:
        rows, columns = (layer.padding - layer.kernel // 2 + side // 2 for side in size)
        super().__init__(
            layer.inputs,
            layer.outputs,
            size,
            layer.stride,
            (max(rows, 0), max(columns, 0)),
            groups=layer.groups,
            bias=False,
        )
        self.cut = max(-rows, 0), max(-columns, 0)

    def forward(self, input: Tensor) -> Tensor:
        rows, columns = self.cut
        height, width = input.shape[2:]
        return super().forward(input[:, :, rows : height - rows, columns : width - columns])


class ACBlock(nn.Module):
    """Square, vertical and horizontal convolution, each normalised, summed; one more norm behind if asked for (2020).

    `taps`: of the one-dimensional kernels, where they are fewer than the square one's (3 in the block of 2019).
    (batch, inputs, height, width) -> (batch, outputs, ...) as the square convolution.
    """

    def __init__(self, layer: Layer, *, affine: bool = True, last_norm: bool = False, taps: int | None = None) -> None:
        super().__init__()
        long = taps or layer.kernel
        for name, size in (("square", (layer.kernel,) * 2), ("ver", (long, 1)), ("hor", (1, long))):
            self.add_module(f"{name}_conv", Skeleton(layer, (size[0], size[1])))
            self.add_module(f"{name}_bn", nn.BatchNorm2d(layer.outputs, affine=affine))
        self.last_bn = nn.BatchNorm2d(layer.outputs) if last_norm else None

    def forward(self, x: Tensor) -> Tensor:
        square, vertical, horizontal = (
            self.get_submodule(f"{name}_bn")(self.get_submodule(f"{name}_conv")(x)) for name in ("square", "ver", "hor")
        )
        total: Tensor = square + vertical + horizontal
        if self.last_bn is not None:
            total = self.last_bn(total)
        return total


def fused(layer: Layer, name: str) -> nn.Module:
    """The deploy form of a block: one convolution with a bias, under `name`."""
    conv = nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.padding, groups=layer.groups)
    return nn.Sequential(OrderedDict({name: conv}))


def conv_norm(layer: Layer) -> nn.Module:
    """A convolution that is no block: it stays beside its norm in the deploy form."""
    return nn.Sequential(OrderedDict(conv=_convolution(layer), bn=nn.BatchNorm2d(layer.outputs)))


def _convolution(layer: Layer) -> nn.Conv2d:
    return nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.padding, groups=layer.groups, bias=False)


def _is_block(layer: Layer) -> bool:
    return 1 < layer.kernel < 7


@dataclass(frozen=True, slots=True)
class Layers:
    """The official builder: kernels of 2 to 6 become blocks, one level down where the repository puts a ReLU behind them."""

    deploy: bool = False
    affine: bool = True
    last_norm: bool = False
    taps: int | None = None

    def normed(self, layer: Layer) -> nn.Module:
        if not _is_block(layer):
            return conv_norm(layer)
        if self.deploy:
            return fused(layer, "fused_conv")
        return ACBlock(layer, affine=self.affine, last_norm=self.last_norm, taps=self.taps)

    def activated(self, layer: Layer) -> nn.Module:
        return nn.Sequential(OrderedDict(acb=self.normed(layer))) if _is_block(layer) else conv_norm(layer)

    def shortcut(self, layer: Layer) -> nn.Module:
        return conv_norm(layer)

    def bare(self, layer: Layer) -> nn.Module:
        return self.normed(layer) if _is_block(layer) else _convolution(layer)

    def preactivated(self, layer: Layer) -> nn.Module:
        last = {"acb": self.normed(layer)} if _is_block(layer) else {"conv": _convolution(layer)}
        return nn.Sequential(OrderedDict({"bn": nn.BatchNorm2d(layer.inputs), "relu": nn.ReLU(), **last}))


def save_hdf5(state: Mapping[str, Tensor], path: Path, deps: Sequence[int] | None = None) -> Path:
    """The engine's own file: one dataset per tensor, "/" of a name written as "+"; `deps`: the widths of the layers."""
    import h5py

    with h5py.File(path, "w") as file:
        for key, value in state.items():
            file.create_dataset(key.removeprefix("module.").replace("/", "+"), data=value.numpy())
        if deps is not None:
            file.create_dataset("deps", data=list(deps))
    return path
