"""OREPA's blocks with the official key names (arXiv:2204.00826), trained through repdeploy's own description of them.

Every step squeezes the branches into one kernel, under autograd, and convolves once: the expression that a conversion
squeezes is the one that the training ran.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass

import torch
from repdeploy_plugins.orepa import EXPANSION, FAMILY
from torch import Tensor, nn

from repdeploy.algebra import Linear, Online, Parallel, Series
from repdeploy.facts import Facts
from repdeploy.family import Block, Place
from repdeploy.keys import Keys
from sample_models.backbones import Layer
from sample_models.dbb import conv_norm, fused

FIRST_ROWS = (0.25, 0.25, 0.0, 0.5, 0.5, 0.5)
"""What the branches count for at the start: kxk, average, frequency filters, 1x1-kxk, 1x1, depthwise separable."""


class Generated(nn.Module):
    """A module whose kernel is generated from its tensors, as the family describes them under the key `anchor`."""

    anchor: str
    layer: Layer
    bn: nn.BatchNorm2d

    def description(self) -> Linear:
        """The block over the tensors of this step."""
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        kind = next(kind for kind in FAMILY.kinds if kind.anchor == self.anchor)
        keys = Keys({name: tuple(value.shape) for name, value in tensors.items()})

        def read(key: str, rows: int | None = None) -> Tensor:
            return tensors[key] if rows is None else tensors[key][:rows]

        place = Place(self.layer.inputs, self.layer.stride, self.layer.padding)
        return kind.describe(Block("", kind, keys, read, Facts(), place))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn(convolve(self.description(), x))
        return y


def convolve(branch: Linear, x: Tensor) -> Tensor:
    """The generated convolution at the head of a branch, without the norm behind it."""
    assert isinstance(branch, Series)
    assert isinstance(branch.parts[0], Online)
    return branch.parts[0].run(x)


def kernel(*shape: int) -> nn.Parameter:
    """Initialised as torch initialises convolutions."""
    weight = nn.Parameter(torch.empty(*shape))
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight


def frequency_filters(outputs: int, size: int) -> Tensor:
    """The fixed filters of the prior branch: (outputs, size, size), a cosine down each of the first half, across the rest."""
    half, filters = outputs // 2, torch.zeros(outputs, size, size)
    for channel in range(outputs):
        down = channel < half
        wave = torch.cos(math.pi * (torch.arange(size) + 0.5) * ((channel if down else channel - half) + 1) / 3)
        filters[channel] = wave.view(-1, 1) if down else wave.view(1, -1)
    return filters


class Orepa(Generated):
    """The block of section 3.3: six branches. `names`: what its weights are called; `is_bare`: without the norm, in a stem."""

    anchor = "weight_orepa_origin"

    def __init__(self, layer: Layer, *, names: str = "orepa", is_bare: bool = False) -> None:
        super().__init__()
        self.layer = layer
        inputs, outputs, size, groups = layer.inputs, layer.outputs, layer.kernel, layer.groups
        within, middle = inputs // groups, inputs if groups <= 4 else 2 * inputs
        shapes = {
            "origin": (outputs, within, size, size),
            "avg_conv": (outputs, within, 1, 1),
            "pfir_conv": (outputs, within, 1, 1),
            "1x1_kxk_idconv1": (middle, within, 1, 1),
            "1x1_kxk_conv2": (outputs, middle // groups, size, size),
            "1x1": (outputs, within, 1, 1),
            "gconv_dw": (EXPANSION * inputs, 1, size, size),
            "gconv_pw": (outputs, EXPANSION * within, 1, 1),
        }
        rows: tuple[float, ...] = FIRST_ROWS
        if names == "rbr":  # the block beside RepVGG's 1x1 and identity has no 1x1 of its own
            del shapes["1x1"]
            rows = FIRST_ROWS[:5]
        for name, shape in shapes.items():
            self.register_parameter(f"weight_{names}_{name}", kernel(*shape))
        nn.init.zeros_(self.get_parameter(f"weight_{names}_1x1_kxk_idconv1"))
        self.vector = nn.Parameter(torch.tensor(rows).view(-1, 1).repeat(1, outputs))
        self.register_buffer(f"weight_{names}_avg_avg", torch.full((size, size), 1 / size**2))
        self.register_buffer(f"weight_{names}_prior", frequency_filters(outputs, size))
        identity = torch.zeros(middle, within, 1, 1)
        identity[torch.arange(middle), torch.arange(middle) % within] = 1
        self.register_buffer("id_tensor", identity)
        if not is_bare:
            self.bn = nn.BatchNorm2d(outputs)


class Orepa1x1(Generated):
    """Two branches: a 1x1 kernel, and a product of two of which one starts as the identity."""

    anchor = "weight_or1x1_origin"

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer, between = layer, min(layer.inputs, layer.outputs)
        self.weight_or1x1_origin = kernel(layer.outputs, layer.inputs, 1, 1)
        self.weight_or1x1_l2i_conv1 = kernel(between, layer.inputs, 1, 1)
        self.weight_or1x1_l2i_conv2 = kernel(layer.outputs, between, 1, 1)
        identity = self.weight_or1x1_l2i_conv1 if layer.outputs > layer.inputs else self.weight_or1x1_l2i_conv2
        with torch.no_grad():
            identity.copy_(torch.eye(between).view(between, between, 1, 1))
        self.vector = nn.Parameter(torch.full((2, layer.outputs), 0.5))
        self.bn = nn.BatchNorm2d(layer.outputs)


class LargeConv(Generated):
    """A stem of stacked 3x3 kernels; `is_base`: plain ones instead of OREPA's."""

    def __init__(self, layer: Layer, *, is_base: bool = False) -> None:
        super().__init__()
        self.layer, inputs = layer, layer.inputs
        self.anchor = "weight0" if is_base else "weight0.weight_orepa_origin"
        for index in range((layer.kernel - 1) // 2):
            if is_base:
                self.register_parameter(f"weight{index}", kernel(layer.outputs, inputs // layer.groups, 3, 3))
            else:
                self.add_module(f"weight{index}", Orepa(Layer(inputs, layer.outputs, 3), is_bare=True))
            inputs = layer.outputs
        self.bn = nn.BatchNorm2d(layer.outputs)


class OrepaVGG(Generated):
    """RepVGG's block with OREPA as its 3x3 branch; the ReLU stands outside."""

    anchor = "rbr_dense.weight_rbr_origin"

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer = layer
        keeps = layer.inputs == layer.outputs and layer.stride == 1
        self.rbr_dense = Orepa(layer, names="rbr")
        if keeps:  # a row that the official block allocates and never reads
            self.rbr_dense.vector = nn.Parameter(torch.cat((self.rbr_dense.vector, torch.zeros(1, layer.outputs))))
        self.rbr_1x1 = conv_norm(Layer(layer.inputs, layer.outputs, 1, layer.stride))
        self.rbr_identity = nn.BatchNorm2d(layer.inputs) if keeps else None

    def forward(self, x: Tensor) -> Tensor:
        whole = self.description()
        assert isinstance(whole, Parallel)
        total: Tensor = self.rbr_dense.bn(convolve(whole.parts[0], x)) + self.rbr_1x1(x)
        return total if self.rbr_identity is None else total + self.rbr_identity(x)


@dataclass(frozen=True, slots=True)
class Layers:
    """The official builder: 3x3 and 1x1 become OREPA's, larger kernels its stem; a basic block's shortcut stays plain."""

    deploy: bool = False

    def normed(self, layer: Layer) -> nn.Module:
        if layer.kernel == 1:
            return fused(layer, "or1x1_reparam") if self.deploy else Orepa1x1(layer)
        if layer.kernel == 3:
            return fused(layer, "orepa_reparam") if self.deploy else Orepa(layer)
        return fused(layer, "or_large_reparam") if self.deploy else LargeConv(layer)

    def activated(self, layer: Layer) -> nn.Module:
        return self.normed(layer)

    def shortcut(self, layer: Layer) -> nn.Module:
        return fused(layer, "conv") if self.deploy else conv_norm(layer)


class RepVGG(nn.Module):
    """The RepVGG topology over OREPA_VGG blocks, or over plain OREPA ones (`is_plain`).

    `blocks`: of stages 1 to 4; `widths`: of the stem and stages 1 to 4. (batch, channels, height, width) -> logits.
    """

    def __init__(
        self, blocks: tuple[int, ...], widths: tuple[int, ...], classes: int, channels: int = 3, is_plain: bool = False
    ) -> None:
        super().__init__()
        make = Orepa if is_plain else OrepaVGG
        self.stage0 = make(Layer(channels, widths[0], 3, 2))
        for stage, (count, inputs, outputs) in enumerate(zip(blocks, widths, widths[1:], strict=False), 1):
            rows: OrderedDict[str, nn.Module] = OrderedDict()
            for index in range(count):
                rows[str(index)] = make(Layer(inputs if index == 0 else outputs, outputs, 3, 2 if index == 0 else 1))
            self.add_module(f"stage{stage}", nn.Sequential(rows))
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stage0(x))
        for stage in range(1, 5):
            for block in self.get_submodule(f"stage{stage}").children():
                x = torch.relu(block(x))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits
