"""RepViT against its sheet: official and timm's keys, the first release's form, one head or two, deploy files, containers."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repdeploy
from repdeploy.checkpoint import load
from repdeploy.errors import InputError
from repdeploy.facts import Facts, Setting
from repdeploy.network import describe
from repdeploy.rebuild import reader
from repdeploy.recognise import recognise
from repdeploy.registry import families
from sample_models.repvit import RepVGGDW, RepViT, timm_names
from sample_models.scatter import scatter
from tests.networks import STATISTICS, assert_described, described, load_renamed, save, trained_numbers, written
from tests.stages.test_recognise import recognised

SMALL: dict[str, Any] = {"depths": (1, 2, 3), "widths": (6, 8, 12), "classes": 5}
SIZES = [(33, 33), (65, 47), (34, 63)]


def repvit(seed: int = 0, **changes: Any) -> RepViT:
    torch.manual_seed(seed)
    model = scatter(RepViT(**{**SMALL, **changes}), seed)
    assert isinstance(model, RepViT)
    return model


def named(state: Mapping[str, Tensor], timm: bool) -> dict[str, Tensor]:
    return timm_names(state) if timm else dict(state)


def deploy_model(fused: Mapping[str, Tensor], timm: bool, **changes: Any) -> RepViT:
    """The official deploy model with these weights, strictly loaded."""
    model = RepViT(**{**SMALL, **changes}, deploy=True).double().eval()
    load_renamed(model, lambda state: named(state, timm), fused)
    return model


def assert_deployed(model: nn.Module, path: Path) -> None:
    """The network of fused convolutions in `path` is the module; its ordinary names tell nothing, so the family is stated."""
    tensors, facts = load(path).tensors, Facts()
    plan = recognise(tensors, families(), facts, family="repvit").plan
    assert plan is not None
    network = describe(plan, reader(tensors), facts).network(squeezed=True, dtype=torch.float64)
    for height, width in SIZES:
        x = torch.randn(2, 3, height, width, dtype=torch.float64)
        with torch.no_grad():
            assert torch.allclose(network(x), model.double()(x), rtol=1e-11, atol=1e-12)


VARIANTS: list[dict[str, Any]] = [
    {},
    {"legacy": True},
    {"distilled": False},
    {"legacy": True, "distilled": False, "kernel": 5},
    {"kernel": 5},
    {"kernel": 1},
    {"depths": (2, 1, 1, 1), "widths": (4, 8, 8, 10)},
    {"depths": (3,), "widths": (6,)},
    {"depths": (1, 1, 11), "widths": (4, 6, 6)},
    {"depths": (1, 1, 1, 1, 1), "widths": (4, 6, 8, 10, 12)},
    {"channels": 1, "classes": 1},
    {"widths": (34, 48, 36), "channels": 4},
]


@pytest.mark.parametrize("timm", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_readings_are_the_module(variant: dict[str, Any], timm: bool, tmp_path: Path) -> None:
    model = repvit(**variant)
    torch.save(named(model.state_dict(), timm), tmp_path / "ckpt.pth")
    assert_described(model, tmp_path / "ckpt.pth", sizes=SIZES, channels=variant.get("channels", 3))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 40), (17, 5)])
def test_maps_may_be_one_pixel_wide(height: int, width: int, tmp_path: Path) -> None:
    model = repvit(kernel=5)
    assert_described(model, save(model, tmp_path / "ckpt.pth"), sizes=[(height, width)])


@pytest.mark.parametrize("legacy", [False, True])
def test_border_pixels_are_exact(legacy: bool, tmp_path: Path) -> None:
    """An impulse in each corner of the map in front of a mixer, whose outer norm shifts the border too."""
    model = repvit(kernel=5, legacy=legacy).double()
    fused = described(save(model, tmp_path / "ckpt.pth")).get_submodule("features.4.token_mixer.0")
    mixer = model.get_submodule("features.4.token_mixer.0")
    for row in (0, 6):
        for column in (0, 8):
            x = torch.zeros(1, 8, 7, 9, dtype=torch.float64)
            x[:, :, row, column] = 1
            with torch.no_grad():
                assert torch.allclose(fused(x), mixer(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("kernel", [3, 7])
@pytest.mark.parametrize("legacy", [False, True])
def test_one_mixer_alone_is_fused(legacy: bool, kernel: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    mixer = scatter(nn.ModuleDict({"mixer": RepVGGDW(6, kernel, legacy)})).double()
    fused = written(save(mixer, tmp_path / "mixer.pth"))
    assert {key: tuple(value.shape) for key, value in fused.items()} == {
        "mixer.weight": (6, 1, kernel, kernel), "mixer.bias": (6,),
    }  # fmt: skip
    x = torch.randn(2, 6, 9, 4, dtype=torch.float64)
    with torch.no_grad():
        got = F.conv2d(x, fused["mixer.weight"], fused["mixer.bias"], padding=kernel // 2, groups=6)
        assert torch.allclose(got, mixer.get_submodule("mixer")(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("timm", [False, True])
@pytest.mark.parametrize("variant", [{}, {"legacy": True}, {"distilled": False}, {"kernel": 5, "legacy": True}])
def test_the_written_weights_load_into_the_official_deploy_model(variant: dict[str, Any], timm: bool, tmp_path: Path) -> None:
    """Not one norm is left; the level of names above each convolution is gone."""
    model = repvit(**variant).double()
    torch.save(named(model.state_dict(), timm), tmp_path / "ckpt.pth")
    deploy = deploy_model(written(tmp_path / "ckpt.pth"), timm, **variant)
    x = torch.randn(2, 3, 65, 47, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        assert float((deploy(x) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


@pytest.mark.parametrize("timm", [False, True])
@pytest.mark.parametrize("distilled", [False, True])
def test_the_head_is_the_mean_of_both_behind_their_norms(distilled: bool, timm: bool, tmp_path: Path) -> None:
    """W_h = W diag(t), b_h = b + W d with t = gamma / sqrt(var + eps), d = beta - mean t."""
    state = repvit(distilled=distilled).double().state_dict()
    torch.save(named(state, timm), tmp_path / "ckpt.pth")
    fused = written(tmp_path / "ckpt.pth")
    weights, biases = [], []
    for name in ["classifier", "classifier_dist"][: 1 + distilled]:
        gamma, beta, mean, var = (state[f"classifier.{name}.bn.{part}"] for part in ("weight", "bias", *STATISTICS[:2]))
        t = gamma / (var + 1e-5).sqrt()
        weights.append(state[f"classifier.{name}.l.weight"] * t)
        biases.append(state[f"classifier.{name}.l.bias"] + state[f"classifier.{name}.l.weight"] @ (beta - mean * t))
    head = "head" if timm else "classifier"
    assert torch.allclose(fused[f"{head}.weight"], torch.stack(weights).mean(0), rtol=0, atol=1e-13)
    assert torch.allclose(fused[f"{head}.bias"], torch.stack(biases).mean(0), rtol=0, atol=1e-13)


@pytest.mark.parametrize("timm", [False, True])
def test_a_deploy_file_is_recognised_and_has_nothing_to_fuse(timm: bool, tmp_path: Path) -> None:
    """The same file for both forms of the mixer, and for one head and two."""
    torch.manual_seed(0)
    model = scatter(RepViT(**SMALL, deploy=True))
    torch.save(named(model.state_dict(), timm), tmp_path / "fused.pth")
    answer = repdeploy.convert(tmp_path / "fused.pth", output=tmp_path / "b.repdeploy", family="repvit")
    assert answer.already_deployed
    assert not (tmp_path / "b.repdeploy").exists()
    assert_deployed(model, tmp_path / "fused.pth")


@pytest.mark.parametrize("timm", [False, True])
@pytest.mark.parametrize("stage", ["features.4.", "features.3.", "classifier."])
def test_a_half_fused_file_is_finished(stage: str, timm: bool, tmp_path: Path) -> None:
    """A block, one that strides, or the head is fused already."""
    model = repvit().double()
    torch.save(model.state_dict(), tmp_path / "ckpt.pth")
    fused = written(tmp_path / "ckpt.pth")
    half = {key: value for key, value in model.state_dict().items() if not key.startswith(stage)}
    half |= {key: value for key, value in fused.items() if key.startswith(stage)}
    torch.save(named(half, timm), tmp_path / "half.pth")
    assert_described(model, tmp_path / "half.pth", sizes=[(33, 47)])
    again, wanted = written(tmp_path / "half.pth"), named(fused, timm)
    assert sorted(again) == sorted(wanted)
    assert all(torch.allclose(again[key], wanted[key], rtol=0, atol=1e-13) for key in wanted)


def test_every_block_tells_what_it_is_made_of() -> None:
    """Three norms around a mixer's sum, one without, two heads of a norm each; the 1x1 layers are pairs."""
    names = "features.1.token_mixer.0", "classifier", "features.1.channel_mixer.m.0"
    counted = {}
    for legacy in (False, True):
        found = recognised(repvit(legacy=legacy).state_dict())
        norms = {slot.name: sum(key.endswith("running_mean") for key in slot.consumed) for slot in found.slots}
        counted[legacy] = [norms[name] for name in names]
        depthwise = {slot.name: slot.squeezed.groups for slot in found.slots if slot.squeezed.groups > 1}
        assert depthwise == {
            "features.1.token_mixer.0": 6, "features.2.token_mixer.0": 6, "features.3.token_mixer.0": 6,
            "features.4.token_mixer.0": 8, "features.5.token_mixer.0": 8, "features.6.token_mixer.0": 8,
            "features.7.token_mixer.0": 8, "features.8.token_mixer.0": 12, "features.9.token_mixer.0": 12,
            "features.10.token_mixer.0": 12,
        }  # fmt: skip
    assert counted == {False: [2, 2, 1], True: [2, 2, 1]}


OFFICIAL = [
    ("repvit_m0_9", (48, 96, 192, 384), (2, 2, 14, 2), False, "5.49", "5.07"),
    ("repvit_m1_0", (56, 112, 224, 448), (2, 2, 14, 2), False, "7.30", "6.81"),
    ("repvit_m1_1", (64, 128, 256, 512), (2, 2, 12, 2), False, "8.80", "8.24"),
    ("repvit_m1_5", (64, 128, 256, 512), (4, 4, 24, 4), False, "14.64", "14.05"),
    ("repvit_m2_3", (80, 160, 320, 640), (6, 6, 34, 2), False, "23.69", "22.93"),
    ("repvit_m1", (48, 96, 192, 384), (2, 2, 14, 2), True, "5.49", "5.07"),
    ("repvit_m2", (64, 128, 256, 512), (2, 2, 12, 2), True, "8.80", "8.24"),
    ("repvit_m3", (64, 128, 256, 512), (4, 4, 18, 2), True, "10.68", "10.12"),
]
"""Widths, blocks, the first release's form; millions of parameters with two heads of 1000 classes, and fused."""


def shapes(widths: Any, depths: Any, legacy: bool, *, deploy: bool = False) -> dict[str, Tensor]:
    with torch.device("meta"):
        return RepViT(depths, widths, 1000, legacy=legacy, deploy=deploy).state_dict()


@pytest.mark.parametrize(("name", "widths", "depths", "legacy", "before", "after"), OFFICIAL)
def test_official_variants_are_counted_from_their_shapes(
    name: str, widths: Any, depths: Any, legacy: bool, before: str, after: str
) -> None:
    training, merged = (shapes(widths, depths, legacy, deploy=deploy) for deploy in (False, True))
    assert (f"{trained_numbers(training) / 1e6:.2f}", f"{trained_numbers(merged) / 1e6:.2f}") == (before, after)
    for state in (training, timm_names(training)):
        slots = recognised(state).slots
        gone = sum(state[key].numel() for slot in slots for key in slot.consumed if not key.endswith(STATISTICS))
        there = sum(torch.Size(slot.weight_shape).numel() + slot.squeezed.out_channels for slot in slots)
        assert trained_numbers(state) - gone + there == trained_numbers(merged)


@pytest.mark.parametrize(("name", "widths", "depths"), [row[:3] for row in OFFICIAL if not row[3]])
def test_official_variants_are_named_from_their_shapes(name: str, widths: Any, depths: Any) -> None:
    """In timm's layout, which knows stages."""
    for deploy in (False, True):
        state = timm_names(shapes(widths, depths, False, deploy=deploy))
        found = recognised(state, arch=name, stored_name=name, family="repvit")
        assert (found.architecture, found.notes, found.families) == (name, (), ("repvit",))


def test_the_trainers_file_holds_two_networks(tmp_path: Path) -> None:
    """As the official training script writes it."""
    own, ema = repvit(1), repvit(2)
    path = tmp_path / "checkpoint_best.pth"
    arguments = argparse.Namespace(model="repvit_m0_9", distillation_type="hard")
    torch.save(
        {
            "model": own.state_dict(), "optimizer": {"state": {}, "param_groups": []}, "lr_scheduler": {}, "epoch": 299,
            "model_ema": ema.state_dict(), "scaler": {}, "args": arguments,
        },
        path,
    )  # fmt: skip
    found = repdeploy.inspect(path)
    assert (found.source.where, found.source.has_ema) == ("model", True)
    x = torch.randn(2, 3, 33, 35, dtype=torch.float64)
    for weights, model in (("model", own), ("ema", ema)):
        deploy = deploy_model(written(path, weights=weights), timm=False)
        path.with_suffix(".repdeploy").rename(tmp_path / f"{weights}.repdeploy")
        with torch.no_grad():
            assert torch.allclose(deploy(x), model.double()(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("timm", [False, True])
def test_weights_are_found_in_timms_container(timm: bool, prefix: str, tmp_path: Path) -> None:
    model = repvit()
    state = {f"{prefix}{key}": value for key, value in named(model.state_dict(), timm).items()}
    arguments = argparse.Namespace(model="repvit_m0_9", distillation=True)
    content = {"epoch": 3, "arch": "repvit_m0_9", "state_dict": state, "version": 2, "args": arguments}
    torch.save(content, tmp_path / "checkpoint-3.pth.tar")
    assert repdeploy.inspect(tmp_path / "checkpoint-3.pth.tar").source.where == "state_dict"
    assert_described(model, tmp_path / "checkpoint-3.pth.tar", sizes=[(33, 47)])


def test_a_network_pickled_with_synchronised_norms_reads_the_same(tmp_path: Path) -> None:
    """BatchNorm1d of the heads included."""
    torch.save(nn.SyncBatchNorm.convert_sync_batchnorm(repvit()), tmp_path / "module.pth")
    assert_described(repvit(), tmp_path / "module.pth", sizes=[(33, 35)])


def test_a_stated_eps_reaches_every_norm(tmp_path: Path) -> None:
    """Behind convolutions, behind the sum, and in front of the heads."""
    model = repvit()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):
            layer.eps = 1e-2
    assert_described(model, save(model, tmp_path / "ckpt.pth"), Setting("", "eps", 1e-2), sizes=SIZES)


def test_strides_are_conventions_and_said_to_be() -> None:
    facts = Facts()
    found = recognised(repvit().state_dict(), facts=facts)
    assert found.plan is not None
    assert {fact.origin for fact in facts.record()} == {"skeleton"}
    assert {fact.value for fact in facts.record() if fact.name == "stride"} == {"1", "2"}


def test_the_exported_network_has_no_norm_and_one_convolution_per_block(tmp_path: Path) -> None:
    path = save(repvit(), tmp_path / "ckpt.pth")
    repdeploy.convert(path, output=tmp_path / "b.repdeploy")
    exported = repdeploy.export(tmp_path / "b.repdeploy")
    operations = [node.op_type for node in onnx.load(exported.bundle / exported.artifacts[0].file).graph.node]
    assert "BatchNormalization" not in operations
    depths = SMALL["depths"]
    transitions, gates = len(depths) - 1, sum((depth + 1) // 2 for depth in depths)
    mixers = sum(depths) + transitions
    assert operations.count("Conv") == 2 + 3 * mixers + 4 * transitions + 2 * gates
    assert operations.count("Gemm") + operations.count("MatMul") == 1
    assert repdeploy.verify(tmp_path / "b.repdeploy", against=path).passed


MIXER = "features.1.token_mixer.0"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop(f"{MIXER}.conv.bn.running_mean"), f"{MIXER}.conv.bn.running_mean is missing"),
        (lambda s: s.pop(f"{MIXER}.bn.running_var"), f"{MIXER}.bn.running_var is missing"),
        (lambda s: s.update({f"{MIXER}.conv1.weight": torch.ones(4, 1, 1, 1)}), MIXER),
        (lambda s: s.update({f"{MIXER}.bn.weight": torch.ones(4)}), MIXER),
        (lambda s: s[f"{MIXER}.bn.running_var"].fill_(float("nan")), f"{MIXER}.bn.running_var holds 6 NaN"),
        (lambda s: s[f"{MIXER}.conv1.bias"].fill_(float("inf")), f"{MIXER}.conv1.bias"),
        (lambda s: s[f"{MIXER}.bn.running_var"].fill_(-1.0), f"{MIXER}.*variance"),
        (lambda s: s["classifier.classifier.bn.running_var"].fill_(-1.0), "classifier.*variance"),
        (lambda s: s.pop("classifier.classifier_dist.l.weight"), "classifier_dist.l is missing"),
        (lambda s: s.update({"classifier.classifier_dist.l.weight": torch.ones(4, 12)}), "classifier"),
        (lambda s: s.pop("features.1.channel_mixer.m.0.bn.weight"), "channel_mixer.m.0.bn"),
        (lambda s: s["features.0.0.bn.running_mean"].fill_(float("nan")), "features.0.0.bn.running_mean holds 3 NaN"),
    ],
)
def test_a_damaged_block_is_refused_by_name(damage: Any, message: str, tmp_path: Path) -> None:
    state = dict(repvit().state_dict())
    damage(state)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=message):
        repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b.repdeploy")
    assert not (tmp_path / "b.repdeploy").exists()


@pytest.mark.parametrize(
    "part",
    [
        f"{MIXER}.bn.", f"{MIXER}.conv1.", f"{MIXER}.conv.bn.", "features.1.channel_mixer.m.2.bn.",
        "features.3.token_mixer.2.", "features.0.2.bn.", "classifier.classifier.bn.", "classifier.classifier.",
        "classifier.classifier.l.bias", "features.5.", "features.1.token_mixer.1.fc2.",
    ],
)  # fmt: skip
def test_what_is_missing_is_never_read_as_another_network(part: str, tmp_path: Path) -> None:
    """Refused, or no network any more: without its outer norm a mixer is no legacy one, whose 1x1 has a norm and no bias."""
    state = {key: value for key, value in repvit().state_dict().items() if not key.startswith(part)}
    torch.save(state, tmp_path / "damaged.pth")
    try:
        found = repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b.repdeploy").manifest
    except InputError:
        assert not (tmp_path / "b.repdeploy").exists()
    else:
        assert found.skeleton is None
        assert found.verdict.grade == "blocks only"


def test_channels_that_are_switched_off_are_no_failure(tmp_path: Path) -> None:
    """The outer norm's gamma near 0 leaves an almost empty kernel: errors are judged against the block."""
    model = repvit()
    for key, value in model.state_dict().items():
        if key.endswith("token_mixer.0.bn.weight"):
            value[1:4] = 1e-12
    assert repdeploy.convert(save(model, tmp_path / "ckpt.pth"), output=tmp_path / "b.repdeploy").manifest.verdict.passed


@pytest.mark.parametrize("distilled", [False, True])
def test_it_trains_on_small_grey_images(distilled: bool) -> None:
    torch.manual_seed(0)
    model = RepViT(**{**SMALL, "channels": 1, "distilled": distilled}).train()
    F.cross_entropy(model(torch.randn(4, 1, 32, 32)), torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
