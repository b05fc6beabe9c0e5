"""RepVGG in training form, with the official key names (arXiv:2101.03697): what a paper's repository would save."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNorm(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, groups: int) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
        super().__init__(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outputs)))


class SqueezeExcite(nn.Module):
    """A gate per channel from the mean over a square of the map's width, as the paper's repository has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(channels, max(channels // 16, 1), 1)
        self.up = nn.Conv2d(max(channels // 16, 1), channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate: Tensor = self.up(F.relu(self.down(F.avg_pool2d(x, x.shape[3]))))
        return x * gate.sigmoid()


class RepVGGBlock(nn.Module):
    """Three branches, summed; squeeze-excite if asked for; ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int = 1, squeeze_excite: bool = False) -> None:
        super().__init__()
        self.rbr_identity = nn.BatchNorm2d(inputs) if inputs == outputs and stride == 1 else None
        self.rbr_dense = ConvNorm(inputs, outputs, 3, stride, groups)
        self.rbr_1x1 = ConvNorm(inputs, outputs, 1, stride, groups)
        self.se = SqueezeExcite(outputs) if squeeze_excite else None

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.rbr_dense(x) + self.rbr_1x1(x)
        if self.rbr_identity is not None:
            total = total + self.rbr_identity(x)
        return F.relu(total if self.se is None else self.se(total))


class RepVGG(nn.Module):
    """`blocks`: of stages 1 to 4; `widths`: of the stem and stages 1 to 4; every second layer has `groups` groups."""

    def __init__(
        self, blocks: Sequence[int], widths: Sequence[int], classes: int, channels: int = 3, groups: int = 1,
        squeeze_excite: bool = False, strides: Sequence[int] = (2, 2, 2, 2, 2),
    ) -> None:  # fmt: skip
        super().__init__()
        self.stage0 = RepVGGBlock(channels, widths[0], strides[0], 1, squeeze_excite)
        layer = 1
        for stage, (count, inputs, outputs) in enumerate(zip(blocks, widths, widths[1:], strict=False), 1):
            rows = []
            for index in range(count):
                first = index == 0
                rows.append(
                    RepVGGBlock(
                        inputs if first else outputs,
                        outputs,
                        strides[stage] if first else 1,
                        groups if layer % 2 == 0 else 1,
                        squeeze_excite,
                    )
                )
                layer += 1
            self.add_module(f"stage{stage}", nn.Sequential(*rows))
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """x (batch, channels, height, width) -> logits (batch, classes)."""
        x = self.stage0(x)
        for stage in range(1, 5):
            x = self.get_submodule(f"stage{stage}")(x)
        logits: Tensor = self.linear(torch.mean(x, (2, 3)))
        return logits


class DeployRepVGG(nn.Module):
    """The deploy form as the paper's repository builds it: one 3x3 convolution per block, named rbr_reparam."""

    def __init__(self, trained: RepVGG) -> None:
        super().__init__()
        for name, block in trained.named_modules():
            if isinstance(block, RepVGGBlock):
                dense = block.rbr_dense[0]
                assert isinstance(dense, nn.Conv2d)
                fused = nn.Conv2d(dense.in_channels, dense.out_channels, 3, dense.stride[0], 1, groups=dense.groups)
                parts: OrderedDict[str, nn.Module] = OrderedDict(rbr_reparam=fused)
                if block.se is not None:
                    parts["se"] = SqueezeExcite(dense.out_channels)
                _place(self, name, nn.Sequential(parts))
        self.linear = nn.Linear(trained.linear.in_features, trained.linear.out_features)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.get_submodule("stage0")(x))
        for stage in range(1, 5):
            for block in self.get_submodule(f"stage{stage}").children():
                x = F.relu(block(x))
        logits: Tensor = self.linear(x.mean((2, 3)))
        return logits


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    """Register a module under a dotted name, making the levels between."""
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(last, module)
