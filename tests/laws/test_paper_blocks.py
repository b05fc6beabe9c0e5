"""What the papers' blocks are made of, in the algebra and on random tensors; the blocks themselves are in tests/families."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repdeploy.algebra import AveragePool, Conv, Linear, Norm, Pad
from tests.laws.expressions import random_tensor


def norm(seed: int, channels: int) -> Norm:
    mean, var, gamma, beta = (random_tensor(seed + i, channels) for i in range(4))
    gamma[0] = -gamma[0].abs()
    gamma[-1] = 1e-6
    return Norm(mean, var.abs() + 0.3, gamma, beta)


def conv(seed: int, out: int, within: int, height: int, width: int, **geometry: object) -> Conv:
    return Conv(random_tensor(seed, out, within, height, width), **geometry)  # type: ignore[arg-type]


def bn_and_pad(before: Linear, border: int) -> Linear:
    """DBB's BNAndPad: what follows sees the norm's own answer to zero outside the image."""
    outside = before.squeeze().bias
    assert outside is not None
    return before >> Pad(outside, (border,) * 4)


def test_padding_dbb_with_zero_instead_is_refused() -> None:
    first = conv(3, 8, 8, 1, 1) >> norm(30, 8)
    with pytest.raises(Exception, match="outside the image"):
        (first >> conv(4, 8, 8, 3, 3, pads=(1, 1, 1, 1))).squeeze()


def test_a_dilated_three_by_three_with_a_one_by_one_keeps_its_nine_taps() -> None:
    """RepVGG in a segmenter: the 1x1 tap is the centre, the squeezed kernel stays 3x3 with dilation 4."""
    wide = conv(1, 6, 6, 3, 3, pads=(4, 4, 4, 4), dilation=(4, 4)) >> norm(10, 6)
    block = wide + (conv(2, 6, 6, 1, 1) >> norm(20, 6)) + norm(30, 6)
    fused = block.squeeze()
    assert fused.geometry.kernel_size == (3, 3)
    assert fused.dilation == (4, 4)
    x = random_tensor(0, 1, 6, 13, 17)
    assert torch.allclose(fused.run(x), block.run(x), rtol=0, atol=1e-11)


def test_a_compactor_behind_a_grouped_convolution_joins_its_groups() -> None:
    """ResRep's 1x1 after a grouped convolution: the official code does not handle it; groups fall to the common divisor."""
    block = conv(1, 8, 4, 3, 3, pads=(1, 1, 1, 1), groups=2) >> norm(10, 8) >> conv(2, 8, 8, 1, 1)
    fused = block.squeeze()
    assert fused.groups == 1
    x = random_tensor(0, 1, 8, 7, 9)
    assert torch.allclose(fused.run(x), block.run(x), rtol=0, atol=1e-11)


def test_repmixer_subtracts_a_norm() -> None:
    """FastViT: x + scale * (mixer(x) - norm(x)), depthwise."""
    mixer = (conv(1, 6, 1, 3, 3, pads=(1, 1, 1, 1), groups=6) >> norm(10, 6)) + norm(20, 6)
    difference = (mixer - norm(30, 6)).squeeze()
    x = random_tensor(0, 1, 6, 7, 9)
    assert difference.groups == 6
    assert torch.allclose(difference.run(x), mixer.run(x) - norm(30, 6).run(x), rtol=0, atol=1e-12)


class OfficialStyleDbb(nn.Module):
    """The block as a training script would write it with torch layers, to hold the expression against."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.pool, self.last = nn.AvgPool2d(3), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.first(x))
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert var is not None
        value = self.norm.bias - mean * self.norm.weight / torch.sqrt(var + self.norm.eps)
        padded = F.pad(y, (1, 1, 1, 1))
        frame = 1 - F.pad(torch.ones_like(y[:1, :1]), (1, 1, 1, 1))
        result: Tensor = self.last(F.avg_pool2d(padded + frame * value.view(1, -1, 1, 1), 3, 1))
        return result


def test_running_an_expression_is_running_the_layers() -> None:
    layers = OfficialStyleDbb(5).double().eval()
    with torch.no_grad():
        for index, (name, value) in enumerate(layers.state_dict().items()):
            if value.dtype == torch.float64:
                value.copy_(
                    random_tensor(index, *value.shape).abs() + 0.1 if "var" in name else random_tensor(index, *value.shape)
                )

        def leaf(layer: nn.BatchNorm2d) -> Norm:
            assert layer.running_mean is not None
            assert layer.running_var is not None
            return Norm(layer.running_mean, layer.running_var, layer.weight, layer.bias, layer.eps)

        before = bn_and_pad(Conv(layers.first.weight) >> leaf(layers.norm), 1)
        block = before >> AveragePool(torch.ones(5, dtype=torch.float64), (3, 3)) >> leaf(layers.last)
        x = random_tensor(0, 2, 5, 9, 7)
        assert torch.allclose(block.run(x), layers(x), rtol=0, atol=1e-12)
        assert torch.allclose(block.squeeze().run(x), layers(x), rtol=0, atol=1e-12)
