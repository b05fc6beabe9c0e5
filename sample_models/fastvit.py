"""FastViT with timm's key names (arXiv:2303.14189, section 3), in training and in deploy form; apple's names on request."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sample_models.repvgg import ConvNorm
from sample_models.repvit import SqueezeExcite, quarter


class MobileOneBlock(nn.Module):
    """A convolution, a 1x1 beside a larger kernel, the normalised input where shapes allow; summed, gated if asked for, GELU.

    x (batch, inputs, height, width) -> (batch, outputs, ceil(height / stride), ceil(width / stride)). `deploy`: all of
    them as the one biased convolution `reparam_conv`.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, scale_branch: bool = True,
        squeeze_excite: bool = False, activation: bool = True, deploy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.reparam_conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups) if deploy else None
        if not deploy:
            self.conv_kxk = nn.ModuleList([ConvNorm(inputs, outputs, kernel, stride, groups)])
            self.conv_scale = ConvNorm(inputs, outputs, 1, stride, groups) if kernel > 1 and scale_branch else None
            self.identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.se = SqueezeExcite(outputs, max(outputs // 16, 1)) if squeeze_excite else None
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.branches(x) if self.reparam_conv is None else self.reparam_conv(x)
        total = total if self.se is None else self.se(total)
        return F.gelu(total) if self.activation else total

    def branches(self, x: Tensor) -> Tensor:
        total: Tensor = self.conv_kxk[0](x)
        for branch in (self.conv_scale, self.identity):
            total = total if branch is None else total + branch(x)
        return total


class LargeKernel(nn.Module):
    """7x7 and 3x3 kernels of stride 2 with as many groups as input channels, each normalised, summed; gate and GELU on request.

    x (batch, inputs, height, width) -> (batch, outputs, ceil(height / 2), ceil(width / 2)).
    """

    def __init__(self, inputs: int, outputs: int, squeeze_excite: bool, activation: bool, deploy: bool) -> None:
        super().__init__()
        self.reparam_conv = nn.Conv2d(inputs, outputs, 7, 2, 3, groups=inputs) if deploy else None
        if not deploy:
            self.large_conv = ConvNorm(inputs, outputs, 7, 2, inputs)
            self.small_conv = ConvNorm(inputs, outputs, 3, 2, inputs)
        self.se = SqueezeExcite(outputs, quarter(outputs)) if squeeze_excite else None
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.large_conv(x) + self.small_conv(x) if self.reparam_conv is None else self.reparam_conv(x)
        total = total if self.se is None else self.se(total)
        return F.gelu(total) if self.activation else total


class Downsample(nn.Module):
    """Halves the map, then mixes its channels."""

    def __init__(self, inputs: int, outputs: int, squeeze_excite: bool, activation: bool, deploy: bool) -> None:
        super().__init__()
        large = LargeKernel(inputs, outputs, squeeze_excite, activation, deploy)
        self.proj = nn.Sequential(large, MobileOneBlock(outputs, outputs, 1, deploy=deploy))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.proj(x)
        return result


class PositionEncoding(nn.Module):
    """A depthwise 7x7 kernel with a bias, beside the input."""

    def __init__(self, channels: int, deploy: bool) -> None:
        super().__init__()
        self.deploy = deploy
        self.add_module("reparam_conv" if deploy else "pos_enc", nn.Conv2d(channels, channels, 7, padding=3, groups=channels))

    def forward(self, x: Tensor) -> Tensor:
        (conv,) = self.children()
        y: Tensor = conv(x)
        return y if self.deploy else y + x


class LayerScale(nn.Module):
    """A factor per channel: `gamma` (channels, 1, 1)."""

    def __init__(self, channels: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((channels, 1, 1), start))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


def layer_scale(channels: int, start: float | None) -> nn.Module:
    return nn.Identity() if start is None else LayerScale(channels, start)


class RepMixer(nn.Module):
    """x + layer_scale * (mixer(x) - norm(x)), a depthwise 3x3 in the end: `reparam_conv`."""

    def __init__(self, channels: int, scale: float | None, deploy: bool) -> None:
        super().__init__()
        self.reparam_conv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels) if deploy else None
        if not deploy:
            self.norm = nn.Sequential(OrderedDict(identity=nn.BatchNorm2d(channels)))
            self.mixer = MobileOneBlock(channels, channels, 3, 1, channels, activation=False)
            self.layer_scale = layer_scale(channels, scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            merged: Tensor = self.reparam_conv(x)
            return merged
        change: Tensor = self.layer_scale(self.mixer(x) - self.norm(x))
        return x + change


class ConvMlp(nn.Module):
    """A normalised depthwise 7x7, 1x1 to `inside` channels, exact GELU, 1x1 back."""

    def __init__(self, channels: int, inside: int) -> None:
        super().__init__()
        self.conv = ConvNorm(channels, channels, 7, 1, channels)
        self.fc1 = nn.Conv2d(channels, inside, 1)
        self.fc2 = nn.Conv2d(inside, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(self.conv(x))))
        return y


class RepMixerBlock(nn.Module):
    def __init__(self, channels: int, inside: int, scale: float | None, deploy: bool) -> None:
        super().__init__()
        self.token_mixer = RepMixer(channels, scale, deploy)
        self.mlp = ConvMlp(channels, inside)
        self.layer_scale = layer_scale(channels, scale)

    def forward(self, x: Tensor) -> Tensor:
        x = self.token_mixer(x)
        y: Tensor = self.layer_scale(self.mlp(x))
        return x + y


class Attention(nn.Module):
    """Multi-head self-attention over all pixels, (batch, channels, height, width) to the same shape."""

    def __init__(self, channels: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x.flatten(2).transpose(1, 2))
        q, k, v = qkv.unflatten(2, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) * self.head_dim**-0.5).softmax(-1)
        y: Tensor = self.proj((weights @ v).transpose(1, 2).flatten(2))
        return y.transpose(1, 2).reshape(x.shape)


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, inside: int, scale: float | None, head_dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.token_mixer = Attention(channels, head_dim)
        self.layer_scale_1 = layer_scale(channels, scale)
        self.mlp = ConvMlp(channels, inside)
        self.layer_scale_2 = layer_scale(channels, scale)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layer_scale_1(self.token_mixer(self.norm(x)))
        y: Tensor = self.layer_scale_2(self.mlp(x))
        return x + y


class Stage(nn.Module):
    """Keys `downsample`, `pos_emb` where there are such, and `blocks`."""

    def __init__(self, downsample: nn.Module | None, position: nn.Module | None, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.pos_emb = position
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        for part in (self.downsample, self.pos_emb, self.blocks):
            x = x if part is None else part(x)
        return x


class Head(nn.Module):
    """Keys start at `fc`: the mean over the map, then the classes."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class FastViT(nn.Module):
    """`layers`, `widths`: blocks and channels per stage; the stem divides height and width by 4, every later stage by 2.

    `attention`, `positions`: how many of the last stages have attention blocks, and how many a position encoding;
    `layer_scale`: what the scales start with, None for no scales; `squeeze_excite`: per stage, whether its downsampling
    has a gate; `large_activation`: GELU behind the large kernels (the mci variants); `scale_branch`: of the stem.
    `deploy`: the norms of the channel mixers and in front of the attention are still there, as in timm.
    """

    def __init__(
        self, layers: Sequence[int], widths: Sequence[int], classes: int, channels: int = 3, mlp_ratio: float = 3.0,
        attention: int = 0, positions: int = 0, head_dim: int = 32, layer_scale: float | None = 1e-5,
        squeeze_excite: Sequence[bool] | None = None, large_activation: bool = False, scale_branch: bool = True,
        deploy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        inputs, stages = widths[0], len(layers)
        self.stem = nn.Sequential(
            MobileOneBlock(channels, inputs, 3, 2, 1, scale_branch, deploy=deploy),
            MobileOneBlock(inputs, inputs, 3, 2, inputs, scale_branch, deploy=deploy),
            MobileOneBlock(inputs, inputs, 1, deploy=deploy),
        )
        self.stages = nn.Sequential()
        for stage, (count, width) in enumerate(zip(layers, widths, strict=True)):
            inside, gated = int(width * mlp_ratio), squeeze_excite is not None and squeeze_excite[stage]
            blocks: list[nn.Module] = [
                AttentionBlock(width, inside, layer_scale, head_dim)
                if stage >= stages - attention
                else RepMixerBlock(width, inside, layer_scale, deploy)
                for _ in range(count)
            ]
            downsample = Downsample(inputs, width, gated, large_activation, deploy) if stage > 0 else None
            position = PositionEncoding(width, deploy) if stage >= stages - positions else None
            self.stages.append(Stage(downsample, position, blocks))
            inputs = width
        self.final_conv = MobileOneBlock(inputs, 2 * inputs, 3, 1, inputs, squeeze_excite=True, deploy=deploy)
        self.head = Head(2 * inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width) -> logits (batch, classes)."""
        logits: Tensor = self.head(self.final_conv(self.stages(self.stem(x))))
        return logits


APPLE = {
    "stem.": "patch_embed.", "conv_kxk.": "rbr_conv.", "conv_scale.": "rbr_scale.", "identity.": "rbr_skip.",
    "large_conv.": "lkb_origin.", "proj.0.reparam_conv.": "proj.0.lkb_reparam.", "pos_enc.": "pe.", "mlp.": "convffn.",
    ".gamma": "", "final_conv.se.fc1.": "conv_exp.se.reduce.", "final_conv.se.fc2.": "conv_exp.se.expand.",
    "final_conv.": "conv_exp.", "head.fc.": "head.",
}  # fmt: skip


def apple_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, of either form, under apple's names: what the stages consist of is one flat `network`."""
    parts = {tuple(key.split(".")[1:3]) for key in state if key.startswith("stages.")}
    order = sorted(parts, key=lambda part: (int(part[0]), ("downsample", "pos_emb", "blocks").index(part[1])))
    renamed = {}
    for key, value in state.items():
        for timms, apples in APPLE.items():
            key = key.replace(timms, apples)
        if key.startswith("stages."):
            _, stage, part, rest = key.split(".", 3)
            key = f"network.{order.index((stage, part))}.{rest}"
        renamed[key] = value
    return renamed


def build_fastvit() -> FastViT:
    """Three stages for grey images, 32x32 pixels: the maps are 8, 4 and 2 wide. Two heads of attention in the last one."""
    return FastViT(
        layers=(1, 1, 1), widths=(16, 32, 64), classes=10, channels=1, mlp_ratio=2, attention=1, positions=1, layer_scale=0.5
    )
