"""RepViT with the official key names (arXiv:2307.09283, section 3), in training and in deploy form; timm's names on request."""

from __future__ import annotations

from bisect import bisect
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from sample_models.backbones import ChannelGate


def conv_norm(inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, deploy: bool = False) -> nn.Module:
    """A convolution `c` and its norm `bn`; in deploy form the one biased convolution, a level of names higher."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=deploy)
    return conv if deploy else nn.Sequential(OrderedDict[str, nn.Module](c=conv, bn=nn.BatchNorm2d(outputs)))


class SqueezeExcite(ChannelGate):
    """The map times its gate."""

    def forward(self, x: Tensor) -> Tensor:
        return x * super().forward(x)


def quarter(channels: int) -> int:
    """A fourth of the channels, rounded to a multiple of 8, at least 8."""
    return max(8, (channels // 4 + 4) // 8 * 8)


class RepVGGDW(nn.Module):
    """A depthwise convolution, a 1x1 and the input itself, summed.

    The first is normalised, and so is the sum; in the `legacy` form both convolutions are, and the sum is not.
    """

    def __init__(self, channels: int, kernel: int, legacy: bool) -> None:
        super().__init__()
        self.conv = conv_norm(channels, channels, kernel, groups=channels)
        self.conv1 = (
            conv_norm(channels, channels, groups=channels) if legacy else nn.Conv2d(channels, channels, 1, groups=channels)
        )
        self.bn = None if legacy else nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.conv(x) + self.conv1(x) + x
        return total if self.bn is None else self.bn(total)


class Residual(nn.Module):
    """1x1 to twice the channels, exact GELU, 1x1 back, beside the input."""

    def __init__(self, channels: int, deploy: bool) -> None:
        super().__init__()
        rows = conv_norm(channels, 2 * channels, deploy=deploy), nn.GELU(), conv_norm(2 * channels, channels, deploy=deploy)
        self.m = nn.Sequential(*rows)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.m(x)
        return x + y


class RepViTBlock(nn.Sequential):
    """Mixes tokens, then channels. `outputs`: the block strides by 2 and ends with that many channels."""

    def __init__(self, inputs: int, outputs: int | None, kernel: int, squeeze_excite: bool, legacy: bool, deploy: bool) -> None:
        gate = SqueezeExcite(inputs, quarter(inputs)) if squeeze_excite else nn.Identity()
        if outputs is not None:
            spatial = conv_norm(inputs, inputs, kernel, 2, inputs, deploy)
            tokens = nn.Sequential(spatial, gate, conv_norm(inputs, outputs, deploy=deploy))
        elif deploy:
            tokens = nn.Sequential(conv_norm(inputs, inputs, kernel, 1, inputs, deploy), gate)
        else:
            tokens = nn.Sequential(RepVGGDW(inputs, kernel, legacy), gate)
        channels = Residual(outputs or inputs, deploy)
        super().__init__(OrderedDict[str, nn.Module](token_mixer=tokens, channel_mixer=channels))


def norm_linear(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(bn=nn.BatchNorm1d(channels), l=nn.Linear(channels, classes)))


class Classifier(nn.Module):
    """The mean of one or two normalised linear layers: (batch, channels) -> (batch, classes)."""

    def __init__(self, channels: int, classes: int, distilled: bool) -> None:
        super().__init__()
        self.classifier = norm_linear(channels, classes)
        self.classifier_dist = norm_linear(channels, classes) if distilled else None

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(x)
        return logits if self.classifier_dist is None else (logits + self.classifier_dist(x)) / 2


class RepViT(nn.Module):
    """`depths`: blocks per stage, the even ones with squeeze-excite; `widths`: their channels.

    The stem divides height and width by 4. Between two stages stand one block more, without squeeze-excite, and one that
    strides by 2. `distilled`: two heads; `legacy`: the form of the first release. `deploy`: no norm is left.
    """

    def __init__(
        self, depths: Sequence[int], widths: Sequence[int], classes: int, channels: int = 3,
        distilled: bool = True, legacy: bool = False, kernel: int = 3, deploy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        inputs = widths[0]
        halved = conv_norm(channels, inputs // 2, 3, 2, deploy=deploy)
        rows: list[nn.Module] = [nn.Sequential(halved, nn.GELU(), conv_norm(inputs // 2, inputs, 3, 2, deploy=deploy))]
        for stage, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            if stage > 0:
                rows.append(RepViTBlock(inputs, None, kernel, False, legacy, deploy))
                rows.append(RepViTBlock(inputs, width, kernel, False, legacy, deploy))
            rows.extend(RepViTBlock(width, None, kernel, index % 2 == 0, legacy, deploy) for index in range(depth))
            inputs = width
        self.features = nn.Sequential(*rows)
        self.classifier = nn.Linear(inputs, classes) if deploy else Classifier(inputs, classes, distilled)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width) -> logits (batch, classes)."""
        logits: Tensor = self.classifier(self.features(x).mean((2, 3)))
        return logits


STEM = {"0.": "conv1.", "2.": "conv2."}
BLOCK = {
    "token_mixer.0.": "token_mixer.", "token_mixer.1.": "se.",
    "channel_mixer.m.0.": "channel_mixer.conv1.", "channel_mixer.m.2.": "channel_mixer.conv2.",
}  # fmt: skip
STRIDED = {
    "token_mixer.0.": "spatial_downsample.", "token_mixer.2.": "channel_downsample.",
    "channel_mixer.m.0.": "ffn.conv1.", "channel_mixer.m.2.": "ffn.conv2.",
}  # fmt: skip
HEAD = {"classifier.classifier.": "head.head.", "classifier.classifier_dist.": "head.head_dist.", "classifier.": "head."}


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, of either form, under timm's names: stages, whose last block is the next one's `pre_block`."""
    strided = sorted({int(key.split(".")[1]) for key in state if key.startswith("features.") and ".token_mixer.2." in key})
    renamed = {}
    for key, value in state.items():
        root, number, rest = key.split(".", 2) if key.startswith("features.") else ("", "0", key)
        index = int(number)
        stage = bisect(strided, index)
        if not root:
            name = _first(rest, HEAD)
        elif index == 0:
            name = f"stem.{_first(rest, STEM)}"
        elif index in strided:
            name = f"stages.{stage}.downsample.{_first(rest, STRIDED)}"
        elif index + 1 in strided:
            name = f"stages.{stage + 1}.downsample.pre_block.{_first(rest, BLOCK)}"
        else:
            name = f"stages.{stage}.blocks.{index - ([0, *strided][stage] + 1)}.{_first(rest, BLOCK)}"
        renamed[name] = value
    return renamed


def _first(name: str, table: Mapping[str, str]) -> str:
    """The name with the first of the beginnings that it has replaced."""
    start = next(start for start in table if name.startswith(start))
    return table[start] + name.removeprefix(start)


def build_repvit() -> RepViT:
    """Four stages for grey images, 32x32 pixels: the maps are 8, 4, 2 and 1 wide. Two heads."""
    return RepViT(depths=(1, 1, 2, 1), widths=(16, 24, 32, 48), classes=10, channels=1)
