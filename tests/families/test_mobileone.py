"""MobileOne against its sheet: apple's and timm's keys, copies, squeeze-excite, groups, facts, deploy files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import repdeploy
from repdeploy.errors import InputError
from repdeploy.facts import Setting
from repdeploy.records import Match
from sample_models.mobileone import MobileOne, MobileOneBlock, timm_names
from sample_models.scatter import scatter
from tests.networks import assert_described, described, save
from tests.stages.test_recognise import recognised

SMALL: dict[str, Any] = {"blocks": (1, 2, 1, 1), "widths": (6, 6, 8, 12, 16), "classes": 5}
GATED: dict[str, Any] = {"blocks": (1, 1, 3, 2), "widths": (16, 16, 16, 32, 48), "squeeze_excite": (0, 0, 1, 2)}
SIZES = [(33, 33), (67, 65), (34, 47)]


def mobileone(seed: int = 0, **changes: Any) -> MobileOne:
    torch.manual_seed(seed)
    model = scatter(MobileOne(**{**SMALL, **changes}), seed)
    assert isinstance(model, MobileOne)
    return model


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"copies": 3},
        {"blocks": (2, 1, 3, 2), "widths": (3, 5, 7, 9, 11), "copies": 2},
        {"widths": (8, 8, 8, 8, 8)},
        {"channels": 1, "classes": 1},
        GATED,
    ],
)
def test_both_readings_are_the_module(variant: dict[str, Any], tmp_path: Path) -> None:
    model = mobileone(**variant)
    assert_described(model, save(model, tmp_path / "apple.pth"), sizes=SIZES, channels=variant.get("channels", 3))


@pytest.mark.parametrize("variant", [{"copies": 4}, GATED])
def test_timm_names_are_the_same_network(variant: dict[str, Any], tmp_path: Path) -> None:
    model = mobileone(**variant)
    torch.save(timm_names(model.state_dict()), tmp_path / "timm.pth")
    assert_described(model, tmp_path / "timm.pth", sizes=SIZES)


def test_every_block_counts_its_copies_and_branches() -> None:
    """The stem has one copy; a 1x1 block has no scale branch; a block that strides or widens has no identity."""
    found = recognised(mobileone(copies=4).state_dict())
    norms = {slot.name: sum(key.endswith("running_mean") for key in slot.consumed) for slot in found.slots}
    assert norms["stage0"] == 1 + 1
    assert norms["stage2.0"] == 4 + 1
    assert norms["stage2.2"] == 4 + 1 + 1
    assert norms["stage2.1"] == 4
    assert norms["stage2.3"] == 4 + 1
    assert {slot.name: slot.squeezed.groups for slot in found.slots if slot.name.startswith("stage2")} == {
        "stage2.0": 6, "stage2.1": 1, "stage2.2": 8, "stage2.3": 1,
    }  # fmt: skip


def test_ten_copies_are_counted_in_numerical_order(tmp_path: Path) -> None:
    model = mobileone(copies=11, blocks=(1, 1, 1, 1))
    assert_described(model, save(model, tmp_path / "many.pth"), sizes=[(33, 35)])


def test_border_pixels_are_exact(tmp_path: Path) -> None:
    """An impulse in each corner, through the stem and the strided depthwise block."""
    model = mobileone(copies=2).double()
    fused = described(save(model, tmp_path / "ckpt.pth"))
    for row in (0, 32):
        for column in (0, 34):
            x = torch.zeros(1, 3, 33, 35, dtype=torch.float64)
            x[:, :, row, column] = 1
            with torch.no_grad():
                wanted = model.get_submodule("stage1.0")(model.stage0(x))
                got = torch.relu(fused.outputs_by_slot(x)["stage1.0"])
            assert torch.allclose(got, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_one_block_alone_is_fused_with_its_groups(kernel: int, groups: int, tmp_path: Path) -> None:
    """The identity's norm tells the input's channels, and they the groups: its taps are at c mod (C / groups)."""
    torch.manual_seed(groups)
    block = scatter(MobileOneBlock(8, 8, kernel, groups=groups, copies=2)).double()
    conversion = repdeploy.convert(save(block, tmp_path / "block.pth"), output=tmp_path / "b.repdeploy", dtype="float64")
    assert conversion.manifest.blocks[0].groups == groups
    fused = load_file(tmp_path / "b.repdeploy" / "weights.safetensors")
    assert sorted(fused) == ["reparam_conv.bias", "reparam_conv.weight"]
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        got = F.conv2d(x, fused["reparam_conv.weight"], fused["reparam_conv.bias"], padding=kernel // 2, groups=groups)
        assert torch.allclose(got.relu(), block(x), rtol=0, atol=1e-12)


def test_a_strided_block_without_identity_needs_no_groups(tmp_path: Path) -> None:
    torch.manual_seed(3)
    block = scatter(MobileOneBlock(8, 12, 3, stride=2, groups=4, copies=2)).double()
    repdeploy.convert(save(block, tmp_path / "block.pth"), output=tmp_path / "b.repdeploy", dtype="float64")
    fused = load_file(tmp_path / "b.repdeploy" / "weights.safetensors")
    x = torch.randn(2, 8, 9, 7, dtype=torch.float64)
    with torch.no_grad():
        got = F.conv2d(x, fused["reparam_conv.weight"], fused["reparam_conv.bias"], 2, 1, groups=4)
        assert torch.allclose(got.relu(), block(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", [{"copies": 2}, GATED])
@pytest.mark.parametrize("timm", [False, True])
def test_the_written_weights_load_into_the_official_deploy_model(variant: dict[str, Any], timm: bool, tmp_path: Path) -> None:
    model, deploy = mobileone(**variant), MobileOne(**{**SMALL, **variant}, deploy=True)
    torch.save(timm_names(model.state_dict()) if timm else model.state_dict(), tmp_path / "ckpt.pth")
    repdeploy.convert(tmp_path / "ckpt.pth", output=tmp_path / "b.repdeploy", dtype="float64")
    fused = load_file(tmp_path / "b.repdeploy" / "weights.safetensors")
    if timm:
        apples = {timms: name for name in deploy.state_dict() for timms in timm_names({name: torch.ones(1)})}
        fused = {apples[key]: value for key, value in fused.items()}
    deploy.double().eval().load_state_dict(fused, strict=True)
    x = torch.randn(2, 3, 65, 47, dtype=torch.float64)
    with torch.no_grad():
        wanted = model.double()(x)
        assert float((deploy(x) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


@pytest.mark.parametrize("timm", [False, True])
def test_a_deploy_file_is_recognised_and_has_nothing_to_fuse(timm: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = scatter(MobileOne(**{**SMALL, **GATED}, deploy=True))
    torch.save(timm_names(model.state_dict()) if timm else model.state_dict(), tmp_path / "fused.pth")
    answer = repdeploy.convert(tmp_path / "fused.pth", output=tmp_path / "b.repdeploy")
    assert answer.already_deployed
    assert not (tmp_path / "b.repdeploy").exists()
    assert_described(model, tmp_path / "fused.pth", sizes=[(33, 47)])


def test_a_half_fused_file_is_finished(tmp_path: Path) -> None:
    model = mobileone(copies=2)
    repdeploy.convert(save(model, tmp_path / "ckpt.pth"), output=tmp_path / "b.repdeploy", dtype="float64")
    fused = load_file(tmp_path / "b.repdeploy" / "weights.safetensors")
    half = {key: value for key, value in model.double().state_dict().items() if not key.startswith("stage2.")}
    half |= {key: value for key, value in fused.items() if key.startswith("stage2.")}
    torch.save(half, tmp_path / "half.pth")
    assert_described(model, tmp_path / "half.pth", sizes=[(33, 47)])
    conversion = repdeploy.convert(tmp_path / "half.pth", output=tmp_path / "half.repdeploy", dtype="float64")
    assert not conversion.already_deployed
    again = load_file(tmp_path / "half.repdeploy" / "weights.safetensors")
    assert sorted(again) == sorted(fused)
    assert all(torch.allclose(again[key], fused[key], rtol=0, atol=1e-14) for key in fused)


OFFICIAL = [
    ("mobileone_s0", (48, 48, 128, 256, 1024), 4, (0, 0, 0, 0)),
    ("mobileone_s1", (64, 96, 192, 512, 1280), 1, (0, 0, 0, 0)),
    ("mobileone_s2", (64, 96, 256, 640, 2048), 1, (0, 0, 0, 0)),
    ("mobileone_s3", (64, 128, 320, 768, 2048), 1, (0, 0, 0, 0)),
    ("mobileone_s4", (64, 192, 448, 896, 2048), 1, (0, 0, 5, 1)),
]


def shapes(widths: Any, copies: int, gated: Any, *, deploy: bool = False) -> dict[str, Tensor]:
    with torch.device("meta"):
        return MobileOne((2, 8, 10, 1), widths, 10, copies=copies, squeeze_excite=gated, deploy=deploy).state_dict()


@pytest.mark.parametrize(("name", "widths", "copies", "gated"), OFFICIAL)
def test_official_variants_are_named_from_their_shapes(name: str, widths: Any, copies: int, gated: Any) -> None:
    for state in (shapes(widths, copies, gated), shapes(widths, copies, gated, deploy=True)):
        for named in (state, timm_names(state)):
            found = recognised(named, arch=name, stored_name=name)
            assert (found.architecture, found.notes, found.families) == (name, (), ("mobileone",))
            assert recognised(named).architecture == name


def test_the_published_parameter_counts_are_reached() -> None:
    """mobileone_s0 with 10 classes, as the sheet has them."""
    state = shapes(*OFFICIAL[0][1:])
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    assert sum(value.numel() for key, value in state.items() if not key.endswith(statistics)) == 4278522
    found = recognised(state)
    assert found.matches[[match.family for match in found.matches].index("mobileone")] == Match("mobileone", 43, 0)
    fused = sum(torch.Size(slot.squeezed.weight_shape).numel() + slot.squeezed.out_channels for slot in found.slots)
    assert fused + state["linear.weight"].numel() + 10 == 1063754


def test_a_stated_eps_and_stride_reach_every_branch(tmp_path: Path) -> None:
    model = mobileone(copies=2)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-2
    for layer in model.get_submodule("stage3.0").modules():
        if isinstance(layer, nn.Conv2d):
            layer.stride = (1, 1)
    settings = Setting("", "eps", 1e-2), Setting("stage3.0", "stride", 1)
    assert_described(model, save(model, tmp_path / "ckpt.pth"), *settings, sizes=[(33, 47)])


def test_what_was_assumed_is_said(tmp_path: Path) -> None:
    facts = repdeploy.inspect(save(mobileone(), tmp_path / "ckpt.pth")).facts
    assert {(fact.name, fact.value, fact.origin) for fact in facts} >= {
        ("eps", "1e-05", "skeleton"), ("stride", "2", "skeleton"), ("padding", "1", "skeleton"), ("padding", "0", "skeleton"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("stage2.0.rbr_conv.1.bn.running_mean"), "stage2.0.rbr_conv.1.bn.running_mean is missing"),
        (lambda s: s.pop("stage2.2.rbr_skip.running_var"), "stage2.2.rbr_skip.running_var is missing"),
        (lambda s: s.pop("stage2.0.rbr_scale.conv.weight"), "stage2.0.rbr_scale.conv.weight is missing"),
        (lambda s: s.update({"stage2.0.rbr_conv.1.conv.weight": torch.ones(7, 1, 3, 3)}), "contradict"),
        (lambda s: s.update({"stage2.0.rbr_conv.1.conv.weight": torch.ones(6, 1, 2, 2)}), "does not stand at the centre"),
        (lambda s: s.update({"stage2.2.rbr_skip.running_mean": torch.ones(4)}), "takes 4 channels by its own tensors"),
        (lambda s: s["stage2.2.rbr_skip.running_var"].fill_(float("nan")), "stage2.2.rbr_skip.running_var holds 8 NaN"),
    ],
)
def test_a_damaged_block_is_refused_by_name(damage: Any, message: str, tmp_path: Path) -> None:
    state = dict(mobileone(copies=2).state_dict())
    damage(state)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=message):
        repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b.repdeploy")
    assert not (tmp_path / "b.repdeploy").exists()


def test_the_exported_network_has_no_norm_and_one_convolution_per_block(tmp_path: Path) -> None:
    model = mobileone(**GATED)
    repdeploy.convert(save(model, tmp_path / "ckpt.pth"), output=tmp_path / "b.repdeploy")
    exported = repdeploy.export(tmp_path / "b.repdeploy")
    operations = [node.op_type for node in onnx.load(exported.bundle / exported.artifacts[0].file).graph.node]
    assert "BatchNormalization" not in operations
    blocks, gates = 1 + 2 * (1 + 1 + 3 + 2), 2 * (1 + 2)
    assert operations.count("Conv") == blocks + 2 * gates


def test_it_trains_on_small_grey_images() -> None:
    torch.manual_seed(0)
    model = MobileOne((1, 1, 1, 1), (8, 8, 16, 16, 32), 10, channels=1, copies=2, squeeze_excite=(0, 0, 1, 1)).train()
    F.cross_entropy(model(torch.randn(4, 1, 16, 16)), torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
