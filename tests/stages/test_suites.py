"""The paper's suite: networks of the right size that run, its numbers, and its comparisons."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from repdeploy.errors import UsageError
from repdeploy.measurements import SpeedRatio, SuiteRow, Timing, read_json
from repdeploy.records import TensorShape, plain
from repdeploy.suites import REPVGG_PAPER, SuiteNetwork, flops, speed_ratios, suite
from sample_models import dbb
from sample_models.backbones import ResNet

OFFICIAL = {
    "RepVGG-A0": 8_309_384, "RepVGG-A1": 12_789_864, "RepVGG-A2": 25_499_944, "RepVGG-B0": 14_339_048, "RepVGG-B1": 51_829_480,
    "ResNet-18": 11_684_712, "ResNet-34": 21_789_160, "ResNet-50": 25_530_472, "VGG-16": 138_357_544,
}  # fmt: skip
"""Parameters of what the repositories' deploy models and torchvision's VGG-16 hold."""
EVERY = [pytest.param(item, id=item.name) for item in REPVGG_PAPER.networks]


def narrow(network: SuiteNetwork, factor: int = 16) -> SuiteNetwork:
    """The same network with a fraction of its channels."""
    shapes = {
        key: TensorShape(tuple(size // factor if size % 64 == 0 else size for size in item.shape), item.dtype)
        for key, item in network.shapes.items()
    }
    return replace(network, shapes=shapes)


@pytest.mark.parametrize("network", EVERY)
def test_networks_have_the_papers_parameters(network: SuiteNetwork) -> None:
    assert network.parameters == OFFICIAL[network.name]
    assert math.floor(network.parameters / 1e4) / 100 == network.paper.parameters  # printed with two digits, the rest cut off


def test_the_suite_holds_what_the_paper_compares() -> None:
    assert {item.name for item in REPVGG_PAPER.networks} == set(OFFICIAL)
    speeds = [item.paper.speed for item in REPVGG_PAPER.networks]
    assert speeds == sorted(speeds, reverse=True)


@pytest.mark.parametrize(("name", "inner"), [("ResNet-18", None), ("ResNet-50", (64, 128, 256, 512))])
def test_resnets_have_the_repositorys_layout(name: str, inner: Sequence[int] | None) -> None:
    depths, widths = ((2, 2, 2, 2), (64, 64, 128, 256, 512)) if inner is None else ((3, 4, 6, 3), (64, 256, 512, 1024, 2048))
    model = ResNet(dbb.DEPLOYED, depths, widths, 1000, inner=inner)
    ours = {key: item.shape for key, item in REPVGG_PAPER.entry(name).shapes.items()}
    assert ours == {key: tuple(value.shape) for key, value in model.state_dict().items()}


@pytest.mark.parametrize("name", ["RepVGG-A0", "ResNet-18"])
def test_activations_are_of_order_one(name: str) -> None:
    """So neither denormals nor infinities distort a timing, in float16 either."""
    network = REPVGG_PAPER.entry(name).build()
    seen: list[float] = []
    for module in network.modules():
        if getattr(getattr(module, "weight", None), "ndim", 0) > 1:
            module.register_forward_hook(lambda _, inputs, output: seen.append(float(output.square().mean().sqrt())))
    with torch.no_grad():
        output = network(torch.randn(1, *REPVGG_PAPER.image, generator=torch.Generator().manual_seed(0)))
    assert output.shape == (1, 1000)
    assert output.dtype == torch.float32
    assert not network.training
    assert len(seen) == sum(key.endswith(".weight") for key in REPVGG_PAPER.entry(name).shapes)
    assert min(seen) > 0.1
    assert max(seen) < 10


@pytest.mark.parametrize("name", ["RepVGG-A0", "RepVGG-B0", "ResNet-18", "ResNet-50"])
def test_theoretical_flops_are_the_papers(name: str) -> None:
    network = REPVGG_PAPER.entry(name)
    multiply_adds = flops(network.build(), REPVGG_PAPER.image) / 2 / 1e9
    if name == "ResNet-50":  # a stride on the 1x1 convolution in front of the 3x3 would be the paper's network
        assert f"{multiply_adds:.1f} thousand million" in REPVGG_PAPER.notes[0]
        for inputs, outputs, side in ((256, 128, 56), (512, 256, 28), (1024, 512, 14)):
            multiply_adds -= inputs * outputs * side**2 * 3 / 4 / 1e9
    assert multiply_adds == pytest.approx(network.paper.multiply_adds, abs=0.05)  # printed with one digit


def test_vgg_16_is_thirteen_convolutions_and_three_layers() -> None:
    """Against torch's own layers on the same numbers, with a sixteenth of the channels."""
    network = narrow(REPVGG_PAPER.entry("VGG-16")).build()
    layers: list[nn.Module] = []
    inputs = 3
    for depth, width in zip((2, 2, 3, 3, 3), (4, 8, 16, 32, 32), strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        layers.append(nn.MaxPool2d(2, 2))
    layers += [nn.Flatten(), nn.Linear(32 * 49, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1000)]
    like = nn.Sequential(*layers).eval()
    like.load_state_dict(dict(zip(like.state_dict(), network.state_dict().values(), strict=True)))
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(network(x), like(x))
    assert flops(network, (3, 224, 224)) == flops(like, (3, 224, 224))


def test_weights_are_the_same_each_time() -> None:
    network = narrow(REPVGG_PAPER.entry("RepVGG-A1"))
    first, second = (network.build().state_dict() for _ in range(2))
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_flops_count_multiplications_and_additions() -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grouped, self.head = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.grouped(x).mean((2, 3)))
            return y

    network = Small()
    assert flops(network, (4, 9, 7)) == 2 * (6 * 5 * 4 * 2 * 9 + 6 * 5)
    assert not any(module._forward_hooks for module in network.modules())


def row(network: str, seconds: Sequence[float], batch: int = 8, runtime: str = "torch") -> SuiteRow:
    timing = Timing(network, runtime, "cpu", "float32", 1, batch, (batch, 3, 224, 224), tuple(seconds), 3, True)
    return SuiteRow(network, 1, 1, runtime, timing)


def test_ratios_stand_beside_the_papers() -> None:
    rows = [
        row("RepVGG-A0", [0.5] * 20),
        row("ResNet-18", [2.0] * 20, batch=16),
        row("RepVGG-A1", [1.0] * 20),
        SuiteRow("ResNet-34", 1, 1, "torch", missing="out of memory"),
        row("RepVGG-A2", [1.0] * 20, runtime="onnxruntime"),
    ]
    found = speed_ratios(rows, REPVGG_PAPER)
    assert [item.runtime for item in found] == ["torch"] * 4 + ["onnxruntime"] * 4
    assert found[0].measured is not None
    assert found[0].measured.ratio == 2.0  # 16 images a second beside 8: per image, whatever the batch
    assert all(item.measured is None for item in found[1:])
    assert read_json(SpeedRatio, plain(found[0])) == found[0]


def test_the_tables_speeds_give_the_texts_percentages() -> None:
    stated = 0
    for item in speed_ratios([row("RepVGG-A0", [1.0])], REPVGG_PAPER):
        percent = re.search(r"(\d+) % faster", item.source)
        if percent:
            stated += 1
            assert math.floor((item.paper - 1) * 100) == int(percent[1])
    assert stated == 3


def test_unknown_names_list_what_there_is() -> None:
    assert suite("repvgg-paper") is REPVGG_PAPER
    with pytest.raises(UsageError) as reason:
        suite("resnet-paper")
    assert "repvgg-paper" in reason.value.hint
    with pytest.raises(UsageError) as reason:
        REPVGG_PAPER.entry("RepVGG-B3")
    assert "RepVGG-B1" in reason.value.hint
