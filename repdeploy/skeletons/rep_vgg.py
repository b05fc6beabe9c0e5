"""The RepVGG topology (arXiv:2101.03697, section 3.4): a stem and stages of blocks, each followed by a ReLU.

Stem and the first block of every stage have stride 2. Three ways of naming: RepVGG, RepVGGplus (stage 3 in two halves,
auxiliary heads that serve training only) and timm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from repdeploy.errors import NotRecognised
from repdeploy.skeletons.attention import squeeze_excite
from repdeploy.skeletons.layers import averaged
from repdeploy.skeletons.net import Architecture, Net, Skeleton


@dataclass(frozen=True, slots=True)
class Naming:
    """Each stage is a tuple of names because RepVGGplus splits stage 3, whose second half does not stride."""

    stem: str
    stages: tuple[tuple[str, ...], ...]
    head: str


NAMINGS = (
    Naming("stage0", (("stage1",), ("stage2",), ("stage3",), ("stage4",)), "linear"),
    Naming(
        "stage0",
        (("stage1.blocks",), ("stage2.blocks",), ("stage3_first.blocks", "stage3_second.blocks"), ("stage4.blocks",)),
        "linear",
    ),
    Naming("stem", (("stages.0",), ("stages.1",), ("stages.2",), ("stages.3",)), "head.fc"),
)
AUXILIARY = ("stage1_aux", "stage2_aux", "stage3_first_aux")


def forward(net: Net, x: Tensor) -> Tensor:
    """(batch, channels, height, width) -> logits (batch, classes). Raises NotRecognised where no naming fits."""
    naming = next((item for item in NAMINGS if item.stem in net and item.head in net and net.children(item.stages[0][0])), None)
    if naming is None:
        raise NotRecognised("no stem (stage0, stem), stages (stage1.0, stage1.blocks.0, stages.0.0) and head (linear, head.fc)")
    for name in AUXILIARY:
        net.drop(name, "auxiliary head: serves training only")
    x = block(net, naming.stem, x, stride=2)
    for stage in naming.stages:
        for index, name in enumerate(child for half in stage for child in net.children(half)):
            x = block(net, name, x, stride=2 if index == 0 else 1)
    return averaged(net, x, naming.head)


def block(net: Net, name: str, x: Tensor, stride: int) -> Tensor:
    """The slot, squeeze-excite before (RepVGG and MobileOne `se`, timm `attn`) or after (RepVGGplus `post_se`) the ReLU."""
    x = net.at(name, x, stride=stride)
    if f"{name}.se.down" in net:
        x = squeeze_excite(net, f"{name}.se", x, reduce="down", expand="up", square_window=True)
    elif f"{name}.se" in net:
        x = squeeze_excite(net, f"{name}.se", x, reduce="reduce", expand="expand")
    elif f"{name}.attn" in net:
        x = squeeze_excite(net, f"{name}.attn", x, reduce="fc1", expand="fc2")
    x = F.relu(x)
    if f"{name}.post_se" in net:
        x = squeeze_excite(net, f"{name}.post_se", x, reduce="down", expand="up", square_window=True)
    return x


REP_VGG = Skeleton("rep_vgg", forward, stems=("stage0", "stem"))


def rep_vgg_variants(*names: str) -> dict[str, Architecture]:
    """RepVGG-A0 ... D2se (section 3.4, table 2), all of them or those that are named."""
    return {
        f"RepVGG-{name}": Architecture(DEPTHS[name[0]], width) for name, width in WIDTHS.items() if not names or name in names
    }


WIDTHS = {
    "A0": (48, 48, 96, 192, 1280), "A1": (64, 64, 128, 256, 1280), "A2": (64, 96, 192, 384, 1408),
    "B0": (64, 64, 128, 256, 1280), "B1": (64, 128, 256, 512, 2048), "B2": (64, 160, 320, 640, 2560),
    "B3": (64, 192, 384, 768, 2560), "D2se": (64, 160, 320, 640, 2560),
}  # fmt: skip
DEPTHS = {"A": (1, 2, 4, 14, 1), "B": (1, 4, 6, 16, 1), "D": (1, 8, 14, 24, 1)}
