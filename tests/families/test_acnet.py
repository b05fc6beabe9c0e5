"""ACNet against its sheet: every backbone in both readings, block variants, containers, deploy models, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import repdeploy
from repdeploy.checkpoint import Checkpoint
from repdeploy.errors import IllegalInput, InputError, RepDeployError
from repdeploy.facts import Facts, Setting
from repdeploy.inspection import describe_blocks
from repdeploy.recognise import recognise
from repdeploy.registry import families
from sample_models import dbb
from sample_models.acnet import ACBlock, Layers, conv_norm, fused, save_hdf5
from sample_models.backbones import (
    BottleneckResNet,
    CifarQuick,
    CifarResNet,
    Layer,
    MobileNet,
    PreActivationBuilder,
    ResNet,
    WideResNet,
    lenet,
    repeated,
    settled,
    vgg,
)
from sample_models.repvgg import SqueezeExcite
from sample_models.scatter import scatter
from tests.networks import assert_described, described, save
from tests.stages.test_recognise import ghosts

VGG_WIDTHS = (3, 4, 4, 5, 5, 4, 6, 6, 5, 6, 6, 4, 7)
MOBILE_WIDTHS = (8, 10, 12, 12, 14, 14, 13, 13, 12, 12, 13, 13, 15, 16)
Sizes = tuple[tuple[int, int], ...]

BACKBONES: dict[str, tuple[Callable[[PreActivationBuilder], nn.Module], Sizes, int]] = {  # sizes and channels of images
    "vc": (lambda layers: vgg(layers, VGG_WIDTHS, 5, hidden=11), ((32, 63), (47, 33)), 3),
    "vc_grey": (lambda layers: vgg(layers, VGG_WIDTHS, 2, channels=1, hidden=6), ((33, 35),), 1),
    "src20": (lambda layers: CifarResNet(layers, repeated((3, 3, 3), ((4, 4), (6, 6), (8, 8))), 5), ((29, 32), (43, 33)), 3),
    "src_inner": (
        lambda layers: CifarResNet(layers, [[(3, 4), (5, 4)], [(2, 6)], [(7, 5), (1, 5)]], 3),
        ((31, 30), (60, 37)),
        3,
    ),
    "sres18": (
        lambda layers: ResNet(layers, (2, 2, 2, 2), (4, 4, 6, 8, 10), 5, stem="conv1", window=7),
        ((193, 199), (257, 225)),
        3,
    ),
    "sres34": (
        lambda layers: ResNet(layers, (3, 4, 6, 3), (4, 4, 5, 6, 7), 5, stem="conv1", window=7),
        ((197, 225),),
        3,
    ),
    "sres50": (
        lambda layers: BottleneckResNet(layers, 4, repeated((3, 4, 6, 3), ((2, 2, 6), (2, 3, 8), (3, 3, 8), (3, 4, 10))), 5),
        ((225, 197),),
        3,
    ),
    "smi1": (lambda layers: MobileNet(layers, MOBILE_WIDTHS, 5, window=7), ((193, 231),), 3),
    "cfqkbnc": (lambda layers: CifarQuick(layers, (4, 5, 6), 5, hidden=8), ((31, 38), (33, 35), (32, 32)), 3),
    "lenet5bn": (lambda layers: lenet(layers, (4, 6), 5, hidden=9), ((28, 31), (29, 30)), 1),
    "wrnc16plain": (lambda layers: WideResNet(layers, (4, 5, 6, 8), 5), ((29, 32), (31, 30)), 3),
    "wrn_wide": (lambda layers: WideResNet(layers, (4, 4, 6, 7), 2, depth=3), ((32, 31),), 3),
}


def backbone(name: str, layers: PreActivationBuilder | None = None) -> nn.Module:
    build, sizes, channels = BACKBONES[name]
    return settled(model_of(lambda: build(layers or Layers())), channels, min(sizes[0]))


def model_of(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return scatter(build(), seed=1)


def deploys_like(model: nn.Module, deploy: nn.Module, path: Path, size: tuple[int, int], channels: int, **options: Any) -> None:
    """The written weights load into the official deploy model, which then computes the same, in float64."""
    bundle = path.with_suffix(".repdeploy")
    repdeploy.convert(path, output=bundle, dtype="float64", **options)
    deploy.double().eval().load_state_dict(load_file(bundle / "weights.safetensors"), strict=True)
    x = torch.randn(2, channels, *size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    with torch.no_grad():
        wanted = model.double().eval()(x)
        largest = float(wanted.abs().max())
        assert float((deploy(x) - wanted).abs().max()) <= 1e-11 * largest
        # a network whose output hardly listens to its input would prove nothing
        assert float((wanted[0] - wanted[1]).abs().max()) > 1e-3 * largest


@pytest.mark.parametrize("name", BACKBONES)
def test_both_readings_of_a_backbone_are_the_module(name: str, tmp_path: Path) -> None:
    _, sizes, channels = BACKBONES[name]
    model = backbone(name)
    assert_described(model, save(model, tmp_path / "a.pth"), sizes=sizes, channels=channels)


@pytest.mark.parametrize("name", BACKBONES)
def test_the_written_weights_load_into_the_official_deploy_model(name: str, tmp_path: Path) -> None:
    """ACBs become fused_conv with a bias; plain convolutions and WRN's norms stay as they are."""
    _, sizes, channels = BACKBONES[name]
    model = backbone(name)
    deploys_like(model, backbone(name, Layers(deploy=True)), save(model, tmp_path / "a.pth"), sizes[0], channels)


IN_DBB_REPOSITORY: dict[str, Callable[[dbb.Layers], nn.Module]] = {
    "ResNet-18": lambda layers: ResNet(layers, (2, 2, 2, 2), (4, 4, 6, 8, 10), 5),
    "ResNet-50": lambda layers: ResNet(layers, (3, 4, 6, 3), (4, 6, 8, 8, 10), 5, inner=(2, 2, 3, 4)),
    "MobileNet": lambda layers: MobileNet(layers, MOBILE_WIDTHS, 5),
}


@pytest.mark.parametrize("name", IN_DBB_REPOSITORY)
def test_acbs_under_the_names_of_the_dbb_repository(name: str, tmp_path: Path) -> None:
    """No level acb, the stem under stage0, global pooling, {state_dict} with module.; a deploy ReLU is the network's own."""
    model = settled(model_of(lambda: IN_DBB_REPOSITORY[name](dbb.Layers(ACBlock))), 3, 65)
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    content = {"epoch": 1, "arch": name, "state_dict": state, "best_acc1": torch.tensor(1.0), "optimizer": {"state": {}}}
    torch.save(content, tmp_path / "checkpoint.pth.tar")
    assert_described(model, tmp_path / "checkpoint.pth.tar", sizes=((65, 63), (33, 71)))
    deploy = IN_DBB_REPOSITORY[name](dbb.Layers(partial(fused, name="fused_conv"), conv_norm))
    deploys_like(model, deploy, tmp_path / "checkpoint.pth.tar", (67, 65), 3)


def test_acbs_of_the_dbb_repository_without_the_stem_s_level_still_pool_globally(tmp_path: Path) -> None:
    """Its HDF5 files may lack stage0; that no block has a level acb tells them from sres18, which pools 7x7."""
    model = settled(model_of(lambda: IN_DBB_REPOSITORY["ResNet-18"](dbb.Layers(ACBlock))), 3, 65)
    state = {key.removeprefix("stage0."): value for key, value in model.state_dict().items()}
    assert_described(model, save_hdf5(state, tmp_path / "a.hdf5"), sizes=((65, 63), (257, 225)))


BLOCKS: list[tuple[Layer, dict[str, Any]]] = [
    (Layer(3, 5, 3), {}),
    (Layer(3, 5, 3, stride=2), {}),
    (Layer(4, 6, 3, stride=3, groups=2), {}),
    (Layer(3, 5, 3, border=0), {}),
    (Layer(3, 5, 3, stride=2, border=2), {}),
    (Layer(3, 5, 5), {}),
    (Layer(4, 6, 5, border=1, groups=2), {}),
    (Layer(3, 4, 5, border=0, stride=2), {}),
    (Layer(3, 4, 5, border=4), {}),
    (Layer(2, 3, 7), {}),
    (Layer(2, 3, 7, border=0), {}),
    (Layer(2, 3, 7, border=1, stride=3), {}),
    (Layer(6, 6, 3, groups=6), {}),
    (Layer(3, 6, 5, groups=3, stride=2), {}),
    (Layer(6, 4, 3), {"affine": False}),
    (Layer(6, 4, 3, border=0, groups=2), {"affine": False, "last_norm": True}),
    (Layer(4, 6, 3, groups=2), {"last_norm": True}),
    (Layer(3, 4, 5), {"taps": 3}),
    (Layer(3, 4, 5, border=0), {"taps": 3}),
    (Layer(3, 4, 5, border=1, stride=2), {"taps": 3, "last_norm": True}),
    (Layer(3, 4, 5, border=3), {"taps": 3}),
    (Layer(4, 4, 7, groups=2), {"taps": 3, "affine": False}),
    (Layer(4, 4, 7, border=0, stride=2), {"taps": 3}),
]


def facts_of(layer: Layer) -> list[str]:
    """What a user must state about a block on its own."""
    stated = {"stride": (layer.stride, 1), "groups": (layer.groups, 1), "padding": (layer.padding, layer.kernel // 2)}
    return [f"{name}={value}" for name, (value, convention) in stated.items() if value != convention]


def block(layer: Layer, **options: Any) -> ACBlock:
    torch.manual_seed(layer.kernel)
    found = scatter(ACBlock(layer, **options), seed=4)
    assert isinstance(found, ACBlock)
    return found


@pytest.mark.parametrize(("layer", "options"), BLOCKS, ids=str)
def test_a_block_alone_becomes_the_official_fused_convolution(layer: Layer, options: Any, tmp_path: Path) -> None:
    model = block(layer, **options)
    path = save(model, tmp_path / "block.pth")
    repdeploy.convert(path, family="acnet", output=tmp_path / "b", set=facts_of(layer), dtype="float64")
    deploy = fused(layer, "fused_conv").double()
    deploy.load_state_dict(load_file(tmp_path / "b" / "weights.safetensors"), strict=True)
    for height, width in ((11, 9), (7, 14)):
        x = torch.randn(2, layer.inputs, height, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        with torch.no_grad():
            wanted = model.double()(x)
            assert torch.allclose(deploy(x), wanted, rtol=0, atol=1e-12 * float(wanted.abs().max())), (height, width)


def test_no_tap_of_a_border_is_lost(tmp_path: Path) -> None:
    """An impulse in every corner and beside it, through a block that cuts the border off and one that pads more than half."""
    for border in (0, 1, 3):
        layer = Layer(1, 2, 5, border=border)
        model = block(layer)
        path = save(model, tmp_path / f"{border}.pth")
        output = tmp_path / f"{border}.repdeploy"
        repdeploy.convert(path, family="acnet", output=output, set=[f"padding={border}"], dtype="float64")
        weights = load_file(output / "weights.safetensors")
        for row in (0, 1, 2, 6):
            for column in (0, 1, 5, 6):
                x = torch.zeros(1, 1, 7, 7, dtype=torch.float64)
                x[:, :, row, column] = 1
                got = F.conv2d(x, weights["fused_conv.weight"], weights["fused_conv.bias"], padding=border)
                with torch.no_grad():
                    assert torch.allclose(got, model.double()(x), rtol=0, atol=1e-12), (border, row, column)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("cfqkbnc", Layers(affine=False)),
        ("cfqkbnc", Layers(taps=3)),
        ("src20", Layers(last_norm=True)),
        ("wrnc16plain", Layers(affine=False, last_norm=True)),
        ("lenet5bn", Layers(taps=3, last_norm=True)),
    ],
)
def test_networks_of_block_variants(name: str, layers: Layers, tmp_path: Path) -> None:
    _, sizes, channels = BACKBONES[name]
    model = backbone(name, layers)
    assert_described(model, save(model, tmp_path / "a.pth"), sizes=sizes, channels=channels)


def test_squeeze_excite_stays_behind_the_plain_layers_it_was_configured_for(tmp_path: Path) -> None:
    """The official builder gives it to convolutions that are no ACB: 7x7 stem and 1x1 shortcuts."""
    model = model_of(lambda: BACKBONES["sres18"][0](Layers()))
    for module in list(model.modules()):
        if isinstance(module, nn.Sequential) and hasattr(module, "bn"):
            module.add_module("se", SqueezeExcite(module.bn.num_features))  # type: ignore[arg-type, union-attr]
    path = save(settled(scatter(model, seed=6), 3, 193), tmp_path / "se.pth")
    assert_described(model, path, sizes=((199, 193), (224, 224)))


@pytest.mark.parametrize("deps", [None, (4, 5, 6)])
def test_hdf5_files_with_and_without_widths(deps: tuple[int, ...] | None, tmp_path: Path) -> None:
    model = backbone("cfqkbnc")
    path = save_hdf5(model.state_dict(), tmp_path / "finish.hdf5", deps)
    assert_described(model, path, sizes=((33, 31),))
    deploys_like(model, backbone("cfqkbnc", Layers(deploy=True)), path, (34, 38), 3)


def test_an_hdf5_file_lists_its_blocks_alphabetically_but_they_run_in_numerical_order(tmp_path: Path) -> None:
    blocks = [[(2 + index % 3, 3) for index in range(12)], [(3, 4)], [(3, 4)]]
    model = settled(model_of(lambda: CifarResNet(Layers(), blocks, 3)), 3, 32)
    assert_described(model, save_hdf5(model.state_dict(), tmp_path / "epoch-3.hdf5"), sizes=((29, 31),))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_the_engine_s_checkpoint_holds_the_model_beside_its_optimizer(prefix: str, tmp_path: Path) -> None:
    model = backbone("src20")
    state = {f"{prefix}{key}": value for key, value in model.state_dict().items()}
    content = {"model": state, "optimizer": {"state": {}}, "scheduler": {"last_epoch": 3}, "iteration": 7}
    torch.save(content, tmp_path / "latest.pth")
    assert_described(model, tmp_path / "latest.pth", sizes=((32, 33),))


def test_a_head_that_was_changed_to_global_pooling_is_stated(tmp_path: Path) -> None:
    model = settled(model_of(lambda: ResNet(Layers(), (1, 2, 1, 1), (4, 4, 5, 6, 7), 5, stem="conv1")), 3, 65)
    path = save(model, tmp_path / "a.pth")
    assert_described(model, path, Setting("", "window", "global"), sizes=((65, 63), (33, 97)))


def test_the_last_map_beyond_the_fixed_window_has_no_influence(tmp_path: Path) -> None:
    model = settled(model_of(lambda: CifarResNet(Layers(), repeated((1, 1, 1), ((4, 4), (6, 6), (8, 8))), 5)), 3, 32)
    fused_network = described(save(model, tmp_path / "a.pth"))
    x = torch.randn(1, 3, 60, 60, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    corner = x.clone()
    corner[:, :, -4:, -4:] += 1
    with torch.no_grad():
        assert torch.equal(fused_network(x), fused_network(corner))
        assert torch.allclose(fused_network(x), model.double()(corner), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("sres18", (192, 224), "fixed window of 7x7, the last map is 6x7"),
        ("sres18", (417, 224), "linear takes 10 numbers"),
        ("sres50", (224, 192), "fixed window of 7x7, the last map is 7x6"),
        ("smi1", (192, 192), "fixed window of 7x7, the last map is 6x6"),
        ("src20", (28, 32), "fixed window of 8x8, the last map is 7x8"),
        ("src20", (61, 32), "linear takes 8 numbers"),
        ("wrnc16plain", (28, 28), "fixed window of 8x8, the last map is 7x7"),
        ("wrnc16plain", (33, 32), "linear takes 8 numbers"),
        ("vc", (31, 32), "too small"),
        ("vc", (64, 32), "linear1 takes 7 numbers, the layer before it gives 14"),
        ("lenet5bn", (27, 28), "linear1 takes 96 numbers"),
        ("lenet5bn", (32, 28), "linear1 takes 96 numbers"),
        ("cfqkbnc", (30, 32), "fc1 takes 54 numbers"),
        ("cfqkbnc", (32, 39), "fc1 takes 54 numbers"),
    ],
)
def test_illegal_sizes_are_refused_with_the_reason(name: str, size: tuple[int, int], reason: str, tmp_path: Path) -> None:
    path, channels = save(backbone(name), tmp_path / "a.pth"), BACKBONES[name][2]
    with pytest.raises(IllegalInput, match=reason):
        repdeploy.convert(path, output=tmp_path / "b", input_shape=(1, channels, *size))
    assert not (tmp_path / "b").exists()


WIDE = (64, 64, 128, 256, 512)
MOBILE = (32, 64, 128, 128, 256, 256, 512, 512, 512, 512, 512, 512, 1024, 1024)
FULL_VGG = (64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512)
BOTTLENECKS = ((64, 64, 256), (128, 128, 512), (256, 256, 1024), (512, 512, 2048))
OFFICIAL: list[tuple[str, Callable[[Layers], nn.Module], int, int]] = [
    ("cfqkbnc", lambda layers: CifarQuick(layers, (32, 32, 64), 10), 149226, 116906),
    ("vc", lambda layers: vgg(layers, FULL_VGG, 10), 24810570, 14982474),
    ("src56", lambda layers: CifarResNet(layers, repeated((9,) * 3, ((16,) * 2, (32,) * 2, (64,) * 2)), 10), 1429434, 853738),
    (
        "src110",
        lambda layers: CifarResNet(layers, repeated((18,) * 3, ((16,) * 2, (32,) * 2, (64,) * 2)), 10),
        2893050,
        1726666,
    ),
    ("wrnc16plain", lambda layers: WideResNet(layers, (16, 128, 256, 512), 10), 18172538, 10965770),
    ("sres18", lambda layers: ResNet(layers, (2, 2, 2, 2), WIDE, 1000, stem="conv1", window=7), 19028520, 11685672),
    ("sres34", lambda layers: ResNet(layers, (3, 4, 6, 3), WIDE, 1000, stem="conv1", window=7), 35885352, 21790120),
    ("sres50", lambda layers: BottleneckResNet(layers, 64, repeated((3, 4, 6, 3), BOTTLENECKS), 1000), 33116968, 25553256),
    ("smi1", lambda layers: MobileNet(layers, MOBILE, 1000, window=7), 4282280, 4226984),
]


@pytest.mark.parametrize(("name", "build", "before", "after"), OFFICIAL, ids=[row[0] for row in OFFICIAL])
def test_official_variants_are_named_and_counted_from_their_shapes(
    name: str, build: Callable[[Layers], nn.Module], before: int, after: int
) -> None:
    """Counts as in the sheet. No weight is read; the 7x7 window makes sres18 another network than DBB's ResNet-18."""
    with torch.device("meta"):
        tensors = ghosts(build(Layers()).state_dict())
    for hints in ({}, {"arch": name}, {"stored_name": name}):
        found = recognise(tensors, families(), Facts(), **hints)  # type: ignore[arg-type]
        assert (found.architecture, found.notes, found.families) == (name, (), ("acnet",))
    assert describe_blocks(Checkpoint(Path(), "torch zip", "model", "", "", tensors), found)[1:] == (before, after)


@pytest.mark.parametrize("stated", ["dilation=2", "stage1.dilation=2"])
def test_a_dilated_network_is_refused_because_the_block_has_none(stated: str, tmp_path: Path) -> None:
    path = save(backbone("src20"), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"stage1\.\S+ is said to have dilation 2, but .*cannot be dilated") as failure:
        repdeploy.convert(path, output=tmp_path / "b", set=[stated])
    assert failure.value.exit_status == 3
    assert not (tmp_path / "b").exists()


def test_a_dilated_block_is_refused_and_a_plain_layer_may_be_dilated(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dilation 2, but .*cannot be dilated"):
        repdeploy.convert(save(block(Layer(2, 3, 3)), tmp_path / "a.pth"), output=tmp_path / "b", set=["dilation=2"])
    model = model_of(lambda: ResNet(Layers(), (1, 1, 1, 1), (3, 3, 4, 5, 6), 5, stem="conv1", window=7))
    settled(model, 3, 193)
    model.conv1.conv.dilation, model.conv1.conv.padding = (2, 2), (6, 6)  # type: ignore[union-attr]
    stated = Setting("conv1", "dilation", 2)
    assert_described(model, save(model, tmp_path / "c.pth"), stated, sizes=((193, 195),))


def test_groups_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    path = save(block(Layer(4, 6, 3)), tmp_path / "a.pth")
    with pytest.raises(InputError, match="group"):
        repdeploy.convert(path, output=tmp_path / "b", set=["groups=4"])
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("stated", ["groups=3", "stage1.block0.conv1.groups=3"])
def test_groups_that_a_network_contradicts_are_refused(stated: str, tmp_path: Path) -> None:
    path = save(backbone("src20"), tmp_path / "a.pth")
    with pytest.raises(RepDeployError, match="groups"):
        repdeploy.convert(path, output=tmp_path / "b", set=[stated])
    assert not (tmp_path / "b").exists()


def without(*keys: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda state: [state.pop(key) for key in keys] and None


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("stage1.block0.conv1.acb.hor_conv.weight"), r"stage1\.block0\.conv1\.acb\.hor_conv\.weight is missing"),
        (without("stage2.block1.conv2.ver_bn.running_var"), r"stage2\.block1\.conv2\.ver_bn\.running_var is missing"),
        (
            lambda s: s.update({"stage1.conv1.ver_conv.weight": torch.ones(4, 3, 2, 1)}),
            "2x1 kernel does not stand at the centre",
        ),
        (lambda s: s.update({"stage1.conv1.hor_conv.weight": torch.ones(4, 2, 1, 3)}), "contradict"),
        (lambda s: s.update({"stage1.conv1.square_bn.bias": torch.ones(3)}), "contradict"),
        (lambda s: s.update({"stage1.conv1.square_conv.weight": torch.full((4, 3, 3, 3), torch.nan)}), "108 NaN"),
    ],
)
def test_a_damaged_block_is_refused_by_name(damage: Callable[[dict[str, Tensor]], None], message: str, tmp_path: Path) -> None:
    state = dict(backbone("src20").state_dict())
    damage(state)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=message):
        repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("name", ["src20", "wrnc16plain"])
def test_a_deploy_file_has_nothing_to_fuse(name: str, tmp_path: Path) -> None:
    model = backbone(name, Layers(deploy=True))
    again = repdeploy.convert(save(model, tmp_path / "finish_deploy.pth"), output=tmp_path / "b")
    assert again.already_deployed
    assert again.bundle is None
    assert_described(model, tmp_path / "finish_deploy.pth", sizes=((29, 31),))


def test_a_pickled_block_tells_its_own_geometry(tmp_path: Path) -> None:
    layer = Layer(4, 6, 5, stride=2, groups=2, border=1)
    model = block(layer)
    torch.save(model, tmp_path / "module.pth")
    result = repdeploy.convert(tmp_path / "module.pth", output=tmp_path / "b", dtype="float64")
    told = {(fact.name, fact.value) for fact in result.manifest.facts if fact.origin == "file"}
    assert {("stride", "2"), ("padding", "1"), ("groups", "2")} <= told
    deploy = fused(layer, "fused_conv").double()
    deploy.load_state_dict(load_file(tmp_path / "b" / "weights.safetensors"), strict=True)
    x = torch.randn(1, 4, 9, 8, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(deploy(x), model.double()(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_a_pickled_block_with_another_padding_mode_is_refused(mode: str, tmp_path: Path) -> None:
    """The file says that its border is not zero; the deploy weights cannot carry that."""
    model = block(Layer(3, 4, 3))
    for name in ("square", "ver", "hor"):
        model.get_submodule(f"{name}_conv").padding_mode = mode  # type: ignore[assignment]
    torch.save(model, tmp_path / "module.pth")
    with pytest.raises(InputError, match=mode):
        repdeploy.convert(tmp_path / "module.pth", output=tmp_path / "b")
