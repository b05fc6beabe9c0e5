"""YOLO's RepConv: three ways of writing RepVGG's block inside detectors that are not known, and implicit layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import repdeploy
from repdeploy.errors import InputError, NotRecognised
from sample_models.repconv import RepConv, RepConvN, classifier
from sample_models.scatter import scatter
from tests.networks import repvgg, save


def stored(bundle: Path) -> dict[str, Tensor]:
    return load_file(bundle / "weights.safetensors")


def detector(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = scatter(classifier(6, 5, channels=3), seed)
    assert isinstance(model, nn.Sequential)
    return model


def equal_outputs(model: nn.Module, bundle: Path) -> None:
    """The written weights, in the deploy form of the same network, give its outputs."""
    deploy = classifier(6, 5, channels=3, deploy=True)
    deploy.load_state_dict(stored(bundle), strict=True)
    x = torch.randn(2, 3, 17, 15)
    with torch.no_grad():
        wanted = model.eval()(x)
        assert torch.allclose(deploy.eval()(x), wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_a_pickled_detector_is_fused_block_by_block(tmp_path: Path) -> None:
    """The classes say which conv1 and conv2 stand side by side; the attributes give eps. Nothing is loaded."""
    model = detector()
    torch.save({"epoch": 3, "model": model, "ema": None, "updates": 0}, tmp_path / "last.pt")
    found = repdeploy.convert(tmp_path / "last.pt", output=tmp_path / "b.repdeploy").manifest
    assert [(block.name, block.formula) for block in found.blocks] == [
        ("1", "3x3-BN + 1x1-BN + BN"),
        ("2", "3x3-BN + 1x1-BN"),
        ("3", "3x3-BN + 1x1-BN"),
        ("4.m.0", "SHIFT-1x1-SCALE"),
    ]
    assert {(fact.name, fact.value, fact.origin) for fact in found.facts if fact.name == "eps"} == {("eps", "0.001", "file")}
    assert ("stride", "2", "file") in {(fact.name, fact.value, fact.origin) for fact in found.facts}
    assert found.verdict.warnings == ()
    equal_outputs(model, tmp_path / "b.repdeploy")


def test_the_state_dict_alone_needs_the_family_for_conv1_beside_conv2(tmp_path: Path) -> None:
    """Without its name two convolutions called conv1 and conv2 are left alone; the rest of YOLOv7 is unmistakable."""
    model = detector()
    save(model, tmp_path / "weights.pt")
    plain = repdeploy.convert(tmp_path / "weights.pt", output=tmp_path / "a.repdeploy").manifest
    assert [block.name for block in plain.blocks] == ["1", "2", "4.m.0"]
    assert "3.conv1.conv.weight" in stored(tmp_path / "a.repdeploy")
    proved = repdeploy.verify(tmp_path / "a.repdeploy", against=tmp_path / "weights.pt")
    assert [check.subject for check in proved.checks if check.gate == "algebra"] == ["1", "2", "4.m.0"]
    named = repdeploy.convert(tmp_path / "weights.pt", family="repconv", output=tmp_path / "b.repdeploy").manifest
    assert [block.name for block in named.blocks] == ["1", "2", "3", "4.m.0"]
    equal_outputs(model, tmp_path / "b.repdeploy")


def test_without_any_statement_the_eps_of_yolo_is_assumed_and_said_first(tmp_path: Path) -> None:
    save(detector(), tmp_path / "weights.pt")
    found = repdeploy.convert(tmp_path / "weights.pt", output=tmp_path / "a.repdeploy").manifest
    (warning,) = found.verdict.warnings
    assert "eps = 0.001 is an assumption" in warning
    assert "at 1e-05 (the default of torch)" in warning
    stated = repdeploy.convert(tmp_path / "weights.pt", output=tmp_path / "b.repdeploy", set=["eps=1e-3"]).manifest
    assert stated.verdict.warnings == ()
    assert all(
        torch.equal(value, stored(tmp_path / "b.repdeploy")[key]) for key, value in stored(tmp_path / "a.repdeploy").items()
    )


@pytest.mark.parametrize(("family", "eps"), [("repconv", 1e-3), (None, 1e-5)])
def test_yolo_v6_has_the_keys_of_repvgg(family: str | None, eps: float, tmp_path: Path) -> None:
    """Its name decides the eps; without it RepVGG's is assumed, and the warning says what YOLO's would change."""
    state = {f"backbone.{key}": value for key, value in repvgg().state_dict().items() if not key.startswith("linear")}
    torch.save(state, tmp_path / "yolov6.pt")
    found = repdeploy.convert(tmp_path / "yolov6.pt", family=family, output=tmp_path / "b.repdeploy").manifest
    assert found.family == (family or "repvgg")
    assert f"eps = {eps:g} is an assumption" in found.verdict.warnings[0]
    name = "backbone.stage1.0"
    scale, point = (
        state[f"{name}.{branch}.bn.weight"] / torch.sqrt(state[f"{name}.{branch}.bn.running_var"] + eps)
        for branch in ("rbr_dense", "rbr_1x1")
    )
    wanted = state[f"{name}.rbr_dense.conv.weight"] * scale.view(-1, 1, 1, 1)
    wanted = wanted + F.pad(state[f"{name}.rbr_1x1.conv.weight"] * point.view(-1, 1, 1, 1), (1, 1, 1, 1))
    assert torch.allclose(stored(tmp_path / "b.repdeploy")[f"{name}.rbr_reparam.weight"], wanted, atol=1e-5)


def test_groups_and_stride_of_a_pickled_block_are_facts_of_the_file(tmp_path: Path) -> None:
    block = scatter(RepConv(8, 8))
    for branch in (block.rbr_dense, block.rbr_1x1):
        old = branch[0]
        branch[0] = nn.Conv2d(8, 8, old.kernel_size, padding=old.padding, groups=4, bias=False)
    torch.save({"model": nn.Sequential(block)}, tmp_path / "grouped.pt")
    found = repdeploy.convert(tmp_path / "grouped.pt", output=tmp_path / "b.repdeploy").manifest
    assert [item.groups for item in found.blocks] == [4]
    deploy = nn.Conv2d(8, 8, 3, padding=1, groups=4)
    deploy.load_state_dict({key.rpartition(".")[2]: value for key, value in stored(tmp_path / "b.repdeploy").items()})
    x = torch.randn(1, 8, 9, 7)
    with torch.no_grad():
        assert torch.allclose(F.silu(deploy(x)), nn.Sequential(block).eval()(x), atol=1e-5)


@pytest.mark.parametrize("levels", [1, 3, 4])
def test_implicit_layers_fold_into_the_head_of_every_resolution(levels: int, tmp_path: Path) -> None:
    """YOLOv7's own fuse(): the bias takes the kernel times what was added, then both are multiplied."""
    generator = torch.Generator().manual_seed(levels)
    state: dict[str, Tensor] = {"model.105.anchors": torch.randn(levels, 3, 2, generator=generator)}
    for level in range(levels):
        state[f"model.105.m.{level}.weight"] = torch.randn(9, 6, 1, 1, generator=generator)
        state[f"model.105.m.{level}.bias"] = torch.randn(9, generator=generator)
        state[f"model.105.ia.{level}.implicit"] = torch.randn(1, 6, 1, 1, generator=generator)
        state[f"model.105.im.{level}.implicit"] = torch.randn(1, 9, 1, 1, generator=generator)
    torch.save(state, tmp_path / "head.pt")
    repdeploy.convert(tmp_path / "head.pt", output=tmp_path / "b.repdeploy")
    got = stored(tmp_path / "b.repdeploy")
    assert sorted(got) == sorted(key for key in state if "implicit" not in key)
    for level in range(levels):
        weight, bias = state[f"model.105.m.{level}.weight"], state[f"model.105.m.{level}.bias"]
        add, multiply = (state[f"model.105.{part}.{level}.implicit"].flatten() for part in ("ia", "im"))
        assert torch.allclose(got[f"model.105.m.{level}.weight"], weight * multiply.view(-1, 1, 1, 1), atol=1e-6)
        assert torch.allclose(got[f"model.105.m.{level}.bias"], (bias + weight[:, :, 0, 0] @ add) * multiply, atol=1e-5)


@pytest.mark.parametrize(
    "state",
    [
        {"neck.m.0.weight": torch.ones(3, 3, 1, 1), "neck.m.0.bias": torch.ones(3)},
        {"stem.conv.weight": torch.ones(3, 3, 3, 3), "stem.conv.bias": torch.ones(3)},
        {f"a.{name}.conv.weight": torch.ones(4, 4, size, size) for name, size in (("conv1", 3), ("conv2", 1))},
    ],
)
def test_ordinary_names_are_no_blocks(state: dict[str, Tensor], tmp_path: Path) -> None:
    """What a fused block is called here is what half of all networks call their layers."""
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(NotRecognised, match="no block of an installed family"):
        repdeploy.inspect(tmp_path / "other.pt")


def test_two_convolutions_in_series_are_not_taken_for_branches_even_by_name(tmp_path: Path) -> None:
    state = {f"a.{key}": value for key, value in scatter(RepConvN(4, 4)).state_dict().items()}
    state["a.conv2.conv.weight"] = torch.randn(4, 4, 3, 3)
    torch.save(state, tmp_path / "series.pt")
    with pytest.raises(NotRecognised, match="no repconv weights"):
        repdeploy.inspect(tmp_path / "series.pt", family="repconv")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("1.rbr_1x1.1.running_var"), "1.rbr_1x1.1.running_var is missing"),
        (lambda s: s.update({"4.ia.0.implicit": torch.zeros(1, 3, 1, 1)}), "contradict"),
        (lambda s: s["4.im.0.implicit"].fill_(float("inf")), "Inf"),
    ],
)
def test_a_damaged_block_is_refused_by_name(
    damage: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    state = dict(detector().state_dict())
    damage(state)
    torch.save(state, tmp_path / "damaged.pt")
    with pytest.raises(InputError, match=message):
        repdeploy.convert(tmp_path / "damaged.pt", output=tmp_path / "b.repdeploy")
    assert not (tmp_path / "b.repdeploy").exists()
