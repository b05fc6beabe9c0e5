"""DBB against its sheet: every backbone in both readings, block variants, both key layouts, containers, what is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import repdeploy
from repdeploy.checkpoint import Checkpoint
from repdeploy.errors import InputError, RepDeployError
from repdeploy.facts import Facts, Setting
from repdeploy.inspection import describe_blocks
from repdeploy.recognise import recognise
from repdeploy.registry import families
from sample_models.acnet import save_hdf5
from sample_models.backbones import Layer, MobileNet, ResNet, settled
from sample_models.dbb import DBB, DEPLOYED, MARCH_2021, TRAINING, Layers, fused
from sample_models.scatter import scatter
from tests.networks import assert_described, described, save
from tests.stages.test_recognise import ghosts

MOBILE_WIDTHS = (8, 10, 12, 12, 14, 14, 13, 13, 12, 12, 13, 13, 15, 16)
Build = Callable[[Layers], nn.Module]

BACKBONES: dict[str, tuple[Build, int]] = {  # and the channels of their images
    "ResNet-18": (lambda layers: ResNet(layers, (2, 2, 2, 2), (4, 4, 6, 8, 10), 5), 3),
    "ResNet-18-grey": (lambda layers: ResNet(layers, (2, 1, 1, 3), (6, 5, 6, 4, 8), 2, channels=1), 1),
    "ResNet-50": (lambda layers: ResNet(layers, (3, 4, 6, 3), (5, 6, 8, 8, 10), 5, inner=(3, 3, 4, 5)), 3),
    "ResNet-50-groups": (
        lambda layers: ResNet(layers, (2, 2, 1, 1), (5, 6, 8, 8, 10), 5, inner=(4, 4, 6, 6), groups=2),
        3,
    ),
    "MobileNet": (lambda layers: MobileNet(layers, MOBILE_WIDTHS, 5), 3),
}


def backbone(name: str, layers: Layers = TRAINING) -> nn.Module:
    build, channels = BACKBONES[name]
    torch.manual_seed(0)
    model = build(layers)
    for key, value in model.state_dict().items():
        if key.endswith("idconv1.weight"):  # training starts it at zero, where leaving it out would pass
            value.copy_(torch.randn(value.shape) * 0.5)
    return settled(scatter(model, seed=1), channels, 65)


@pytest.mark.parametrize("layers", [TRAINING, MARCH_2021], ids=["current", "march_2021"])
@pytest.mark.parametrize("name", BACKBONES)
def test_both_readings_of_a_backbone_are_the_module(name: str, layers: Layers, tmp_path: Path) -> None:
    """Global pooling takes any size, down to the 33 that leaves a 2x2 map."""
    model = backbone(name, layers)
    path = save(model, tmp_path / "a.pth")
    assert_described(model, path, sizes=((65, 63), (33, 71)), channels=BACKBONES[name][1])


@pytest.mark.parametrize("layers", [TRAINING, MARCH_2021], ids=["current", "march_2021"])
@pytest.mark.parametrize("name", BACKBONES)
def test_the_written_weights_load_into_the_official_deploy_model(name: str, layers: Layers, tmp_path: Path) -> None:
    """Blocks become dbb_reparam; every other convolution keeps its name and gains the bias of the norm it had."""
    model, channels = backbone(name, layers), BACKBONES[name][1]
    repdeploy.convert(save(model, tmp_path / "a.pth"), output=tmp_path / "b", dtype="float64")
    weights = load_file(tmp_path / "b" / "weights.safetensors")
    assert not [key for key in weights if "bn" in key]
    deploy = backbone(name, DEPLOYED).double()
    deploy.load_state_dict(weights, strict=True)
    x = torch.randn(2, channels, 67, 65, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        wanted = model.double()(x)
        largest = float(wanted.abs().max())
        assert float((deploy(x) - wanted).abs().max()) <= 1e-11 * largest
        # a network whose output hardly listens to its input would prove nothing
        assert float((wanted[0] - wanted[1]).abs().max()) > 1e-3 * largest


BLOCKS: list[tuple[Layer, dict[str, Any]]] = [
    (Layer(4, 6, 3), {}),
    (Layer(4, 6, 3, stride=2), {}),
    (Layer(4, 6, 5), {}),
    (Layer(4, 3, 7, stride=3), {}),
    (Layer(4, 6, 1), {}),
    (Layer(5, 3, 1, stride=2), {"internal": 7}),
    (Layer(4, 6, 3, groups=2), {}),
    (Layer(8, 12, 5, stride=2, groups=4), {}),
    (Layer(4, 6, 3, groups=2), {"internal": 8}),
    (Layer(4, 6, 3), {"internal": 2}),
    (Layer(4, 6, 5, stride=2), {"internal": 12}),
    (Layer(6, 6, 3, groups=6), {}),
    (Layer(6, 6, 5, stride=2, groups=6), {}),
    (Layer(4, 4, 7, groups=4), {}),
    (Layer(6, 6, 3, groups=6), {"internal": 6}),
    (Layer(6, 6, 3, groups=6), {"internal": 18}),
    (Layer(4, 8, 3, groups=4), {}),
    (Layer(3, 9, 5, stride=2, groups=3), {"internal": 6}),
]


def block(layer: Layer, **options: Any) -> DBB:
    torch.manual_seed(layer.kernel)
    found = scatter(DBB(layer, **options), seed=4)
    assert isinstance(found, DBB)
    return found


@pytest.mark.parametrize("march_2021", [False, True], ids=["current", "march_2021"])
@pytest.mark.parametrize(("layer", "options"), BLOCKS, ids=str)
def test_a_block_alone_becomes_the_official_convolution(
    layer: Layer, options: dict[str, Any], march_2021: bool, tmp_path: Path
) -> None:
    """Its tensors tell kernel, groups and inputs; the stride alone has to be stated. Maps down to one pixel."""
    model = block(layer, march_2021=march_2021, **options)
    path = save(model, tmp_path / "block.pth")
    stated = [f"stride={layer.stride}"] if layer.stride != 1 else []
    result = repdeploy.convert(path, family="dbb", output=tmp_path / "b", set=stated, dtype="float64")
    (report,) = result.manifest.blocks
    assert (report.kernel, report.groups) == (
        (layer.outputs, layer.inputs // layer.groups, layer.kernel, layer.kernel),
        layer.groups,
    )
    deploy = fused(layer, "dbb_reparam").double()
    deploy.load_state_dict(load_file(tmp_path / "b" / "weights.safetensors"), strict=True)
    for height, width in ((14, 11), (2, 5), (1, 1)):
        x = torch.randn(2, layer.inputs, height, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        with torch.no_grad():
            wanted = model.double()(x)
            assert torch.allclose(deploy(x), wanted, rtol=0, atol=1e-12 * float(wanted.abs().max())), (height, width)


def test_the_identity_is_not_stored_and_is_rebuilt(tmp_path: Path) -> None:
    """An idconv1 of zeros, as training starts it, is still the identity."""
    model = block(Layer(4, 6, 3, groups=2))
    with torch.no_grad():
        model.get_parameter("dbb_1x1_kxk.idconv1.weight").zero_()
    repdeploy.convert(save(model, tmp_path / "a.pth"), output=tmp_path / "b", dtype="float64")
    deploy = fused(Layer(4, 6, 3, groups=2), "dbb_reparam").double()
    deploy.load_state_dict(load_file(tmp_path / "b" / "weights.safetensors"), strict=True)
    x = torch.randn(1, 4, 6, 7, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(deploy(x), model.double()(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [Layer(3, 4, 5), Layer(4, 4, 3, groups=4)], ids=["dense", "depthwise"])
def test_the_border_is_the_norm_s_answer_to_zero(layer: Layer, tmp_path: Path) -> None:
    """On an image of zeros nothing but the borders differs from pixel to pixel, and they must not."""
    model = block(layer)
    repdeploy.convert(save(model, tmp_path / "a.pth"), output=tmp_path / "b", dtype="float64")
    deploy = fused(layer, "dbb_reparam").double()
    deploy.load_state_dict(load_file(tmp_path / "b" / "weights.safetensors"), strict=True)
    zeros = torch.zeros(1, layer.inputs, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        wanted = model.double()(zeros)
        assert torch.allclose(deploy(zeros), wanted, rtol=0, atol=1e-12)
        assert torch.allclose(wanted, wanted[:, :, :1, :1].expand_as(wanted), rtol=0, atol=1e-12)


def test_a_backbone_of_larger_kernels_and_other_internal_widths(tmp_path: Path) -> None:
    def wide(layer: Layer) -> nn.Module:
        changed = Layer(layer.inputs, layer.outputs, 5, layer.stride, layer.groups)
        return DBB(changed, internal=None if layer.groups > 1 else 2 * layer.inputs)

    torch.manual_seed(0)
    model = settled(scatter(ResNet(Layers(wide), (1, 1, 2, 1), (4, 5, 6, 7, 8), 3), seed=7), 3, 65)
    assert_described(model, save(model, tmp_path / "a.pth"), sizes=((63, 65), (33, 41)))


@pytest.mark.parametrize("layers", [TRAINING, MARCH_2021], ids=["current", "march_2021"])
def test_the_training_script_s_file_under_ddp(layers: Layers, tmp_path: Path) -> None:
    model = backbone("ResNet-18", layers)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    content = {
        "epoch": 3,
        "arch": "ResNet-18",
        "state_dict": state,
        "best_acc1": torch.tensor(71.0),
        "optimizer": {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.1}]},
        "scheduler": {"last_epoch": 3},
    }
    torch.save(content, tmp_path / "model_best.pth.tar")
    assert_described(model, tmp_path / "model_best.pth.tar", sizes=((65, 63),))


@pytest.mark.parametrize(
    ("name", "lacking", "deps"),
    [("ResNet-18", "stage0.", None), ("ResNet-18-grey", "", (6, 5)), ("MobileNet", "stage0.", (8, 8, 10))],
)
def test_hdf5_files_whose_stem_may_lack_its_level(
    name: str, lacking: str, deps: tuple[int, ...] | None, tmp_path: Path
) -> None:
    """The official reader tries a name as it is, then without stage0; the widths, where they are stored, are no tensor."""
    model = backbone(name)
    state = {key.removeprefix(lacking): value for key, value in model.state_dict().items()}
    path = save_hdf5(state, tmp_path / "epoch-3.hdf5", deps)
    assert_described(model, path, sizes=((65, 63), (41, 33)), channels=BACKBONES[name][1])


@pytest.mark.parametrize("layer", [Layer(8, 12, 5, 2, 4), Layer(4, 4, 3, 3, 4)], ids=["grouped", "depthwise"])
def test_a_pickled_block_tells_its_own_stride(layer: Layer, tmp_path: Path) -> None:
    model = block(layer)
    torch.save(model, tmp_path / "module.pth")
    result = repdeploy.convert(tmp_path / "module.pth", output=tmp_path / "b", dtype="float64")
    assert ("stride", str(layer.stride), "file") in [(fact.name, fact.value, fact.origin) for fact in result.manifest.facts]
    deploy = fused(layer, "dbb_reparam").double()
    deploy.load_state_dict(load_file(tmp_path / "b" / "weights.safetensors"), strict=True)
    x = torch.randn(1, layer.inputs, 9, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(deploy(x), model.double()(x), rtol=0, atol=1e-11)


WIDE = (64, 64, 128, 256, 512)
DEEP = (64, 256, 512, 1024, 2048)
OFFICIAL: list[tuple[str, Build, int | None, int | None]] = [
    ("ResNet-18", lambda layers: ResNet(layers, (2, 2, 2, 2), WIDE, 1000), 26288296, 11684712),
    ("ResNet-34", lambda layers: ResNet(layers, (3, 4, 6, 3), WIDE, 1000), None, 21789160),
    ("ResNet-50", lambda layers: ResNet(layers, (3, 4, 6, 3), DEEP, 1000, inner=WIDE[1:]), 40684456, 25530472),
    ("ResNet-101", lambda layers: ResNet(layers, (3, 4, 23, 3), DEEP, 1000, inner=WIDE[1:]), None, None),
    (
        "MobileNet",
        lambda layers: MobileNet(layers, (32, 64, 128, 128, 256, 256, *(512,) * 6, 1024, 1024), 1000),
        4372183,
        4221032,
    ),
]


@pytest.mark.parametrize("layers", [TRAINING, MARCH_2021], ids=["current", "march_2021"])
@pytest.mark.parametrize(("name", "build", "before", "after"), OFFICIAL, ids=[row[0] for row in OFFICIAL])
def test_official_variants_are_named_and_counted_from_their_shapes(
    name: str, build: Build, before: int | None, after: int | None, layers: Layers
) -> None:
    with torch.device("meta"):
        tensors = ghosts(build(layers).state_dict())
    for hints in ({}, {"arch": name}, {"stored_name": name}):
        found = recognise(tensors, families(), Facts(), **hints)  # type: ignore[arg-type]
        assert (found.architecture, found.notes, found.families) == (name, (), ("dbb",))
    counted = describe_blocks(Checkpoint(Path(), "torch zip", "model", "", "", tensors), found)[1:]
    assert before is None or counted[0] == before
    assert after is None or counted[1] == after


def test_a_stored_name_that_the_shapes_contradict_is_only_noted(tmp_path: Path) -> None:
    torch.save({"arch": "ResNet-50", "state_dict": backbone("ResNet-18").state_dict()}, tmp_path / "a.pth")
    found = repdeploy.inspect(tmp_path / "a.pth")
    assert found.architecture.startswith("resnet (blocks 1,2,2,2,2, widths 4,4,6,8,10")
    assert any("calls itself ResNet-50" in note for note in found.notes)


@pytest.mark.parametrize("stated", ["dilation=2", "stage3.dilation=2"])
def test_a_dilated_network_is_refused_because_only_one_branch_would_dilate(stated: str, tmp_path: Path) -> None:
    path = save(backbone("ResNet-18"), tmp_path / "a.pth")
    with pytest.raises(InputError, match="said to have dilation 2, but only its first branch would dilate") as failure:
        repdeploy.convert(path, output=tmp_path / "b", set=[stated])
    assert failure.value.exit_status == 3
    assert not (tmp_path / "b").exists()


def test_a_dilated_block_is_refused(tmp_path: Path) -> None:
    path = save(block(Layer(4, 6, 3)), tmp_path / "a.pth")
    with pytest.raises(InputError, match="only its first branch would dilate"):
        repdeploy.convert(path, output=tmp_path / "b", set=["dilation=2"])


@pytest.mark.parametrize("layer", [Layer(4, 6, 3), Layer(4, 4, 5, groups=4)], ids=["dense", "depthwise"])
@pytest.mark.parametrize("padding", [0, 3])
def test_a_padding_that_is_not_half_the_kernel_is_refused(layer: Layer, padding: int, tmp_path: Path) -> None:
    """The official block asserts it: its pooling and its norms' borders know no other."""
    path = save(block(layer), tmp_path / "a.pth")
    with pytest.raises(InputError, match="padding"):
        repdeploy.convert(path, output=tmp_path / "b", set=[f"padding={padding}"])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("stated", ["groups=3", "groups=2"])
def test_groups_that_the_tensors_contradict_are_refused(stated: str, tmp_path: Path) -> None:
    path = save(block(Layer(4, 6, 3)), tmp_path / "a.pth")
    with pytest.raises(RepDeployError, match="groups"):
        repdeploy.convert(path, output=tmp_path / "b", set=[stated])
    assert not (tmp_path / "b").exists()


Damage = Callable[[dict[str, Tensor]], object]
BLOCK = "stage1.0.conv1"


def removed(key: str, state: dict[str, Tensor]) -> None:
    del state[key]


def replaced(changes: Mapping[str, Tensor], state: dict[str, Tensor]) -> None:
    state.update(changes)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (partial(removed, f"{BLOCK}.dbb_1x1.conv.weight"), r"stage1\.0\.conv1\.dbb_1x1\.conv\.weight is missing"),
        (partial(removed, f"{BLOCK}.dbb_1x1_kxk.conv2.weight"), r"dbb_1x1_kxk\.conv2\.weight is missing"),
        (partial(removed, f"{BLOCK}.dbb_1x1_kxk.bn1.bn.running_mean"), r"dbb_1x1_kxk\.bn1\.bn\.running_mean is missing"),
        (partial(removed, f"{BLOCK}.dbb_avg.avgbn.running_var"), r"dbb_avg\.avgbn\.running_var is missing"),
        (partial(removed, f"{BLOCK}.dbb_1x1_kxk.idconv1.weight"), r"dbb_1x1_kxk\.conv1\.weight is missing"),
        (partial(replaced, {f"{BLOCK}.dbb_avg.avgbn.weight": torch.ones(3)}), "contradict"),
        (partial(replaced, {f"{BLOCK}.dbb_1x1_kxk.conv2.weight": torch.ones(4, 3, 3, 3)}), "contradict|divide"),
        (partial(replaced, {f"{BLOCK}.dbb_1x1_kxk.idconv1.weight": torch.ones(6, 4, 1, 1)}), "6 channels by its own tensors"),
        (partial(replaced, {f"{BLOCK}.dbb_avg.conv.weight": torch.full((4, 4, 1, 1), torch.inf)}), "16 Inf"),
    ],
)
def test_a_damaged_block_is_refused_by_name(damage: Damage, message: str, tmp_path: Path) -> None:
    state = dict(backbone("ResNet-18").state_dict())
    damage(state)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=message):
        repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_deploy_file_has_nothing_to_fuse(tmp_path: Path) -> None:
    model = backbone("MobileNet", DEPLOYED)
    again = repdeploy.convert(save(model, tmp_path / "deploy.pth"), output=tmp_path / "b")
    assert again.already_deployed
    assert again.bundle is None
    assert_described(model, tmp_path / "deploy.pth", sizes=((65, 63),))


def test_eps_and_strides_that_somebody_changed_are_stated(tmp_path: Path) -> None:
    """A stage that keeps its resolution, and norms with another eps, the borders' among them."""
    model = backbone("ResNet-18")
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
    first = model.get_submodule("stage4.0")
    for name, module in first.named_modules():
        if isinstance(module, nn.Conv2d | nn.AvgPool2d) and name.startswith(("conv1.", "shortcut.")):
            module.stride = 1 if isinstance(module, nn.AvgPool2d) else (1, 1)  # type: ignore[assignment]
    stated = (Setting("", "eps", 1e-3), Setting("stage4.0", "stride", 1))
    assert_described(model, save(model, tmp_path / "a.pth"), *stated, sizes=((65, 63),))


def test_an_image_of_one_pixel_per_stage_still_converts(tmp_path: Path) -> None:
    """Global pooling: whatever survives the strides is legal."""
    path = save(backbone("MobileNet"), tmp_path / "a.pth")
    result = repdeploy.convert(path, output=tmp_path / "b", input_shape=(1, 3, 1, 7))
    assert result.manifest.verdict.passed
    assert described(path)(torch.zeros(1, 3, 1, 7, dtype=torch.float64)).shape == (1, 5)
