"""ResRep against its sheet: every network with compactors anywhere, what leaves with a row and what stays, containers."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import repdeploy
from repdeploy.bundle import Bundle
from repdeploy.checkpoint import load
from repdeploy.errors import IllegalInput, InputError, UsageError
from repdeploy.facts import Setting
from repdeploy.records import Conversion
from repdeploy.runtimes.onnx_runtime import OnnxSession
from sample_models import acnet
from sample_models.acnet import save_hdf5
from sample_models.backbones import (
    BottleneckResNet,
    Builder,
    CifarResNet,
    Layer,
    MobileNet,
    lenet,
    repeated,
    settled,
    vgg,
)
from sample_models.resrep import (
    DEPLOYED,
    THRESHOLD,
    TRAINING,
    Forgetting,
    Layers,
    compacted,
    compactors,
    inner_layers,
    layers,
)
from sample_models.samples import SAMPLES
from sample_models.scatter import scatter
from tests.networks import assert_described, save
from tests.stages.test_recognise import recognised

Sizes = tuple[tuple[int, int], ...]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True)
class Case:
    """`widths`: of the convolutions in the order of their indices, as the official constructors take them; `targets`: those
    with a compactor, all where it is None; `coupled`: names of layers whose outputs are added to each other, by their group."""

    build: Callable[[Builder, Sequence[int]], nn.Module]
    widths: tuple[int, ...]
    sizes: Sizes
    targets: tuple[int | str, ...] | None
    coupled: str = "(none)"
    channels: int = 3

    def model(self, seed: int = 0) -> nn.Module:
        """Its compactors dense, with rows that were given up; statistics near what every layer sees."""
        torch.manual_seed(seed)
        model = compacted(self.build(TRAINING, self.widths), self.targets)
        return settled(forget(scatter(model, seed), seed), self.channels, min(self.sizes[0]))

    def forgotten(self, model: nn.Module, threshold: float = THRESHOLD) -> dict[str, Tensor]:
        """Name of the layer -> its rows that leave; those of a sum only if every term has given them up."""
        found, groups = compactors(model), dict[str, list[str]]()
        for name in layers(model):
            match = re.fullmatch(self.coupled, name)
            groups.setdefault(match[1] if match else name, []).append(name)
        rows: dict[str, Tensor] = {}
        for names in groups.values():
            terms = [found[name].forgotten(threshold) for name in names if name in found]
            everywhere = torch.stack(terms).all(0) if len(terms) == len(names) else None
            rows |= {name: everywhere for name in names if everywhere is not None}
        return rows

    def widths_left(self, model: nn.Module, threshold: float = THRESHOLD) -> dict[str, int]:
        """Name of the layer -> its width in the deploy network."""
        rows, widths = self.forgotten(model, threshold), dict[str, int]()
        for name, layer in layers(model).items():
            conv = layer.get_submodule("conv")
            assert isinstance(conv, nn.Conv2d)
            if name in rows:
                widths[name] = int((~rows[name]).sum())
            else:  # a depthwise layer goes with the one before it
                widths[name] = list(widths.values())[-1] if conv.groups > 1 else conv.out_channels
        return widths

    def deploy(self, model: nn.Module, weights: dict[str, Tensor], threshold: float = THRESHOLD) -> nn.Module:
        """The official deploy model at the widths that are left, with these weights."""
        deploy = self.build(DEPLOYED, list(self.widths_left(model, threshold).values())).double().eval()
        deploy.load_state_dict(weights, strict=True)
        return deploy

    def reference(self, model: nn.Module, threshold: float = THRESHOLD) -> nn.Module:
        """The training-time network with the rows that leave at zero, in float64; all others as they are."""
        pruned = copy.deepcopy(model).double()
        found = compactors(pruned)
        for name, rows in self.forgotten(model, threshold).items():
            found[name].pwc.weight.data[rows] = 0
        return pruned


def forget(model: nn.Module, seed: int = 0, share: float = 0.4) -> nn.Module:
    """Dense compactors; of the rows to forget some are zero, some tiny, one is just not; masks that say something else."""
    generator = torch.Generator().manual_seed(seed)
    for compactor in compactors(model).values():
        channels = len(compactor.mask)
        weight = compactor.pwc.weight.data
        weight += torch.randn(weight.shape, generator=generator) * 0.3 / channels**0.5
        for rank, row in enumerate(torch.randperm(channels, generator=generator)[: int(channels * share) + 1].tolist()):
            sizes = (0.7 * THRESHOLD, 1.3 * THRESHOLD, 0.0, 0.01 * THRESHOLD)
            weight[row] *= sizes[rank % 4] / weight[row].norm()
        compactor.mask.copy_(torch.randint(2, (channels,), generator=generator))
    return model


def taken(widths: Sequence[int], counts: Sequence[int], per_block: int, first: bool) -> Iterator[list[tuple[int, ...]]]:
    """Stages of blocks from widths in the order of indices; each stage has its projection (or the stem) in front."""
    left = iter(widths[int(first) :])
    for count in counts:
        next(left)
        yield [tuple(next(left) for _ in range(per_block)) for _ in range(count)]


def src(*counts: int) -> Callable[[Builder, Sequence[int]], nn.Module]:
    return lambda builder, widths: CifarResNet(builder, list(taken(widths, counts, 2, False)), 5)


def sres(*counts: int) -> Callable[[Builder, Sequence[int]], nn.Module]:
    return lambda builder, widths: BottleneckResNet(builder, widths[0], list(taken(widths, counts, 3, True)), 5)


def vc(builder: Builder, widths: Sequence[int]) -> nn.Module:
    return vgg(builder, widths, 5, hidden=11)


def smi1(builder: Builder, widths: Sequence[int]) -> nn.Module:
    return MobileNet(builder, (widths[0], *widths[2::2]), 5, window=7)


def lenet5bn(builder: Builder, widths: Sequence[int]) -> nn.Module:
    return lenet(builder, widths, 5, hidden=9)


ADDED, ADDED_WIDE = r"(stage\d)\.(?:conv1|projection|block\d+\.conv2)", r"(stage\d)\.(?:projection|block\d+\.conv3)"
CIFAR = (4, 5, 4, 7, 4, 6, 5, 6, 3, 6, 8, 9, 8, 5, 8)
BOTTLENECKS = (6, 8, 3, 4, 8, 10, 4, 3, 10, 5, 5, 10, 8, 4, 4, 8, 12, 5, 6, 12)
VGG_WIDTHS = (4, 4, 5, 5, 6, 5, 5, 6, 6, 5, 6, 5, 8)
MOBILE_WIDTHS = (9, 12, 14, 13, 15, 14, 15, 13, 14, 15, 14, 13, 16, 18)
CASES = {
    "src20": Case(src(2, 2, 2), CIFAR, ((29, 32), (43, 33)), (1, 3, 6, 8, 11, 13), ADDED),
    "src20, every layer": Case(src(2, 2, 2), CIFAR, ((31, 30), (60, 37)), None, ADDED),
    "src20, none in the second stage": Case(src(2, 2, 2), CIFAR, ((32, 32),), (0, 2, 3, 10, 13, 14), ADDED),
    "src20, coupled layers alone": Case(src(2, 2, 2), CIFAR, ((32, 33),), (0, 2, 4, 5, 7, 9, 10, 12, 14), ADDED),
    "src, twelve blocks": Case(src(12, 1, 1), (3, *(4, 3) * 12, *(4, 5, 4) * 2), ((29, 30),), tuple(range(1, 24, 2)), ADDED),
    "sres50": Case(sres(1, 2, 1, 1), BOTTLENECKS, ((225, 197),), (2, 3, 6, 7, 9, 10, 13, 14, 17, 18), ADDED_WIDE),
    "sres50, every layer": Case(sres(1, 2, 1, 1), BOTTLENECKS, ((193, 205),), None, ADDED_WIDE),
    "vc": Case(vc, VGG_WIDTHS, ((32, 63), (47, 33)), None),
    "vc, some layers": Case(vc, VGG_WIDTHS, ((33, 35),), (1, 5, "stem.conv13")),
    "smi1": Case(smi1, tuple(w for w in MOBILE_WIDTHS for _ in range(2))[:-1], ((193, 231),), tuple(range(0, 26, 2))),
    "smi1, the last one too": Case(smi1, tuple(w for w in MOBILE_WIDTHS for _ in range(2))[:-1], ((199, 193),), (4, 16, 26)),
    "lenet5bn": Case(lenet5bn, (6, 8), ((28, 31), (29, 30)), None, channels=1),
    "lenet5bn, the flattened layer": Case(lenet5bn, (5, 9), ((31, 31),), (1,), channels=1),
}  # fmt: skip


def converted(path: Path, **options: Any) -> tuple[Conversion, dict[str, Tensor]]:
    """The conversion and its deploy weights, in float64."""
    bundle = path.with_suffix(".repdeploy")
    conversion = repdeploy.convert(path, family="resrep", output=bundle, dtype="float64", force=True, **options)
    return conversion, load_file(bundle / "weights.safetensors")


def threshold_of(conversion: Conversion) -> tuple[float, str]:
    """As the manifest states it, and where it comes from."""
    ((value, origin),) = ((fact.value, fact.origin) for fact in conversion.manifest.facts if fact.name == "threshold")
    return float(value), origin


def images(case: Case, size: tuple[int, int]) -> Tensor:
    return torch.randn(3, case.channels, *size, generator=torch.Generator().manual_seed(size[0]), dtype=torch.float64)


def assert_same(got: Tensor, wanted: Tensor, bound: float = 1e-11) -> None:
    assert got.shape == wanted.shape
    assert float((got - wanted).abs().max()) <= bound * float(wanted.abs().max())


@pytest.mark.parametrize("name", CASES)
def test_both_readings_of_a_network_are_the_module(name: str, tmp_path: Path) -> None:
    """Compactors fold, whatever their rows are: nothing has left yet."""
    case = CASES[name]
    model = case.model()
    assert_described(model, save(model, tmp_path / "a.pth"), sizes=case.sizes, channels=case.channels)


@pytest.mark.parametrize("name", CASES)
def test_forgotten_rows_leave_and_nothing_else_changes(name: str, tmp_path: Path) -> None:
    """The weights load into the official deploy model at the widths that are left, which then computes what the training
    network does once those rows are zero."""
    case = CASES[name]
    model = case.model()
    conversion, weights = converted(save(model, tmp_path / "a.pth"))
    widths, deploy, reference = case.widths_left(model), case.deploy(model, weights), case.reference(model)
    model.double()
    for size in case.sizes:
        x = images(case, size)
        with torch.no_grad():
            wanted = reference(x)
            assert_same(deploy(x), wanted)
            assert_same(model(x), wanted, 1e-3)  # tiny rows are no zeros, but almost
        # a network whose output hardly listens to its input would prove nothing
        assert float((wanted[0] - wanted[1]).abs().max()) > 1e-3 * float(wanted.abs().max())
    pruning = conversion.manifest.pruning
    assert pruning is not None
    changed = {name: (old, new) for (name, new), old in zip(widths.items(), case.widths, strict=True) if old != new}
    assert {layer.name: (layer.before, layer.after) for layer in pruning.layers} == changed
    assert conversion.manifest.verdict.passed
    assert threshold_of(conversion) == (THRESHOLD, "skeleton")
    numbers = sum(value.numel() for value in weights.values())
    assert numbers == pruning.parameters_after == conversion.manifest.parameters_after
    if changed:
        assert (pruning.flops_after < pruning.flops_before, pruning.parameters_after < pruning.parameters_before) == (
            True,
            True,
        )
        assert pruning.cost is not None
        assert 0 < pruning.cost < 1e-3
    else:
        assert (pruning.flops_before, pruning.parameters_before) == (pruning.flops_after, pruning.parameters_after)
        assert not pruning.cost  # nothing was left out, so there was nothing to measure


@pytest.mark.parametrize("name", ["src20", "smi1", "lenet5bn"])
def test_the_exported_graph_is_the_pruned_network(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = case.model()
    repdeploy.convert(
        save(model, tmp_path / "a.pth"), output=tmp_path / "b.repdeploy", input_shape=(1, case.channels, *case.sizes[0])
    )
    assert all(value.dtype == torch.float32 for value in load_file(tmp_path / "b.repdeploy" / "weights.safetensors").values())
    repdeploy.export(tmp_path / "b.repdeploy")
    x = images(case, case.sizes[0])
    with torch.no_grad():
        wanted = case.reference(model)(x)
    got = OnnxSession(tmp_path / "b.repdeploy" / "model.fp32.onnx").run(x.float().numpy())
    assert_same(torch.from_numpy(got), wanted.float(), 1e-4)
    assert repdeploy.verify(tmp_path / "b.repdeploy").passed
    assert repdeploy.verify(tmp_path / "b.repdeploy", against=tmp_path / "a.pth").passed


SMALL = Case(src(1, 1, 1), (3, 6, 3, 4, 5, 4, 5, 6, 5), ((29, 31),), (1, 4, 7), ADDED)


def rows_of(model: nn.Module, name: str) -> Tensor:
    """(out, in, 1, 1): the compactor of a layer, to be written to."""
    return compactors(model)[name].pwc.weight.data


def test_operations_are_counted_at_the_input_shape(tmp_path: Path) -> None:
    """A multiplication and an addition per tap, of convolutions and linear layers; the bundle says the same again."""
    model = SMALL.model()
    conversion, weights = converted(save(model, tmp_path / "a.pth"), input_shape=(1, 3, 37, 45))
    counted = []
    for network in (SMALL.build(DEPLOYED, SMALL.widths).double(), SMALL.deploy(model, weights)):
        counted.append(0)
        for module in network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(
                    lambda module, _, output: counted.append(counted.pop() + 2 * module.weight.numel() * output[0, 0].numel())
                )
        network(torch.zeros(1, 3, 37, 45, dtype=torch.float64))
    pruning = conversion.manifest.pruning
    assert pruning is not None
    assert [pruning.flops_before, pruning.flops_after] == counted
    assert Bundle(tmp_path / "a.repdeploy").manifest.pruning == pruning


@pytest.mark.parametrize("threshold", ["1e-5", "1e-3", "0.2", "0", "1e9"])
def test_the_threshold_is_stated(threshold: str, tmp_path: Path) -> None:
    model = SMALL.model()
    rows_of(model, "stage1.block0.conv1")[2:4] *= 0.05
    rows_of(model, "stage3.block0.conv1")[0] *= 1e-4 / rows_of(model, "stage3.block0.conv1")[0].norm()
    conversion, weights = converted(save(model, tmp_path / "a.pth"), set=[f"threshold={threshold}"])
    number = float(threshold)
    assert threshold_of(conversion) == (number, "set")
    deploy = SMALL.deploy(model, weights, number)
    x = images(SMALL, (30, 33))
    with torch.no_grad():
        assert_same(deploy(x), SMALL.reference(model, number)(x))


@pytest.mark.parametrize("threshold", ["tiny", "nan", "-1e-5"])
def test_a_threshold_that_is_no_size_is_refused(threshold: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="threshold"):
        repdeploy.convert(
            save(SMALL.model(), tmp_path / "a.pth"), output=tmp_path / "b.repdeploy", set=[f"threshold={threshold}"]
        )
    assert not (tmp_path / "b.repdeploy").exists()


@pytest.mark.parametrize(("threshold", "left"), [("0.5", 6), ("0.5000001", 5)])
def test_a_row_at_the_threshold_stays(threshold: str, left: int, tmp_path: Path) -> None:
    """The comparison is strict; a half is no rounded number."""
    model = SMALL.model()
    rows = rows_of(model, "stage1.block0.conv1")
    rows.copy_(torch.eye(6).view(6, 6, 1, 1))
    rows[2, 2] = 0.5
    _, weights = converted(save(model, tmp_path / "a.pth"), set=[f"threshold={threshold}"])
    assert len(weights["stage1.block0.conv1.conv.weight"]) == left
    assert weights["stage1.block0.conv2.conv.weight"].shape[1] == left


@pytest.mark.parametrize("zero", [False, True])
def test_of_rows_that_are_all_small_the_largest_stays_and_a_note_says_so(zero: bool, tmp_path: Path) -> None:
    model = SMALL.model()
    rows = rows_of(model, "stage2.block0.conv1")
    rows *= 1e-7
    rows[3] *= 5
    if zero:
        rows.zero_()
    conversion, weights = converted(save(model, tmp_path / "a.pth"))
    assert len(weights["stage2.block0.conv1.conv.weight"]) == 1
    pruning = conversion.manifest.pruning
    assert pruning is not None
    assert len([note for note in pruning.notes if "stage2.block0.conv1" in note]) == 1
    deploy = SMALL.deploy(model, weights)
    x = images(SMALL, (32, 29))
    with torch.no_grad():
        assert_same(deploy(x), SMALL.reference(model)(x))


def test_the_mask_says_nothing(tmp_path: Path) -> None:
    """It gates gradients; the norms decide."""
    model, found = SMALL.model(), []
    for value in (0.0, 1.0, float("nan")):
        for compactor in compactors(model).values():
            compactor.mask.fill_(value)
        found.append(converted(save(model, tmp_path / "a.pth"))[1])
    assert not any("mask" in key for key in found[0])
    for other in found[1:]:
        assert all(torch.equal(other[key], value) for key, value in found[0].items())


def test_rows_of_zeros_leave_at_no_cost(tmp_path: Path) -> None:
    model = SMALL.model()
    for name, compactor in compactors(model).items():
        rows_of(model, name)[compactor.forgotten()] = 0
    pruning = converted(save(model, tmp_path / "a.pth"))[0].manifest.pruning
    assert pruning is not None
    assert len(pruning.layers) == 3
    assert pruning.cost == 0


def test_a_compactor_that_gave_nothing_up_is_only_folded(tmp_path: Path) -> None:
    model = SMALL.model()
    for compactor in compactors(model).values():
        compactor.pwc.weight.data += 0.1
    conversion, weights = converted(save(model, tmp_path / "a.pth"))
    SMALL.build(DEPLOYED, SMALL.widths).load_state_dict(weights, strict=True)
    assert conversion.manifest.pruning is not None
    assert conversion.manifest.pruning.layers == ()


def test_a_depthwise_constant_moves_into_the_next_layer(tmp_path: Path) -> None:
    """relu(beta - mean * scale) of the channels behind a forgotten one, some positive, some negative, before the compactor."""
    case = CASES["smi1"]
    model = case.model()
    name = "stem.2.depthwise"
    norm = model.get_submodule(f"{name}.bn")
    assert isinstance(norm, nn.BatchNorm2d)
    with torch.no_grad():
        norm.bias.copy_(torch.linspace(-3, 3, len(norm.bias)))
    rows_of(model, "stem.1.pointwise")[::2] = 0
    _, weights = converted(save(model, tmp_path / "a.pth"))
    deploy = case.deploy(model, weights)
    x = images(case, (193, 200))
    with torch.no_grad():
        assert_same(deploy(x), case.reference(model)(x))


@pytest.mark.parametrize("dense", [False, True])
def test_a_compactor_behind_a_depthwise_layer_may_mix_its_groups(dense: bool, tmp_path: Path) -> None:
    """The official converter cannot do that: a dense one leaves a kernel without groups."""
    case = Case(smi1, CASES["smi1"].widths, ((193, 193),), (0, 3, 4, 5, 7))
    model = case.model()
    if not dense:
        for name, compactor in compactors(model).items():
            rows_of(model, name).mul_(torch.eye(len(compactor.mask)).view(rows_of(model, name).shape))
    path = save(model, tmp_path / "a.pth")
    assert_described(model, path, sizes=case.sizes)
    _, weights = converted(path)
    widths = case.widths_left(model)
    deploy = MobileNet(DEPLOYED, (widths["conv1"], *list(widths.values())[2::2]), 5, window=7)
    for name, layer in layers(deploy).items():  # as wide as they are, and as dense
        outputs, inputs = weights[f"{name}.conv.weight"].shape[:2]
        conv = layer.get_submodule("conv")
        assert isinstance(conv, nn.Conv2d)
        assert outputs == widths[name]
        groups = outputs if "depthwise" in name and inputs == 1 else 1
        kernel, stride = conv.kernel_size[0], conv.stride[0]
        layer.add_module("conv", nn.Conv2d(inputs * groups, outputs, kernel, stride, kernel // 2, groups=groups))
    deploy.double().eval().load_state_dict(weights, strict=True)
    x = images(case, (199, 193))
    with torch.no_grad():
        assert_same(deploy(x), case.reference(model)(x))


def test_every_pixel_of_a_flattened_channel_leaves(tmp_path: Path) -> None:
    """linear1 reads four by four pixels of each channel; the official converter takes the wrong columns."""
    case = CASES["lenet5bn"]
    model = case.model()
    _, weights = converted(save(model, tmp_path / "a.pth"))
    kept = ~compactors(model)["stem.conv2"].forgotten()
    columns = model.get_parameter("linear1.weight").detach().double().view(9, 8, 16)
    assert torch.equal(weights["linear1.weight"].view(9, -1, 16), columns[:, kept])


def test_the_last_map_beyond_the_fixed_window_has_no_influence(tmp_path: Path) -> None:
    case = CASES["src20"]
    model = case.model()
    _, weights = converted(save(model, tmp_path / "a.pth"))
    deploy = case.deploy(model, weights)
    x = images(case, (60, 60))
    corner = x.clone()
    corner[:, :, -4:, -4:] += 1
    with torch.no_grad():
        assert torch.equal(deploy(x), deploy(corner))
        assert_same(deploy(x), case.reference(model)(corner))


def renamed(model: nn.Module) -> dict[str, Tensor]:
    """The same weights under names that no network has."""
    return {key.replace("stage", "body.level").replace("block", "unit"): value for key, value in model.state_dict().items()}


def test_in_an_unknown_network_every_compactor_folds_and_nothing_leaves(tmp_path: Path) -> None:
    """Which layers add to others is not known."""
    model = SMALL.model()
    torch.save({"model": renamed(model)}, tmp_path / "a.pth")
    conversion, weights = converted(tmp_path / "a.pth")
    manifest = conversion.manifest
    assert (manifest.family, manifest.verdict.grade, manifest.verdict.passed) == ("resrep", "blocks only", True)
    assert manifest.pruning is None or manifest.pruning.layers == ()
    assert len([note for note in manifest.notes if "none of their rows is removed" in note]) == 1
    model.double()
    for name, compactor in compactors(model).items():
        layer = layers(model)[name]
        key = name.replace("stage", "body.level").replace("block", "unit")
        weight, bias = weights[f"{key}.conv.weight"], weights[f"{key}.conv.bias"]
        assert len(weight) == len(compactor.mask)
        x = torch.randn(1, weight.shape[1], 9, 7, dtype=torch.float64)
        with torch.no_grad():
            conv = layer.get_submodule("conv")
            assert isinstance(conv, nn.Conv2d)
            assert_same(F.conv2d(x, weight, bias, conv.stride, conv.padding), layer(x), 1e-12)


@pytest.mark.parametrize(
    ("layer", "stated"),
    [
        (Layer(3, 6, 3), []),
        (Layer(4, 6, 5, stride=2), ["stride=2"]),
        (Layer(4, 6, 1), []),
        (Layer(3, 5, 5, border=0), ["padding=0"]),
        (Layer(6, 9, 3, groups=3), ["groups=3"]),
        (Layer(8, 8, 3, stride=2, groups=8), ["groups=8", "stride=2"]),
    ],
)
def test_one_layer_alone_is_folded(layer: Layer, stated: list[str], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("layer", TRAINING.normed(layer))
    forget(scatter(compacted(model)))
    _, weights = converted(save(model, tmp_path / "a.pth"), set=stated)
    x = torch.randn(2, layer.inputs, 11, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = weights["layer.conv.weight"]
    assert sorted(weights) == ["layer.conv.bias", "layer.conv.weight"]
    groups = layer.inputs // weight.shape[1]
    with torch.no_grad():
        got = F.conv2d(x, weight, weights["layer.conv.bias"], layer.stride, layer.padding, groups=groups)
        assert_same(got, model.double().eval()(x), 1e-12)


def test_hdf5_files_list_their_blocks_alphabetically_but_they_run_in_numerical_order(tmp_path: Path) -> None:
    """block10 before block2, the projection behind the blocks; slashes in names become plus signs."""
    case = CASES["src, twelve blocks"]
    model = case.model()
    _, weights = converted(save_hdf5(model.state_dict(), tmp_path / "finish.hdf5"))
    deploy = case.deploy(model, weights)
    x = images(case, (31, 29))
    with torch.no_grad():
        assert_same(deploy(x), case.reference(model)(x))


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("legacy", [False, True])
def test_the_engine_s_checkpoint_holds_the_model_beside_its_optimizer(prefix: str, legacy: bool, tmp_path: Path) -> None:
    """The format of torch 1.3 too."""
    model = SMALL.model()
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    momentum = {index: {"momentum_buffer": value.clone()} for index, value in enumerate(model.parameters())}
    content = {"model": state, "optimizer": {"state": momentum, "param_groups": []}, "scheduler": {"a": 3}, "iteration": 7}
    torch.save(content, tmp_path / "latest.pth", _use_new_zipfile_serialization=not legacy)
    conversion, weights = converted(tmp_path / "latest.pth")
    assert conversion.manifest.source.where == "model"
    SMALL.build(DEPLOYED, list(SMALL.widths_left(model).values())).load_state_dict(weights, strict=True)


def test_the_official_deploy_file_has_nothing_to_fuse(tmp_path: Path) -> None:
    """finish_converted.hdf5: pruned widths under `deps`, biases of compacted layers in float64. Its keys are anybody's, so the
    family has to be named."""
    case = CASES["src20"]
    model = case.model()
    _, weights = converted(save(model, tmp_path / "a.pth"))
    widths = case.widths_left(model)
    folded = {f"{name}.conv.bias" for name in compactors(model)}
    state = {key: value if key in folded else value.float() for key, value in weights.items()}
    path = save_hdf5(state, tmp_path / "finish_converted.hdf5", list(widths.values()))
    with pytest.raises(InputError, match="resrep"):
        repdeploy.convert(path, output=tmp_path / "b.repdeploy")
    answer = repdeploy.convert(path, family="resrep", output=tmp_path / "b.repdeploy")
    assert (answer.already_deployed, answer.manifest.skeleton) == (True, "cifar_resnet")
    assert answer.manifest.parameters_before == sum(value.numel() for value in state.values())
    assert not (tmp_path / "b.repdeploy").exists()


def test_a_stated_eps_reaches_every_norm(tmp_path: Path) -> None:
    case = CASES["src20, every layer"]
    model = case.model()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.eps = 1e-2
    path = save(model, tmp_path / "a.pth")
    assert_described(model, path, Setting("", "eps", 1e-2), sizes=case.sizes)
    _, weights = converted(path, set=["eps=1e-2"])
    deploy = case.deploy(model, weights)
    x = images(case, (30, 29))
    with torch.no_grad():
        assert_same(deploy(x), case.reference(model)(x))


def test_channels_of_almost_no_variance_are_no_failure(tmp_path: Path) -> None:
    """A scale of 1 / sqrt(eps) on channels whose signal is as small."""
    model = SMALL.model()
    conv, norm = (model.get_submodule(f"stage1.block0.conv1.{part}") for part in ("conv", "bn"))
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    with torch.no_grad():
        conv.weight[1:3] *= 1e-6
        norm.running_mean[1:3] *= 1e-6
        norm.running_var[1:3] *= 1e-12
    conversion, weights = converted(save(model, tmp_path / "a.pth"))
    assert conversion.manifest.verdict.passed
    deploy = SMALL.deploy(model, weights)
    x = images(SMALL, (32, 29))
    with torch.no_grad():
        assert_same(deploy(x), SMALL.reference(model)(x))


def without(*keys: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: [state.pop(key) for key in keys]


FIRST = "stage1.block0.conv1"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without(f"{FIRST}.conv.weight"), rf"{FIRST}\.conv\.weight is missing"),
        (without(f"{FIRST}.bn.running_var"), rf"{FIRST}\.bn\.running_var is missing"),
        (lambda s: s.update({f"{FIRST}.compactor.pwc.weight": torch.ones(6, 5, 1, 1)}), FIRST),
        (lambda s: s.update({f"{FIRST}.compactor.pwc.weight": torch.ones(4, 4, 1, 1)}), FIRST),
        (lambda s: s.update({f"{FIRST}.compactor.pwc.weight": torch.ones(6, 6, 3, 3)}), FIRST),
        (lambda s: s[f"{FIRST}.compactor.pwc.weight"].fill_(torch.nan), rf"{FIRST}\.compactor\.pwc\.weight holds 36 NaN"),
        (lambda s: s[f"{FIRST}.compactor.pwc.weight"][2, 1].fill_(torch.inf), FIRST),
        (lambda s: s[f"{FIRST}.bn.running_var"].fill_(-1.0), f"{FIRST}.*variance"),
    ],
)
def test_a_damaged_network_is_refused_by_name(damage: Callable[[dict[str, Tensor]], Any], message: str, tmp_path: Path) -> None:
    state = dict(SMALL.model().state_dict())
    damage(state)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=message):
        repdeploy.convert(tmp_path / "damaged.pth", family="resrep", output=tmp_path / "b.repdeploy")
    assert not (tmp_path / "b.repdeploy").exists()


@pytest.mark.parametrize(
    ("damage", "layer"),
    [
        (without("stage2.block0.conv2.bn.running_mean"), "stage2.block0.conv2"),
        (lambda s: s.update({"stage1.block0.conv2.conv.weight": torch.ones(3, 7, 3, 3)}), "stage1.block0.conv2"),
        (without("stage3.projection.conv.weight"), "stage3.projection"),
    ],
)
def test_a_network_that_lacks_a_plain_layer_is_not_pruned(
    damage: Callable[[dict[str, Tensor]], Any], layer: str, tmp_path: Path
) -> None:
    """Its compactors fold all the same, and a note says why the network around them is not known."""
    state = dict(SMALL.model().state_dict())
    damage(state)
    torch.save(state, tmp_path / "damaged.pth")
    conversion, weights = converted(tmp_path / "damaged.pth")
    assert conversion.manifest.verdict.grade == "blocks only"
    assert len([note for note in conversion.manifest.notes if layer in note]) == 1
    assert len(weights[f"{FIRST}.conv.weight"]) == 6


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("sres50", (192, 224), "fixed window of 7x7, the last map is 6x7"),
        ("smi1", (192, 193), "fixed window of 7x7, the last map is 6x7"),
        ("src20", (28, 32), "fixed window of 8x8, the last map is 7x8"),
        ("src20", (61, 32), "linear takes 8 numbers"),
        ("vc", (64, 32), "linear1 takes "),
        ("lenet5bn", (27, 28), "linear1 takes "),
    ],
)
def test_illegal_sizes_are_refused_with_the_reason(name: str, size: tuple[int, int], reason: str, tmp_path: Path) -> None:
    case = CASES[name]
    with pytest.raises(IllegalInput, match=reason):
        repdeploy.convert(save(case.model(), tmp_path / "a.pth"), output=tmp_path / "b", input_shape=(1, case.channels, *size))
    assert not (tmp_path / "b").exists()


FULL_VGG = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
MOBILE = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
WIDE = ((64, 64, 256), (128, 128, 512), (256, 256, 1024), (512, 512, 2048))
OFFICIAL: list[tuple[str, Callable[[Layers], nn.Module], tuple[int, ...] | None]] = [
    ("src56", lambda builder: CifarResNet(builder, repeated((9,) * 3, ((16,) * 2, (32,) * 2, (64,) * 2)), 10), ()),
    ("src110", lambda builder: CifarResNet(builder, repeated((18,) * 3, ((16,) * 2, (32,) * 2, (64,) * 2)), 10), ()),
    ("sres50", lambda builder: BottleneckResNet(builder, 64, repeated((3, 4, 6, 3), WIDE), 1000), ()),
    ("vc", lambda builder: vgg(builder, FULL_VGG, 10), None),
    ("smi1", lambda builder: MobileNet(builder, MOBILE, 1000, window=7), tuple(range(0, 26, 2))),
]


@pytest.mark.parametrize(("name", "build", "targets"), OFFICIAL, ids=[row[0] for row in OFFICIAL])
def test_official_variants_are_named_from_their_shapes(
    name: str, build: Callable[[Layers], nn.Module], targets: tuple[int, ...] | None
) -> None:
    """No weight is read; an empty tuple of targets stands for the official ones of residual networks."""
    with torch.device("meta"):
        model = build(TRAINING)
        state = compacted(model, inner_layers(model) if targets == () else targets).state_dict()
        merged = build(DEPLOYED).state_dict()
    for hints in ({}, {"arch": name}, {"stored_name": name}):
        found = recognised(state, **hints)
        assert (found.architecture, found.notes, found.families) == (name, (), ("resrep",))
    before = sum(value.numel() for key, value in state.items() if not key.endswith((*STATISTICS, "mask")))
    gone = sum(state[key].numel() for slot in found.slots for key in slot.consumed if not key.endswith((*STATISTICS, "mask")))
    there = sum(torch.Size(slot.squeezed.weight_shape).numel() + slot.squeezed.out_channels for slot in found.slots)
    assert before - gone + there == sum(value.numel() for value in merged.values())


def test_without_a_compactor_the_network_is_not_resrep_s(tmp_path: Path) -> None:
    """conv and norm alone: nothing says that ResRep trained it."""
    model = settled(scatter(SMALL.build(TRAINING, SMALL.widths)), 3, 29)
    with pytest.raises(InputError, match="resrep"):
        repdeploy.convert(save(model, tmp_path / "a.pth"), family="resrep", output=tmp_path / "b.repdeploy")


def dead_acnet(shift: float) -> tuple[nn.Module, nn.Module]:
    """ACNet's ResNet-14 whose block 1.0 has two channels of a constant, and the same as official deploy model."""
    torch.manual_seed(0)
    blocks = [[(5, 4), (4, 4)], [(6, 5)], [(5, 6)]]
    model = settled(scatter(CifarResNet(acnet.Layers(), blocks, 5)), 3, 32)
    for name, norm in model.named_modules():
        if isinstance(norm, nn.BatchNorm2d) and name.startswith("stage1.block0.conv1"):
            norm.weight.data[1:3] = 0
            norm.bias.data[1:3] = shift
    pruned = [[(3, 4), (4, 4)], [(6, 5)], [(5, 6)]]
    return model, CifarResNet(acnet.Layers(deploy=True), pruned if shift <= 0 else blocks, 5)


@pytest.mark.parametrize("shift", [-0.5, 0.0, 0.25])
def test_channels_that_are_constant_leave_when_asked(shift: float, tmp_path: Path) -> None:
    """Of any family. A constant that is not zero stays in front of a padded kernel: the border is no such constant."""
    model, deploy = dead_acnet(shift)
    path = save(model, tmp_path / "a.pth")
    conversion = repdeploy.convert(path, output=tmp_path / "b.repdeploy", dtype="float64", prune_dead=True)
    pruning = conversion.manifest.pruning
    wanted = [] if shift > 0 else [("stage1.block0.conv1", 5, 3)]
    assert [(layer.name.removesuffix(".acb"), layer.before, layer.after) for layer in pruning.layers] == wanted  # type: ignore[union-attr]
    deploy.double().eval().load_state_dict(load_file(tmp_path / "b.repdeploy" / "weights.safetensors"), strict=True)
    x = torch.randn(2, 3, 33, 31, dtype=torch.float64)
    with torch.no_grad():
        assert_same(deploy(x), model.double()(x))


def test_constant_channels_stay_unless_asked(tmp_path: Path) -> None:
    model, _ = dead_acnet(-0.5)
    conversion = repdeploy.convert(save(model, tmp_path / "a.pth"), output=tmp_path / "b.repdeploy")
    assert conversion.manifest.pruning is None
    assert len(load_file(tmp_path / "b.repdeploy" / "weights.safetensors")["stage1.block0.conv1.acb.fused_conv.weight"]) == 5


def test_the_penalty_alone_brings_masked_rows_to_zero() -> None:
    """One step of section 3.3 against its formula, and a few hundred of them without any other gradient."""
    torch.manual_seed(0)
    model = compacted(lenet(TRAINING, (6, 9), 5, hidden=8))
    forgetting = Forgetting(model, share=0.6, strength=0.5)
    before = {name: compactor.pwc.weight.detach().clone() for name, compactor in compactors(model).items()}
    gradients = {}
    for name, compactor in compactors(model).items():
        compactor.pwc.weight.grad = gradients[name] = torch.randn(compactor.pwc.weight.shape)
    forgetting.step(0.1, 1.0)
    masked = 0
    for name, compactor in compactors(model).items():
        weight, penalty = before[name], before[name] / before[name].flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        wanted = weight - 0.1 * (compactor.mask.view(-1, 1, 1, 1) * gradients[name] + 0.5 * penalty)
        assert torch.allclose(compactor.pwc.weight, wanted, atol=1e-7)
        masked += int((compactor.mask == 0).sum())
    assert masked == int(0.6 * 15)
    for step in range(400):
        for compactor in compactors(model).values():
            compactor.pwc.weight.grad = torch.zeros_like(compactor.pwc.weight)
        forgetting.step(0.1 * (1 - step / 400) ** 2, 1.0)
    forgotten = {name: compactor.forgotten() for name, compactor in compactors(model).items()}
    assert all(bool((compactor.mask[forgotten[name]] == 0).any()) for name, compactor in compactors(model).items())
    assert sum(int(rows.sum()) for rows in forgotten.values()) >= masked


def test_the_sample_has_forgotten_more_than_half_of_its_channels() -> None:
    sample = SAMPLES["resrep"]
    model = copy.deepcopy(sample.build())
    stored = load(sample.checkpoint("resrep")).tensors
    model.load_state_dict({key: stored[key].read() for key in model.state_dict()}, strict=True)
    norms = np.concatenate([compactor.norms().numpy() for compactor in compactors(model).values()])
    small = norms < THRESHOLD
    assert small.mean() > 0.5
    assert norms[small].max() < THRESHOLD / 2
    assert norms[~small].min() > 10 * THRESHOLD
    assert (norms[small] > 0).all()


def test_a_compactor_with_a_bias_is_another_block(tmp_path: Path) -> None:
    """A row at zero would not be silent: it gives its bias."""
    case = CASES["src20"]
    state = dict(case.model().state_dict())
    state["stage1.block0.conv1.compactor.pwc.bias"] = torch.ones(len(state["stage1.block0.conv1.compactor.mask"]))
    torch.save(state, tmp_path / "biased.pth")
    with pytest.raises(InputError, match="a compactor has none"):
        repdeploy.convert(tmp_path / "biased.pth", output=tmp_path / "b.repdeploy")


def test_a_ruinous_threshold_is_warned_of_and_nothing_anchors_it(tmp_path: Path) -> None:
    """The fusion is proved against the network without those rows; what is left of the trained one is another question."""
    case = CASES["src20"]
    model = case.model().eval()
    path = save_hdf5(model.state_dict(), tmp_path / "net.hdf5")
    x = images(case, case.sizes[0])
    with torch.no_grad():
        np.savez(tmp_path / "expect.npz", input=x.numpy(), output=model.double()(x).numpy())
    done, _ = converted(path, set=["threshold=0.9"], expect=tmp_path / "expect.npz")
    assert done.manifest.verdict.grade == "self-consistent"
    assert done.manifest.pruning is not None
    assert done.manifest.pruning.cost is not None
    assert done.manifest.pruning.cost > 1e-3
    assert any("a lower --set threshold keeps more" in warning for warning in done.manifest.verdict.warnings)
    assert done.bundle is not None
    assert repdeploy.verify(done.bundle).warnings == done.manifest.verdict.warnings
    gentle, _ = converted(path, expect=tmp_path / "expect.npz")
    assert not gentle.manifest.verdict.warnings
    assert gentle.manifest.verdict.grade == "anchored"
    with torch.no_grad():
        np.savez(tmp_path / "pruned.npz", input=x.numpy(), output=case.reference(model, 0.9)(x).numpy())
    pruned, _ = converted(path, set=["threshold=0.9"], expect=tmp_path / "pruned.npz")
    assert pruned.manifest.verdict.grade == "anchored"


def test_rows_that_have_to_stay_are_told(tmp_path: Path) -> None:
    path = save_hdf5(CASES["src20, coupled layers alone"].model().state_dict(), tmp_path / "net.hdf5")
    done, _ = converted(path)
    assert done.manifest.pruning is not None
    assert any(note.startswith("stage1.conv1: of the outputs it gave up") for note in done.manifest.pruning.notes)


def test_layers_with_equal_weights_share_tensors_and_not_names(tmp_path: Path) -> None:
    """Two layers that keep one dead row each: the exporter merges their weights."""
    model = CASES["src20"].model()
    for name, compactor in compactors(model).items():
        if name.startswith("stage1"):
            compactor.pwc.weight.data.zero_()
    path = save_hdf5(model.state_dict(), tmp_path / "net.hdf5")
    done, _ = converted(path, input_shape=(1, 3, 32, 32))
    assert done.bundle is not None
    assert repdeploy.export(done.bundle).artifacts[0].checks[0].passed
