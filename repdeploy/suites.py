"""The networks that a paper compares, to be measured side by side: `repvgg-paper` is table 4 of RepVGG (arXiv:2101.03697).

No network is written here a second time: RepVGGs and ResNets are skeletons over the shapes of their deploy layouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor, nn

from repdeploy import registry
from repdeploy.algebra import Conv
from repdeploy.checkpoint import StoredTensor
from repdeploy.errors import UsageError
from repdeploy.measurements import Interval, SpeedRatio, SuiteRow
from repdeploy.network import ConvLayer, LinearLayer
from repdeploy.rebuild import Image, rebuilt, synthetic
from repdeploy.records import TensorShape
from repdeploy.skeletons import VGG_16, Architecture, rep_vgg_variants, resnet_variants
from repdeploy.skeletons.plain import POOLED
from repdeploy.statistics import apart, speedup

CLASSES = 1000
IMAGE: Image = (3, 224, 224)
KEEPS_MAGNITUDE = math.sqrt(2)
"""For weights in front of a ReLU, which halves the second moment (He et al., arXiv:1502.01852, equation 10). Without it the
last maps of RepVGG-A0 are 3e-4 of the first; a residual sum adds back what is lost."""
Shapes = Mapping[str, TensorShape]
Tensors = Mapping[str, StoredTensor]


@dataclass(frozen=True, slots=True)
class Published:
    """A row of table 4. `speed`: images per second; `parameters` in millions and `multiply_adds` ("Theo FLOPs") in thousand
    millions, both as printed: the parameters are cut off, not rounded, and are those of the deploy form."""

    speed: float
    parameters: float
    multiply_adds: float


@dataclass(frozen=True, slots=True)
class SuiteNetwork:
    """One network of a suite, its batch norms fused: the shapes of its tensors, and how tensors make a module."""

    name: str
    paper: Published
    shapes: Shapes
    assemble: Callable[[Tensors], nn.Module]
    gain: float = 1.0

    @property
    def parameters(self) -> int:
        """Known without building it."""
        return sum(math.prod(item.shape) for item in self.shapes.values())

    def build(self) -> nn.Module:
        """(batch, 3, 224, 224) -> logits (batch, 1000), float32, in evaluation mode.

        Its weights are random, the same each time, and such that activations stay of order one.
        """
        network = self.assemble(synthetic(self.shapes)).eval()
        for tensor in network.state_dict().values():
            if tensor.ndim > 1:
                tensor *= self.gain
        return network


@dataclass(frozen=True, slots=True)
class Pair:
    """Two networks whose speeds the paper compares, and where."""

    network: str
    reference: str
    source: str


@dataclass(frozen=True, slots=True)
class SuiteDefinition:
    """A paper's table. `conditions`: how the paper measured; `notes`: where the networks here differ from the paper's."""

    name: str
    image: Image
    networks: tuple[SuiteNetwork, ...]
    pairs: tuple[Pair, ...]
    conditions: str
    notes: tuple[str, ...] = ()

    def entry(self, name: str) -> SuiteNetwork:
        """Raises UsageError where the suite has no network of that name."""
        found = next((item for item in self.networks if item.name == name), None)
        if found is None:
            names = ", ".join(item.name for item in self.networks)
            raise UsageError(f"suite {self.name} has no network {name!r}", hint=f"it has {names}")
        return found


def suite(name: str) -> SuiteDefinition:
    """Raises UsageError where there is no suite of that name."""
    if name not in SUITES:
        raise UsageError(f"there is no suite {name!r}", hint=f"there is {', '.join(SUITES)}")
    return SUITES[name]


def flops(network: nn.Module, image: Image) -> int:
    """Multiplications and additions of the convolutions and matrix products for one image, biases left out.

    That is twice what papers call FLOPs, who count a multiplication with its addition as one. The network runs once, on a batch
    of no images, so that nothing is computed.
    """
    total = 0

    def count(module: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, Tensor)
        total += 2 * math.prod(output.shape[1:]) * math.prod(weight.shape[1:])

    weighted = (module for module in network.modules() if getattr(getattr(module, "weight", None), "ndim", 0) > 1)
    hooks = [module.register_forward_hook(count) for module in weighted]
    try:
        like = next(iter(network.state_dict().values()))
        with torch.no_grad():
            network(like.new_empty(0, *image))
    finally:
        for hook in hooks:
            hook.remove()
    return total


def speed_ratios(rows: Sequence[SuiteRow], definition: SuiteDefinition) -> tuple[SpeedRatio, ...]:
    """The paper's comparisons beside the same ones in `rows`, per runtime, in the paper's order."""
    found = {(row.runtime, row.network): row for row in rows}
    return tuple(
        SpeedRatio(
            pair.network,
            pair.reference,
            runtime,
            pair.source,
            definition.entry(pair.network).paper.speed / definition.entry(pair.reference).paper.speed,
            _ratio(found.get((runtime, pair.network)), found.get((runtime, pair.reference))),
        )
        for runtime in dict.fromkeys(row.runtime for row in rows)
        for pair in definition.pairs
    )


def _ratio(row: SuiteRow | None, reference: SuiteRow | None) -> Interval | None:
    """Per image, of rounds that both were measured in, or of runs at different times where memory held only one."""
    timings = [None if item is None else item.timing for item in (reference, row)]
    before, after = ([] if item is None else [seconds / item.batch for seconds in item.seconds] for item in timings)
    if not before or not after:
        return None
    return speedup(before, after) if len(before) == len(after) else apart(before, after)


def _layer(name: str, inputs: int, outputs: int, *kernel: int) -> dict[str, TensorShape]:
    """A biased convolution, or a fully connected layer where there is no kernel."""
    weight = TensorShape((outputs, inputs, *kernel), "float32")
    return {f"{name}.weight": weight, f"{name}.bias": TensorShape((outputs,), "float32")}


def _rep_vgg(architecture: Architecture) -> Shapes:
    """The deploy layout of RepVGG's repository: one 3x3 convolution per block."""
    shapes, inputs = _layer("stage0.rbr_reparam", IMAGE[0], architecture.widths[0], 3, 3), architecture.widths[0]
    for name, outputs in _blocks(architecture):
        shapes |= _layer(f"{name}.rbr_reparam", inputs, outputs, 3, 3)
        inputs = outputs
    return shapes | _layer("linear", inputs, CLASSES)


def _resnet(architecture: Architecture) -> Shapes:
    """The deploy layout of DiverseBranchBlock's repository (arXiv:1512.03385, table 1, with every norm fused).

    A bottleneck is a quarter as wide inside, and known by a first stage wider than the stem.
    """
    stem, first = architecture.widths[:2]
    shapes, inputs = _layer("stage0.conv1.conv", IMAGE[0], stem, 7, 7), stem
    for name, outputs in _blocks(architecture):
        inner = outputs // 4 if first > stem else outputs
        widths = (inputs, inner, inner, outputs) if first > stem else (inputs, inner, outputs)
        sides = (1, 3, 1) if first > stem else (3, 3)
        for number, side in enumerate(sides, 1):
            kind = "dbb_reparam" if side > 1 else "conv"
            shapes |= _layer(f"{name}.conv{number}.{kind}", *widths[number - 1 : number + 1], side, side)
        if inputs != outputs:  # where the resolution changes, so does the width
            shapes |= _layer(f"{name}.shortcut.conv", inputs, outputs, 1, 1)
        inputs = outputs
    return shapes | _layer("linear", inputs, CLASSES)


def _blocks(architecture: Architecture) -> Iterator[tuple[str, int]]:
    """Name and width of every block behind the stem."""
    for stage, (depth, width) in enumerate(zip(architecture.depths, architecture.widths, strict=True)):
        yield from ((f"stage{stage}.{index}", width) for index in range(depth if stage else 0))


def _vgg_16() -> Shapes:
    """Thirteen 3x3 convolutions and three fully connected layers (arXiv:1409.1556, table 1, D)."""
    shapes: dict[str, TensorShape] = {}
    inputs = IMAGE[0]
    for index, outputs in enumerate(VGG_16.widths, 1):
        shapes |= _layer(f"conv{index}", inputs, outputs, 3, 3)
        inputs = outputs
    inputs *= math.prod(side >> len(POOLED) for side in IMAGE[1:])
    for index, outputs in enumerate((4096, 4096, CLASSES), 1):
        shapes |= _layer(f"linear{index}", inputs, outputs)
        inputs = outputs
    return shapes


def _rebuilt(family: str, tensors: Tensors) -> nn.Module:
    """The skeleton that fits. `family`: whose deploy layout it is."""
    return rebuilt(tensors, registry.families(), (), IMAGE, owners=(family,), squeezed=True)


def _in_a_row(tensors: Tensors) -> nn.Module:
    """VGG-16, which no skeleton describes at this image size."""
    layers: list[nn.Module] = []
    for name in dict.fromkeys(key.rpartition(".")[0] for key in tensors):
        weight, bias = (tensors[f"{name}.{part}"].read() for part in ("weight", "bias"))
        if weight.ndim == 4:
            layers += [ConvLayer(Conv(weight, bias, pads=(1, 1, 1, 1))), nn.ReLU()]
            if int(name.removeprefix("conv")) in POOLED:
                layers.append(nn.MaxPool2d(2))
        else:
            layers += [LinearLayer(weight, bias), nn.ReLU()]
    places = next(index for index, layer in enumerate(layers) if isinstance(layer, LinearLayer))
    return nn.Sequential(*layers[:places], nn.Flatten(), *layers[places:-1])


TABLE_4 = {
    "RepVGG-A0": Published(3256, 8.30, 1.4),
    "ResNet-18": Published(2442, 11.68, 1.8),
    "RepVGG-A1": Published(2339, 12.78, 2.4),
    "RepVGG-B0": Published(1817, 14.33, 3.1),
    "ResNet-34": Published(1419, 21.78, 3.7),
    "RepVGG-A2": Published(1322, 25.49, 5.1),
    "ResNet-50": Published(719, 25.53, 3.9),
    "RepVGG-B1": Published(685, 51.82, 11.8),
    "VGG-16": Published(415, 138.35, 15.5),
}
"""arXiv:2101.03697, table 4, the rows of this suite in its order: on a 1080Ti, batch 128, float32."""


def _networks() -> Iterator[SuiteNetwork]:
    rep_vggs, resnets = rep_vgg_variants(), resnet_variants(18, 34, 50, prefix="ResNet-")
    for name, paper in TABLE_4.items():
        if name in rep_vggs:
            yield SuiteNetwork(name, paper, _rep_vgg(rep_vggs[name]), partial(_rebuilt, "repvgg"), KEEPS_MAGNITUDE)
        elif name in resnets:
            yield SuiteNetwork(name, paper, _resnet(resnets[name]), partial(_rebuilt, "dbb"))
        else:
            yield SuiteNetwork(name, paper, _vgg_16(), _in_a_row, KEEPS_MAGNITUDE)


REPVGG_PAPER = SuiteDefinition(
    "repvgg-paper",
    IMAGE,
    tuple(_networks()),
    (
        Pair("RepVGG-A0", "ResNet-18", "section 4.1: 33 % faster"),
        Pair("RepVGG-A1", "ResNet-34", "section 4.1: 64 % faster"),
        Pair("RepVGG-A2", "ResNet-50", "section 4.1: 83 % faster"),
        Pair("RepVGG-B0", "ResNet-34", "table 4, which groups them"),
    ),
    "NVIDIA 1080Ti, batch 128, float32, batch norms of all networks fused, 50 batches to warm up and 50 timed "
    "(arXiv:2101.03697, section 4.1 and table 4)",
    (
        "ResNet-50 has the stride of a stage on its 3x3 convolution: 4.1 thousand million multiply-adds, the paper's has 3.9, "
        "as with the stride on the 1x1 convolution before it",
        "the paper compares RepVGG-B1 with RegNetX-3.2GF and VGG-16 with RepVGG-B2, which are not in this suite",
    ),
)
SUITES: Mapping[str, SuiteDefinition] = MappingProxyType({REPVGG_PAPER.name: REPVGG_PAPER})
