"""Files that lack a part, in ways that leave the rest looking like another, valid file: refused, never read as that one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import repdeploy
from repdeploy.errors import InputError
from sample_models import acnet, dbb, orepa
from sample_models.backbones import Layer, ResNet, WideResNet, settled
from sample_models.mobileone import MobileOneBlock
from sample_models.repghost import RepGhostNet, Row
from sample_models.scatter import scatter
from tests.networks import assert_described, repvgg, save

State = dict[str, Tensor]


def without(*parts: str) -> Callable[[State], State]:
    return lambda state: {key: value for key, value in state.items() if not any(part in key for part in parts)}


def renamed(old: str, new: str) -> Callable[[State], State]:
    return lambda state: {key.replace(old, new): value for key, value in state.items()}


def replaced(key: str, value: Tensor) -> Callable[[State], State]:
    return lambda state: state | {key: value}


def resnet(layers: object) -> nn.Module:
    return ResNet(layers, (1, 1, 1, 1), (4, 4, 6, 8, 10), 5)  # type: ignore[arg-type]


def wide_resnet() -> nn.Module:
    return WideResNet(acnet.Layers(), (4, 6, 8, 10), 5, depth=1)


CASES: list[tuple[str, Callable[[], nn.Module], Callable[[State], State], str]] = [
    ("a norm between DBB's pairs", lambda: resnet(dbb.TRAINING), without("stage0.conv1.bn."), "stage0.conv1"),
    ("a norm of the next layer", wide_resnet, without("stage1.block1.conv2.bn."), "stage1.block1.conv2.bn is missing"),
    ("a shortcut's norm", lambda: resnet(orepa.Layers()), without("stage2.0.shortcut.bn."), "shortcut"),
    ("half an affine norm", repvgg, without("stage1.0.rbr_dense.bn.bias"), "rbr_dense.bn.bias is missing"),
    ("an identity branch", repvgg, without("stage2.1.rbr_identity"), "so it has an identity branch"),
    ("a stage's block", lambda: repvgg(blocks=(1, 3, 1, 1)), without("stage2.1."), "a number is missing"),
    ("a copy", lambda: scatter(MobileOneBlock(4, 6, 3, copies=3)), without("rbr_conv.1."), "rbr_conv.1 is missing"),
    ("a kernel of a stem", lambda: orepa.LargeConv(Layer(3, 6, 7)), without("weight1."), "weight1 is missing"),
    ("a branch of DBB", lambda: scatter(dbb.DBB(Layer(4, 6, 3))), without("dbb_avg.conv."), "dbb_avg.conv.weight is missing"),
    ("rows of a vector", lambda: orepa.Orepa(Layer(4, 6, 3)), replaced("vector", torch.ones(5, 6)), "at least 6 rows"),
    ("a filter's shape", lambda: orepa.Orepa(Layer(4, 6, 3)), replaced("weight_orepa_avg_avg", torch.tensor(0.1)), "expected"),
    ("a scalar vector", lambda: orepa.Orepa(Layer(4, 6, 3)), replaced("vector", torch.tensor(1.0)), "at least 6 rows"),
    (
        "an even kernel",
        lambda: resnet(acnet.Layers()),
        replaced("stage0.conv1.conv.weight", torch.ones(4, 3, 8, 8)),
        "odd sizes",
    ),
]


@pytest.mark.parametrize(("build", "damage", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_is_missing_is_named(
    build: Callable[[], nn.Module], damage: Callable[[State], State], message: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    torch.save(damage(dict(build().eval().state_dict())), tmp_path / "ckpt.pth")
    target = tmp_path / "b.repdeploy"
    try:
        found = repdeploy.convert(tmp_path / "ckpt.pth", output=target).manifest
    except InputError as refused:
        said = str(refused)
    else:  # no network any more: its blocks alone are fused, and the reason is said
        said = " ".join(found.notes)
        assert found.skeleton is None
    assert message in said


def test_a_block_in_both_forms_is_refused(tmp_path: Path) -> None:
    state = dict(repvgg().state_dict())
    state["stage1.0.rbr_reparam.weight"], state["stage1.0.rbr_reparam.bias"] = torch.ones(8, 4, 3, 3), torch.ones(8)
    torch.save(state, tmp_path / "both.pth")
    with pytest.raises(InputError, match=r"has its branches and stage1\.0\.rbr_reparam\.weight as well"):
        repdeploy.convert(tmp_path / "both.pth", output=tmp_path / "b.repdeploy")


def test_an_architecture_of_another_family_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="architecture of another family"):
        repdeploy.convert(save(repvgg(), tmp_path / "a.pth"), arch="sres18", output=tmp_path / "b.repdeploy")


def test_orepa_vgg_in_a_resnet_is_fused_block_by_block_only(tmp_path: Path) -> None:
    """Each block applies a ReLU of its own there, which no key tells."""

    class Layers(orepa.Layers):
        def normed(self, layer: Layer) -> nn.Module:
            return orepa.OrepaVGG(layer) if layer.kernel == 3 else super().normed(layer)

    found = repdeploy.convert(save(resnet(Layers()), tmp_path / "a.pth"), output=tmp_path / "b.repdeploy").manifest
    assert found.skeleton is None
    assert any("ReLU in front of the residual sum" in note for note in found.notes)


def test_plain_layers_of_a_pickled_network_tell_their_geometry_too(tmp_path: Path) -> None:
    """A stem whose stride was changed after construction: the file says so, and the result follows it."""
    torch.manual_seed(0)
    stages = [[Row(3, 8, 8, False, 1)], [Row(3, 12, 12, True, 2)]]
    model = RepGhostNet(stages, stem=8, last=16, hidden=16, classes=5)
    model.conv_stem.stride = (1, 1)  # type: ignore[assignment]
    settled(model, 3, 32)
    torch.save({"model": model}, tmp_path / "whole.pth")
    x = torch.randn(2, 3, 33, 35)
    with torch.no_grad():
        wanted = model(x)
    np.savez(tmp_path / "e.npz", input=x.numpy(), output=wanted.numpy())
    found = repdeploy.convert(tmp_path / "whole.pth", output=tmp_path / "b.repdeploy", expect=tmp_path / "e.npz").manifest
    assert found.verdict.grade == "anchored"
    assert ("stride", "1", "file") in {
        (fact.name, fact.value, fact.origin) for fact in found.facts if "conv_stem" in fact.scopes
    }
    repdeploy.export(tmp_path / "b.repdeploy")
    assert repdeploy.verify(tmp_path / "b.repdeploy").passed
    assert repdeploy.verify(tmp_path / "b.repdeploy", against=tmp_path / "whole.pth").passed


def test_what_is_said_about_a_block_is_not_said_about_the_gate_inside(tmp_path: Path) -> None:
    """--set stage2.0.padding reaches the block, not the 1x1 layers of its squeeze-excite."""
    path = save(repvgg(squeeze_excite=True, widths=(16, 16, 32, 32, 48)), tmp_path / "se.pth")
    settings = ["stage2.0.padding=2", "stage2.0.dilation=2"]
    found = repdeploy.convert(path, output=tmp_path / "b.repdeploy", set=settings).manifest
    assert found.verdict.passed
    repdeploy.export(tmp_path / "b.repdeploy")
    assert repdeploy.verify(tmp_path / "b.repdeploy").passed


def test_a_block_that_lacks_what_its_like_have_is_noted(tmp_path: Path) -> None:
    """Legal in itself: the official constructors take both, but never both in one network."""
    from sample_models.replknet import RepLKNet

    torch.manual_seed(0)
    model = scatter(RepLKNet((7, 5, 5), (2, 2, 1), (6, 6, 8), 5, small_kernel=3, ffn_ratio=2))
    torch.save(without("stages.1.blocks.2.large_kernel.small_conv")(dict(model.state_dict())), tmp_path / "a.pth")
    found = repdeploy.inspect(tmp_path / "a.pth")
    assert any("stages.1.blocks.2.large_kernel has no small_conv.bn and small_conv.conv" in note for note in found.notes)
    torch.save(model.state_dict(), tmp_path / "b.pth")
    assert repdeploy.inspect(tmp_path / "b.pth").notes == ()


def test_a_half_fused_file_keeps_the_family_of_its_branches(tmp_path: Path) -> None:
    """The fused name alone would also be YOLO's, with another eps."""
    state = dict(repvgg().state_dict())
    fused = {key: value for key, value in state.items() if not key.startswith("stage3.0.")}
    fused["stage3.0.rbr_reparam.weight"], fused["stage3.0.rbr_reparam.bias"] = torch.randn(12, 8, 3, 3), torch.randn(12)
    torch.save(fused, tmp_path / "half.pth")
    found = repdeploy.convert(tmp_path / "half.pth", output=tmp_path / "b.repdeploy").manifest
    assert found.families == ("repvgg",)
    assert {fact.value for fact in found.facts if fact.name == "eps"} == {"1e-05"}


def test_several_networks_in_one_file_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from repdeploy_cli.app import run

    torch.save({"teacher": repvgg().state_dict(), "student": repvgg(seed=1).state_dict()}, tmp_path / "two.pth")
    assert run(["inspect", str(tmp_path / "two.pth")]) == 0
    assert "note: student" in capsys.readouterr().out


def test_an_identity_branch_proves_a_stride_of_one(tmp_path: Path) -> None:
    """A RepVGG for small images, whose first stage keeps the resolution: nothing has to be stated for it."""
    model = repvgg(widths=(8, 8, 8, 12, 16), strides=(2, 1, 2, 2, 2))
    assert_described(model, save(model, tmp_path / "a.pth"), sizes=[(65, 63), (33, 35)])


def test_another_activation_in_a_pickled_network_is_said(tmp_path: Path) -> None:
    model = repvgg()
    model.act = nn.SiLU()
    torch.save(model, tmp_path / "silu.pth")
    assert any(
        "has SiLU; rep_vgg is described with ReLU only" in note for note in repdeploy.inspect(tmp_path / "silu.pth").notes
    )


def test_replacing_an_anchored_bundle_is_said(tmp_path: Path) -> None:
    model = repvgg()
    path, target = save(model, tmp_path / "a.pth"), tmp_path / "b.repdeploy"
    x = torch.randn(2, 3, 65, 65)
    with torch.no_grad():
        np.savez(tmp_path / "e.npz", input=x.numpy(), output=model(x).numpy())
    repdeploy.convert(path, output=target, expect=tmp_path / "e.npz")
    again = repdeploy.convert(path, output=target).manifest
    assert "the bundle that was here is replaced: its verdict was anchored" in again.notes
