"""The sample models: what is trained on digits, on images of which size, and what the paper's training script saves."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sample_models import acnet, dbb, orepa, resrep
from sample_models.backbones import CifarResNet, ResNet, repeated
from sample_models.fastvit import build_fastvit
from sample_models.mobileone import MobileOne
from sample_models.repconv import classifier, save_whole
from sample_models.repghost import RepGhostNet, Row
from sample_models.replknet import RepLKNet
from sample_models.repmlp import RepMLPNet
from sample_models.repvgg import RepVGG
from sample_models.repvit import build_repvit

CHECKPOINTS = Path(__file__).parent / "checkpoints"


@dataclass(frozen=True, slots=True)
class Sample:
    """`side`: of the images; `save`: writes (model, path, epochs, name) as the repository does; `options`: facts that
    `repdeploy convert` must be told with --set."""

    family: str
    build: Callable[[], nn.Module]
    save: Callable[[nn.Module, Path, int, str], None]
    side: int = 16
    epochs: int = 60
    options: tuple[str, ...] = ()
    suffix: str = ".pth"

    def checkpoint(self, name: str) -> Path:
        """The one that was trained for this repository."""
        return CHECKPOINTS / f"{name}_digits{self.suffix}"


def save_state_dict(model: nn.Module, path: Path, epochs: int, name: str) -> None:
    """{epoch, arch, state_dict}: the training scripts of RepVGG (2021), DBB and OREPA, without the optimizer."""
    torch.save({"epoch": epochs, "arch": f"{name}-digits", "state_dict": model.state_dict()}, path)


def save_bare(model: nn.Module, path: Path, epochs: int, name: str) -> None:
    """The state dict itself: most released weights."""
    torch.save(model.state_dict(), path)


def save_hdf5(model: nn.Module, path: Path, epochs: int, name: str) -> None:
    """finish.hdf5 of ACNet's and ResRep's training engine."""
    acnet.save_hdf5(model.state_dict(), path)


def save_timm(model: nn.Module, path: Path, epochs: int, name: str) -> None:
    """What timm's CheckpointSaver writes, the parsed arguments included."""
    arguments = Namespace(model=name, epochs=epochs)
    torch.save({"epoch": epochs, "arch": name, "state_dict": model.state_dict(), "args": arguments, "version": 2}, path)


def save_replknet(model: nn.Module, path: Path, epochs: int, name: str) -> None:
    """{model, epoch, args}: RepLKNet's trainer, without the optimizer."""
    torch.save({"model": model.state_dict(), "epoch": epochs, "args": Namespace(model=name)}, path)


def save_repmlp(model: nn.Module, path: Path, epochs: int, name: str) -> None:
    """RepMLP's trainer, whose optimizer and schedule remember nothing here; its config is a plain dictionary."""
    progress = {"optimizer": {}, "lr_scheduler": {}, "max_accuracy": 0.0, "epoch": epochs, "config": {"MODEL": {"ARCH": name}}}
    torch.save({"model": model.state_dict(), **progress}, path)


def build_repvgg() -> nn.Module:
    """Narrow, every second layer in two groups, for grey images: five strides leave a 1x1 map of the 16x16 pixels."""
    return RepVGG(blocks=(1, 2, 3, 1), widths=(12, 16, 24, 32, 64), classes=10, channels=1, groups=2, strides=(2, 2, 2, 2, 2))


def build_acnet() -> nn.Module:
    """A ResNet-14 for small images; its head averages over a fixed 8x8 window, which 32x32 pixels fill."""
    blocks = repeated((2, 2, 2), ((8, 8), (16, 16), (24, 24)))
    return CifarResNet(acnet.Layers(), blocks, classes=10, channels=1)


def build_dbb() -> nn.Module:
    """A narrow ResNet-10: the last of its maps are 1x1."""
    return ResNet(dbb.TRAINING, (1, 1, 1, 1), (8, 8, 12, 16, 24), classes=10, channels=1)


def build_orepa() -> nn.Module:
    """A narrow ResNet-10 whose stem stacks three 3x3 kernels."""
    return ResNet(orepa.Layers(), (1, 1, 1, 1), (8, 8, 12, 16, 24), classes=10, channels=1)


def build_mobileone() -> nn.Module:
    """Three copies of each convolution, squeeze-excite in the last stage."""
    return MobileOne(
        blocks=(1, 2, 2, 1), widths=(12, 16, 24, 32, 48), classes=10, channels=1, copies=3, squeeze_excite=(0, 0, 0, 1)
    )


def build_repghost() -> nn.Module:
    """One stride per stage, squeeze-excite in two of them; the identity is fused, which no key tells."""
    stages = [
        [Row(3, 12, 12, False, 1)],
        [Row(3, 20, 16, False, 2), Row(3, 24, 16, False, 1)],
        [Row(5, 28, 24, True, 2), Row(5, 32, 24, True, 1)],
    ]
    return RepGhostNet(stages, stem=12, last=48, hidden=64, classes=10, channels=1, fusion="identity")


def build_replknet() -> nn.Module:
    """Kernels as large as the maps: 7 and 5 on 4x4 and 2x2."""
    return RepLKNet(kernels=(7, 5), layers=(2, 1), channels=(16, 32), classes=10, small_kernel=3, ffn_ratio=2, in_channels=1)


def build_repmlp() -> nn.Module:
    """Four tiles of 4x4 pixels in the first stage, which mix with the four channels of a share set; one in the second."""
    return RepMLPNet(
        channels=(16, 32), units=(1, 1), tiles=((4, 4), (4, 4)), share_sets=(4, 8), classes=10, patch=2, in_channels=1
    )


def build_resrep() -> nn.Module:
    """ACNet's network with wider blocks, of whose first convolutions training is to forget more than half."""
    blocks = repeated((2, 2, 2), ((16, 8), (24, 16), (32, 24)))
    model = CifarResNet(resrep.TRAINING, blocks, classes=10, channels=1)
    return resrep.compacted(model, resrep.inner_layers(model))


SAMPLES: dict[str, Sample] = {
    "acnet": Sample("acnet", build_acnet, save_hdf5, side=32, epochs=10, suffix=".hdf5"),
    "dbb": Sample("dbb", build_dbb, save_state_dict, epochs=25),
    "fastvit": Sample("fastvit", build_fastvit, save_timm, side=32, epochs=10),
    "mobileone": Sample("mobileone", build_mobileone, save_bare, epochs=30),
    "orepa": Sample("orepa", build_orepa, save_state_dict, epochs=30),
    "repconv": Sample("repconv", partial(classifier, 12, 10), save_whole, epochs=40),
    "repghost": Sample("repghost", build_repghost, save_timm, epochs=15, options=("fusion=identity",)),
    "replknet": Sample("replknet", build_replknet, save_replknet, epochs=12),
    "repmlp": Sample("repmlp", build_repmlp, save_repmlp, epochs=20),
    "repvit": Sample("repvit", build_repvit, save_bare, side=32, epochs=12),
    "repvgg": Sample("repvgg", build_repvgg, save_state_dict),
    "resrep": Sample("resrep", build_resrep, save_hdf5, side=32, epochs=10, suffix=".hdf5"),
}
