"""Small training-time networks and their checkpoints, with batch-norm statistics far from their defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import repdeploy
from repdeploy.checkpoint import load
from repdeploy.facts import Facts, Setting
from repdeploy.network import Network, describe
from repdeploy.rebuild import reader
from repdeploy.recognise import recognise
from repdeploy.registry import families
from sample_models.repvgg import RepVGG
from sample_models.scatter import scatter

State = Mapping[str, Tensor]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
SMALL: dict[str, Any] = {"blocks": (1, 2, 1, 1), "widths": (4, 8, 8, 12, 16), "classes": 5}


def repvgg(seed: int = 0, **changes: Any) -> RepVGG:
    torch.manual_seed(seed)
    model = scatter(RepVGG(**{**SMALL, **changes}), seed)
    assert isinstance(model, RepVGG)
    return model


def described(path: Path, *settings: Setting, squeezed: bool = True, image: tuple[int, int, int] | None = None) -> Network:
    """The network in a file, in float64: its training-time expressions or its fused convolutions. Fails where none is known."""
    checkpoint = load(path)
    facts = Facts(settings, checkpoint.attributes)
    found = recognise(checkpoint.tensors, families(), facts, input_shape=image)
    assert found.plan is not None, found.skeletons
    described = describe(found.plan, reader(checkpoint.tensors), facts)
    return described.network(squeezed=squeezed, dtype=torch.float64)


def assert_described(
    model: nn.Module, path: Path, *settings: Setting, sizes: Sequence[tuple[int, int]], channels: int = 3
) -> None:
    """Both readings of the network in `path` are the module, in float64, on images of these sizes."""
    model = model.double().eval()
    readings = [described(path, *settings, squeezed=squeezed) for squeezed in (False, True)]
    for height, width in sizes:
        generator = torch.Generator().manual_seed(height * width)
        x = torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            wanted = model(x)
            for got in (reading(x) for reading in readings):
                assert got.shape == wanted.shape
                assert float((got - wanted).abs().max()) <= 1e-11 * float(wanted.abs().max()), (height, width)


def load_renamed(model: nn.Module, rename: Callable[[State], State], state: State) -> None:
    """Load weights whose names `rename` makes of the module's own, strictly."""
    own = dict(zip(rename(model.state_dict()), model.state_dict(), strict=True))
    assert sorted(state) == sorted(own)
    model.load_state_dict({own[key]: value for key, value in state.items()}, strict=True)


def written(path: Path, **options: Any) -> dict[str, Tensor]:
    """Convert a file; its deploy weights, in float64."""
    bundle = path.with_suffix(".repdeploy")
    assert repdeploy.convert(path, output=bundle, dtype="float64", **options).manifest.verdict.passed
    return dict(load_file(bundle / "weights.safetensors"))


def trained_numbers(state: Mapping[str, Tensor]) -> int:
    """How many parameters there are; statistics and counters are none."""
    return sum(value.numel() for key, value in state.items() if not key.endswith(STATISTICS))


def save(model: nn.Module, path: Path) -> Path:
    torch.save(model.state_dict(), path)
    return path


TIMM = {
    "stage0.": "stem.", "stage1.": "stages.0.", "stage2.": "stages.1.", "stage3.": "stages.2.", "stage4.": "stages.3.",
    "rbr_dense": "conv_kxk", "rbr_1x1": "conv_1x1", "rbr_identity": "identity", "linear.": "head.fc.",
}  # fmt: skip


def timm_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under timm's names."""
    renamed = {}
    for key, value in state.items():
        for ours, theirs in TIMM.items():
            key = key.replace(ours, theirs)
        renamed[key] = value
    return renamed


def blocks_inside_a_detector(seed: int = 0) -> dict[str, Tensor]:
    """RepVGG blocks among layers of an unknown network, a bare conv + bn pair among them."""
    state = {f"backbone.{key}": value for key, value in repvgg(seed).state_dict().items() if not key.startswith("linear")}
    generator = torch.Generator().manual_seed(seed)
    state["head.conv.weight"] = torch.randn(8, 16, 3, 3, generator=generator)
    for name, value in scatter(nn.BatchNorm2d(8), seed).state_dict().items():
        state[f"head.bn.{name}"] = value
    state["anchors"] = torch.randn(3, 2, generator=generator)
    state["mask"] = torch.full((4, 4), float("-inf"))
    return state
