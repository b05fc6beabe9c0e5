"""MobileOne with apple's key names (arXiv:2206.04040, section 3.2), in training and in deploy form; timm's names on request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from sample_models.repvgg import ConvNorm


class SqueezeExcite(nn.Module):
    """A gate per channel from the mean over the whole map, a sixteenth as wide inside."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inside = max(channels // 16, 1)
        self.reduce = nn.Conv2d(channels, inside, 1)
        self.expand = nn.Conv2d(inside, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True))))
        return x * gate.sigmoid()


class MobileOneBlock(nn.Module):
    """Copies of one convolution, a 1x1 beside a larger kernel, the normalised input where shapes allow; summed, then ReLU.

    x (batch, inputs, height, width) -> (batch, outputs, ceil(height / stride), ceil(width / stride)). `deploy`: all of
    them as the one biased convolution `reparam_conv`.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1,
        copies: int = 1, squeeze_excite: bool = False, deploy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.reparam_conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups) if deploy else None
        if not deploy:
            self.rbr_conv = nn.ModuleList(ConvNorm(inputs, outputs, kernel, stride, groups) for _ in range(copies))
            self.rbr_scale = ConvNorm(inputs, outputs, 1, stride, groups) if kernel > 1 else None
            self.rbr_skip = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.se = SqueezeExcite(outputs) if squeeze_excite else None

    def forward(self, x: Tensor) -> Tensor:
        total = self.branches(x) if self.reparam_conv is None else self.reparam_conv(x)
        return F.relu(total if self.se is None else self.se(total))

    def branches(self, x: Tensor) -> Tensor:
        total: Tensor = self.rbr_conv[0](x)
        for branch in (*self.rbr_conv[1:], self.rbr_scale, self.rbr_skip):
            total = total if branch is None else total + branch(x)
        return total


class MobileOne(nn.Module):
    """`blocks`: pairs of a depthwise 3x3 and a dense 1x1 in stages 1 to 4; `widths`: of the stem and stages 1 to 4;
    `copies`: of the convolution in every block but the stem; `squeeze_excite`: the last pairs of each stage that have it.

    The stem and the first pair of every stage halve the map.
    """

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], classes: int, channels: int = 3, copies: int = 1,
        squeeze_excite: Sequence[int] = (0, 0, 0, 0), deploy: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.stage0 = MobileOneBlock(channels, widths[0], 3, 2, deploy=deploy)
        inputs = widths[0]
        for stage, (count, outputs, gated) in enumerate(zip(blocks, widths[1:], squeeze_excite, strict=True), 1):
            rows = nn.Sequential()
            for index in range(count):
                gate = index >= count - gated
                rows.append(MobileOneBlock(inputs, inputs, 3, 2 if index == 0 else 1, inputs, copies, gate, deploy))
                rows.append(MobileOneBlock(inputs, outputs, 1, 1, 1, copies, gate, deploy))
                inputs = outputs
            self.add_module(f"stage{stage}", rows)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width) -> logits (batch, classes)."""
        for stage in range(5):
            x = self.get_submodule(f"stage{stage}")(x)
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


TIMM = {
    "stage0.": "stem.", "stage1.": "stages.0.", "stage2.": "stages.1.", "stage3.": "stages.2.", "stage4.": "stages.3.",
    "rbr_conv.": "conv_kxk.", "rbr_scale.": "conv_scale.", "rbr_skip.": "identity.",
    "se.reduce.": "attn.fc1.", "se.expand.": "attn.fc2.", "linear.": "head.fc.",
}  # fmt: skip


def timm_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, of either form, under timm's names."""
    renamed = {}
    for key, value in state.items():
        for apples, timms in TIMM.items():
            key = key.replace(apples, timms)
        renamed[key] = value
    return renamed
