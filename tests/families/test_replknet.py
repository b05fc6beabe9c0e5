"""RepLKNet against its sheet: kernels larger than the map, one kernel or two, merged and deep-fused files, containers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import repdeploy
from repdeploy.checkpoint import load
from repdeploy.errors import InputError
from repdeploy.facts import Facts, Setting
from sample_models.replknet import RepLKNet
from sample_models.scatter import scatter
from tests.networks import assert_described, described, save
from tests.stages.test_recognise import recognised

SMALL: dict[str, Any] = {"kernels": (7, 5), "layers": (1, 2), "channels": (6, 8), "classes": 5, "small_kernel": 3}
SIZES = [(33, 35), (48, 31), (17, 16)]
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def replknet(seed: int = 0, **changes: Any) -> RepLKNet:
    torch.manual_seed(seed)
    model = scatter(RepLKNet(**{**SMALL, **changes}), seed)
    assert isinstance(model, RepLKNet)
    return model


def deep_fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """X.conv with its norm folded in and X.bn gone, as the official deep fusion leaves a merged network."""
    folded = {key: value for key, value in state.items() if ".bn." not in key}
    for key in [key for key in state if key.endswith(".conv.weight")]:
        name = key.removesuffix("conv.weight")
        mean, var, gamma, beta = (state[f"{name}bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        scale = gamma / (var + 1e-5).sqrt()
        folded[key] = state[key] * scale.view(-1, 1, 1, 1)
        folded[f"{name}conv.bias"] = beta - mean * scale
    return folded


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"kernels": (31, 13, 5), "layers": (1, 1, 1), "channels": (4, 6, 8), "small_kernel": 5},
        {"small_kernel": 5},
        {"small_kernel": 1},
        {"small_kernel": None, "dw_ratio": 1.5},
        {"dw_ratio": 1.3, "ffn_ratio": 2.4, "channels": (5, 7)},
        {"in_channels": 1, "classes": 1},
        {"kernels": (3,), "layers": (3,), "channels": (6,)},
        {"kernels": (3, 3, 3, 3, 5), "layers": (1, 1, 1, 1, 1), "channels": (4, 4, 6, 6, 8)},
    ],
)
def test_both_readings_are_the_module(variant: dict[str, Any], tmp_path: Path) -> None:
    model = replknet(**variant)
    assert_described(model, save(model, tmp_path / "ckpt.pth"), sizes=SIZES, channels=variant.get("in_channels", 3))


@pytest.mark.parametrize(("height", "width"), [(9, 11), (5, 4), (1, 1), (40, 33)])
def test_a_map_may_be_smaller_than_the_kernel(height: int, width: int, tmp_path: Path) -> None:
    """31x31 and 5x5 on maps from one pixel to more than the kernel: the border is zeros on both sides at once."""
    model = replknet(kernels=(31,), layers=(1,), channels=(4,), small_kernel=5)
    path = save(model, tmp_path / "ckpt.pth")
    assert_described(model, path, sizes=[(4 * height, 4 * width), (4 * height - 3, 4 * width - 1)])


def test_border_pixels_are_exact(tmp_path: Path) -> None:
    """An impulse in each corner of the map in front of the kernels."""
    model = replknet(small_kernel=5, kernels=(9,), layers=(1,), channels=(6,)).double()
    fused = described(save(model, tmp_path / "ckpt.pth"))
    unit = model.get_submodule("stages.0.blocks.0.large_kernel")
    for row in (0, 6):
        for column in (0, 8):
            x = torch.zeros(1, 6, 7, 9, dtype=torch.float64)
            x[:, :, row, column] = 1
            with torch.no_grad():
                got = fused.get_submodule("stages.0.blocks.0.large_kernel.lkb_reparam")(x)
                assert torch.allclose(got, unit(x), rtol=0, atol=1e-13)


def test_one_unit_alone_is_fused(tmp_path: Path) -> None:
    unit = replknet(kernels=(13, 5)).get_submodule("stages.0.blocks.0.large_kernel").double()
    conversion = repdeploy.convert(save(unit, tmp_path / "unit.pth"), output=tmp_path / "b.repdeploy", dtype="float64")
    assert conversion.manifest.verdict.grade == "blocks only"
    fused = load_file(tmp_path / "b.repdeploy" / "weights.safetensors")
    assert {key: tuple(value.shape) for key, value in fused.items()} == {
        "lkb_reparam.weight": (6, 1, 13, 13), "lkb_reparam.bias": (6,),
    }  # fmt: skip
    x = torch.randn(2, 6, 9, 16, dtype=torch.float64)
    with torch.no_grad():
        got = F.conv2d(x, fused["lkb_reparam.weight"], fused["lkb_reparam.bias"], padding=6, groups=6)
        assert torch.allclose(got, unit(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", [{}, {"small_kernel": None, "dw_ratio": 1.5}, {"kernels": (31, 5), "small_kernel": 5}])
def test_the_written_weights_load_into_the_official_merged_model(variant: dict[str, Any], tmp_path: Path) -> None:
    model, merged = replknet(**variant).double(), RepLKNet(**{**SMALL, **variant}, deploy=True).double().eval()
    repdeploy.convert(save(model, tmp_path / "ckpt.pth"), output=tmp_path / "b.repdeploy", dtype="float64")
    merged.load_state_dict(load_file(tmp_path / "b.repdeploy" / "weights.safetensors"), strict=True)
    x = torch.randn(2, 3, 33, 47, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        assert float((merged(x) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


@pytest.mark.parametrize("deep", [False, True])
def test_a_merged_file_is_recognised_and_has_nothing_to_fuse(deep: bool, tmp_path: Path) -> None:
    """Merged only, and after the official deep fusion, whose pre-norms and final norm are still there."""
    torch.manual_seed(0)
    model = scatter(RepLKNet(**SMALL, deploy=True)).double()
    state = deep_fused(model.state_dict()) if deep else model.state_dict()
    torch.save(state, tmp_path / "merged.pth")
    answer = repdeploy.convert(tmp_path / "merged.pth", output=tmp_path / "b.repdeploy")
    assert answer.already_deployed
    assert not (tmp_path / "b.repdeploy").exists()
    assert answer.manifest.parameters_after == sum(v.numel() for k, v in state.items() if not k.endswith(STATISTICS))
    assert_described(model, tmp_path / "merged.pth", sizes=SIZES)


def test_a_half_merged_file_is_finished(tmp_path: Path) -> None:
    model = replknet().double()
    repdeploy.convert(save(model, tmp_path / "ckpt.pth"), output=tmp_path / "b.repdeploy", dtype="float64")
    fused = load_file(tmp_path / "b.repdeploy" / "weights.safetensors")
    half = {key: value for key, value in model.state_dict().items() if not key.startswith("stages.1.blocks.2.large_kernel")}
    half |= {key: value for key, value in fused.items() if key.startswith("stages.1.blocks.2.large_kernel")}
    torch.save(half, tmp_path / "half.pth")
    assert_described(model, tmp_path / "half.pth", sizes=[(33, 35)])
    repdeploy.convert(tmp_path / "half.pth", output=tmp_path / "half.repdeploy", dtype="float64")
    assert sorted(load_file(tmp_path / "half.repdeploy" / "weights.safetensors")) == sorted(fused)


def test_the_trainers_file_holds_two_networks(tmp_path: Path) -> None:
    """`args` is a pickled argparse.Namespace and `epoch` a string, as the official trainer writes them."""
    own, ema = replknet(1), replknet(2)
    path = tmp_path / "checkpoint-best-ema.pth"
    torch.save(
        {
            "model": own.state_dict(), "optimizer": {"state": {}, "param_groups": []}, "epoch": "best-ema", "scaler": {},
            "args": argparse.Namespace(model="RepLKNet-31B", drop_path=0.3, use_sync_bn=True), "model_ema": ema.state_dict(),
        },
        path,
    )  # fmt: skip
    found = repdeploy.inspect(path)
    assert (found.source.where, found.source.has_ema) == ("model", True)
    assert len(found.notes) == 1
    assert found.notes[0].startswith("the file calls itself RepLKNet-31B; its shapes are ")
    x = torch.randn(2, 3, 33, 35, dtype=torch.float64)
    for weights, model in (("model", own), ("ema", ema)):
        repdeploy.convert(path, output=tmp_path / f"{weights}.repdeploy", weights=weights, dtype="float64")
        merged = RepLKNet(**SMALL, deploy=True).double().eval()
        merged.load_state_dict(load_file(tmp_path / f"{weights}.repdeploy" / "weights.safetensors"), strict=True)
        with torch.no_grad():
            assert torch.allclose(merged(x), model.double()(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("where", ["", "model", "module", "state_dict"])
def test_weights_are_found_under_the_keys_of_the_official_loaders(where: str, tmp_path: Path) -> None:
    state = replknet().state_dict()
    torch.save({where: state} if where else state, tmp_path / "ckpt.pth")
    found = repdeploy.inspect(tmp_path / "ckpt.pth")
    assert (found.source.where, len(found.blocks)) == (where, 3)


def test_a_network_pickled_with_synchronised_norms_reads_the_same(tmp_path: Path) -> None:
    model = replknet()
    torch.save(nn.SyncBatchNorm.convert_sync_batchnorm(model), tmp_path / "module.pth")
    assert_described(replknet(), tmp_path / "module.pth", sizes=[(33, 35)])
    eps = [fact for fact in repdeploy.inspect(tmp_path / "module.pth").facts if fact.name == "eps"]
    assert [(fact.value, fact.origin) for fact in eps] == [("1e-05", "file")]


@pytest.mark.parametrize("scope", ["", "stages.1", "stages.1.blocks.0.large_kernel"])
def test_a_stated_dilation_is_refused(scope: str, tmp_path: Path) -> None:
    path = save(replknet(), tmp_path / "ckpt.pth")
    with pytest.raises(InputError, match="is said to have dilation 2, but what its small kernel should do"):
        described(path, Setting(scope, "dilation", 2))
    with pytest.raises(InputError, match="dilation 2"):
        repdeploy.convert(path, output=tmp_path / "b.repdeploy", set=[f"{scope}.dilation=2" if scope else "dilation=2"])
    assert not (tmp_path / "b.repdeploy").exists()


def test_a_pickled_dilation_is_refused(tmp_path: Path) -> None:
    model = replknet()
    conv = model.get_submodule("stages.1.blocks.0.large_kernel.lkb_origin.conv")
    assert isinstance(conv, nn.Conv2d)
    conv.dilation = (2, 2)
    torch.save(model, tmp_path / "module.pth")
    with pytest.raises(InputError, match="dilation 2"):
        repdeploy.inspect(tmp_path / "module.pth")


def test_a_stated_eps_reaches_the_norms_before_and_behind(tmp_path: Path) -> None:
    model = replknet(dw_ratio=1.5)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-2
    assert_described(model, save(model, tmp_path / "ckpt.pth"), Setting("", "eps", 1e-2), sizes=SIZES)


def test_an_even_kernel_beside_an_odd_one_is_refused(tmp_path: Path) -> None:
    """The official code fails on it too: the two have has no centre."""
    state = dict(replknet().state_dict())
    state["stages.0.blocks.0.large_kernel.lkb_origin.conv.weight"] = torch.ones(6, 1, 6, 6)
    torch.save(state, tmp_path / "even.pth")
    with pytest.raises(InputError, match="has no centre"):
        repdeploy.convert(tmp_path / "even.pth", output=tmp_path / "b.repdeploy")


def test_a_small_kernel_larger_than_the_large_one_is_refused(tmp_path: Path) -> None:
    """The official constructor asserts the opposite; equal ones are legal."""
    state = dict(replknet().state_dict())
    state["stages.0.blocks.0.large_kernel.small_conv.conv.weight"] = torch.ones(6, 1, 9, 9)
    torch.save(state, tmp_path / "swapped.pth")
    with pytest.raises(InputError, match=r"large_kernel.*9x9"):
        repdeploy.convert(tmp_path / "swapped.pth", output=tmp_path / "b.repdeploy")


OFFICIAL = [
    ("RepLKNet-31B", ((31, 29, 27, 13), (128, 256, 512, 1024), 5, 1.0), "79.86", "79.53"),
    ("RepLKNet-31L", ((31, 29, 27, 13), (192, 384, 768, 1536), 5, 1.0), "172.67", "172.17"),
    ("RepLKNet-XL", ((27, 27, 27, 13), (256, 512, 1024, 2048), None, 1.5), "335.44", "335.40"),
]


@pytest.mark.parametrize(("name", "arguments", "before", "after"), OFFICIAL)
def test_official_variants_are_named_and_counted_from_their_shapes(name: str, arguments: Any, before: str, after: str) -> None:
    """Millions of parameters as in the sheet; also from the merged shapes, and after the official deep fusion."""
    kernels, channels, small_kernel, dw_ratio = arguments
    with torch.device("meta"):
        training, merged = (
            RepLKNet(kernels, (2, 2, 18, 2), channels, 1000, small_kernel, dw_ratio, deploy=deploy).state_dict()
            for deploy in (False, True)
        )
    found = recognised(training, arch=name, stored_name=name)
    assert (found.architecture, found.notes, len(found.slots)) == (name, (), 24)
    parameters = sum(value.numel() for key, value in training.items() if not key.endswith(STATISTICS))
    gone = sum(training[key].numel() for slot in found.slots for key in slot.consumed if not key.endswith(STATISTICS))
    there = sum(torch.Size(slot.squeezed.weight_shape).numel() + slot.squeezed.out_channels for slot in found.slots)
    assert f"{parameters / 1e6:.2f}" == before
    assert f"{(parameters - gone + there) / 1e6:.2f}" == after
    assert parameters - gone + there == sum(value.numel() for key, value in merged.items() if not key.endswith(STATISTICS))
    folded = {key: value for key, value in merged.items() if ".bn." not in key}
    folded |= {key.replace(".bn.", ".conv."): value for key, value in merged.items() if key.endswith(".bn.bias")}
    for state in (merged, folded):
        deployed = recognised(state, arch=name)
        assert deployed.already_deployed
        assert deployed.plan is not None
        assert list(deployed.plan.norms) == ["norm"]


def test_the_architecture_is_readable_from_the_keys() -> None:
    """Kernels, ratios and layers; strides, eps and the rest are conventions, and said to be."""
    facts = Facts()
    found = recognised(replknet(kernels=(13, 5), dw_ratio=1.5, small_kernel=None).state_dict(), facts=facts)
    assert [slot.squeezed.weight_shape for slot in found.slots] == [(9, 1, 13, 13), (12, 1, 5, 5), (12, 1, 5, 5)]
    assert found.architecture == "rep_lk (blocks 4,2,2,4, widths 6,6,8,8)"
    assert {fact.origin for fact in facts.record()} == {"skeleton"}
    assert {fact.value for fact in facts.record() if fact.name == "stride"} == {"1", "2"}


def test_a_backbone_with_norms_after_its_stages_is_fused_one_by_one(tmp_path: Path) -> None:
    """The downstream form: no head, and stages.N.norm, which is no part of the classifier's skeleton."""
    model = replknet().double()
    state = {key: value for key, value in model.state_dict().items() if not key.startswith(("norm.", "head."))}
    for stage, width in enumerate(SMALL["channels"]):
        for name, value in scatter(nn.BatchNorm2d(width), stage).double().state_dict().items():
            state[f"stages.{stage}.norm.{name}"] = value
    torch.save({"state_dict": state}, tmp_path / "backbone.pth")
    conversion = repdeploy.convert(tmp_path / "backbone.pth", output=tmp_path / "b.repdeploy", dtype="float64")
    assert (conversion.manifest.verdict.grade, len(conversion.manifest.blocks)) == ("blocks only", 3)
    fused = load_file(tmp_path / "b.repdeploy" / "weights.safetensors")
    with torch.device("meta"):
        merged = RepLKNet(**SMALL, deploy=True).state_dict()
    assert {key for key in fused if ".norm." not in key} == {key for key in merged if not key.startswith(("norm.", "head."))}
    assert all(torch.equal(fused[key], state[key]) for key in fused if "lkb_reparam" not in key)


@pytest.mark.parametrize(("fold", "norms"), [(False, 1), (True, 0)])
def test_only_the_final_norm_is_left_to_run_and_the_export_folds_it(fold: bool, norms: int, tmp_path: Path) -> None:
    """The pre-norms fold into the 1x1 behind them, all others into the convolution before them, the last into the head."""
    model = replknet()
    path = save(model, tmp_path / "ckpt.pth")
    assert any("prelkb_bn" in key for key in load(path).tensors)
    repdeploy.convert(path, output=tmp_path / "b.repdeploy")
    exported = repdeploy.export(tmp_path / "b.repdeploy", fold=fold)
    operations = [node.op_type for node in onnx.load(exported.bundle / exported.artifacts[0].file).graph.node]
    assert operations.count("BatchNormalization") == norms
    layers, transitions = sum(SMALL["layers"]), len(SMALL["layers"]) - 1
    assert operations.count("Conv") == 4 + 3 * layers + 2 * layers + 2 * transitions
    assert repdeploy.verify(tmp_path / "b.repdeploy", against=path).passed


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("stages.0.blocks.0.large_kernel.lkb_origin.bn.running_mean"), "lkb_origin.bn.running_mean is missing"),
        (lambda s: s.pop("stages.0.blocks.0.large_kernel.small_conv.conv.weight"), "small_conv.conv.weight is missing"),
        (lambda s: s.update({"stages.0.blocks.0.large_kernel.lkb_origin.bn.weight": torch.ones(4)}), "contradict"),
        (lambda s: s["stages.1.blocks.1.preffn_bn.running_var"].fill_(float("nan")), "preffn_bn.running_var holds 8 NaN"),
        (lambda s: s["stages.1.blocks.0.large_kernel.lkb_origin.bn.running_var"].fill_(-1.0), "large_kernel: .*variance"),
        (lambda s: s["stages.1.blocks.0.prelkb_bn.running_var"].fill_(-1.0), "stages.1.blocks.0.*variance"),
        (lambda s: s["norm.running_var"].fill_(-1.0), "norm.*variance"),
    ],
)
def test_a_damaged_block_is_refused_by_name(damage: Any, message: str, tmp_path: Path) -> None:
    state = dict(replknet().state_dict())
    damage(state)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=message):
        repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b.repdeploy")
    assert not (tmp_path / "b.repdeploy").exists()


@pytest.mark.parametrize("norm", ["stem.1.bn", "stages.0.blocks.0.pw1.bn", "stages.0.blocks.0.prelkb_bn"])
def test_a_norm_that_is_gone_is_missed_where_no_bias_says_that_it_was_folded(norm: str, tmp_path: Path) -> None:
    state = {key: value for key, value in replknet().state_dict().items() if not key.startswith(f"{norm}.")}
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=norm):
        repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b.repdeploy")


def test_channels_that_both_branches_switch_off_are_no_failure(tmp_path: Path) -> None:
    """gamma near 0 everywhere leaves an almost empty kernel: errors are judged against the block, not its channels."""
    model = replknet()
    for key, value in model.state_dict().items():
        if "large_kernel" in key and key.endswith("bn.weight"):
            value[1:4] = 1e-12
    conversion = repdeploy.convert(save(model, tmp_path / "ckpt.pth"), output=tmp_path / "b.repdeploy")
    assert conversion.manifest.verdict.passed


def test_it_trains_on_small_grey_images() -> None:
    torch.manual_seed(0)
    model = RepLKNet(**{**SMALL, "in_channels": 1}).train()
    F.cross_entropy(model(torch.randn(4, 1, 16, 16)), torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
