"""FastViT against its sheet: timm's and apple's keys, attention, layer scales, the mci variants' downsampling, deploy files."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

import repdeploy
from repdeploy.errors import InputError
from repdeploy.facts import Facts, Setting
from sample_models.fastvit import FastViT, LargeKernel, PositionEncoding, RepMixer, apple_names
from sample_models.scatter import scatter
from tests.networks import STATISTICS, assert_described, described, load_renamed, save, trained_numbers, written
from tests.stages.test_recognise import recognised

SMALL: dict[str, Any] = {"layers": (1, 2, 1), "widths": (6, 6, 12), "classes": 5, "mlp_ratio": 2.5}
ATTENTIVE: dict[str, Any] = {"widths": (8, 16, 32), "attention": 1, "positions": 1}
"""One head of 32 channels in the last stage."""
SIZES = [(33, 33), (65, 47), (34, 63)]


def scattered(model: nn.Module, seed: int = 0) -> nn.Module:
    """Layer scales too, of both signs and one almost zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith(".gamma"):
            value.copy_(torch.randn(value.shape, generator=generator))
            value[1] = 1e-7
    return scatter(model, seed)


def fastvit(seed: int = 0, **changes: Any) -> FastViT:
    torch.manual_seed(seed)
    model = scattered(FastViT(**{**SMALL, **changes}), seed)
    assert isinstance(model, FastViT)
    return model


def named(state: Mapping[str, Tensor], apple: bool) -> dict[str, Tensor]:
    return apple_names(state) if apple else dict(state)


def deploy_model(fused: Mapping[str, Tensor], apple: bool, **changes: Any) -> FastViT:
    """The official deploy model with these weights, strictly loaded."""
    model = FastViT(**{**SMALL, **changes}, deploy=True).double().eval()
    load_renamed(model, lambda state: named(state, apple), fused)
    return model


VARIANTS: list[dict[str, Any]] = [
    {},
    {"layer_scale": None},
    ATTENTIVE,
    {**ATTENTIVE, "layer_scale": None, "layers": (1, 1, 2)},
    {**ATTENTIVE, "positions": 0},
    {"widths": (32, 32, 64), "attention": 2, "positions": 2},
    {"positions": 3},
    {"layers": (1, 1, 1, 1), "widths": (4, 8, 16, 32)},
    {"layers": (1, 1, 1, 1, 1), "widths": (4, 4, 8, 8, 16)},
    {"layers": (1, 11), "widths": (4, 12)},
    {"layers": (2,), "widths": (5,)},
    {"channels": 1, "classes": 1},
    {"scale_branch": False},
    {"squeeze_excite": (False, True, True), "large_activation": True},
    {"squeeze_excite": (False, False, True), "large_activation": True, "widths": (8, 40, 80)},
]


@pytest.mark.parametrize("apple", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_readings_are_the_module(variant: dict[str, Any], apple: bool, tmp_path: Path) -> None:
    model = fastvit(**variant)
    torch.save(named(model.state_dict(), apple), tmp_path / "ckpt.pth")
    assert_described(model, tmp_path / "ckpt.pth", sizes=SIZES, channels=variant.get("channels", 3))


@pytest.mark.parametrize("apple", [False, True])
@pytest.mark.parametrize("head_dim", [2, 8, 16])
def test_the_width_of_a_head_is_a_fact(head_dim: int, apple: bool, tmp_path: Path) -> None:
    """No tensor tells it: 32 by convention, else stated; the wrong number gives another output."""
    variant = {**ATTENTIVE, "head_dim": head_dim}
    model = fastvit(**variant).double()
    path = tmp_path / "ckpt.pth"
    torch.save(named(model.state_dict(), apple), path)
    assert_described(model, path, Setting("", "head_dim", head_dim), sizes=SIZES)
    deploy = deploy_model(written(path, set=[f"head_dim={head_dim}"]), apple, **variant)
    x = torch.randn(2, 3, 65, 47, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        assert torch.allclose(deploy(x), wanted, rtol=1e-11, atol=1e-12)
        assert float((described(path)(x) - wanted).abs().max()) > 1e-9


def test_the_width_of_a_head_is_assumed_and_said_to_be(tmp_path: Path) -> None:
    facts = repdeploy.inspect(save(fastvit(**ATTENTIVE), tmp_path / "ckpt.pth")).facts
    assert [(fact.value, fact.origin) for fact in facts if fact.name == "head_dim"] == [("32", "skeleton")]
    facts = repdeploy.inspect(save(fastvit(), tmp_path / "none.pth")).facts
    assert "head_dim" not in {fact.name for fact in facts}


def test_channels_that_do_not_divide_into_heads_are_refused(tmp_path: Path) -> None:
    variant = {**ATTENTIVE, "widths": (6, 6, 12), "head_dim": 4}
    path = save(fastvit(**variant), tmp_path / "ckpt.pth")
    with pytest.raises(InputError, match=r"12 channels.*heads of 32"):
        repdeploy.convert(path, output=tmp_path / "b.repdeploy")
    assert not (tmp_path / "b.repdeploy").exists()
    assert_described(fastvit(**variant), path, Setting("", "head_dim", 4), sizes=[(33, 47)])


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("active", [False, True])
def test_an_activation_behind_the_large_kernels_is_a_fact(active: bool, gated: bool, tmp_path: Path) -> None:
    """By convention it is there where a gate is, as in the mci variants."""
    model = fastvit(squeeze_excite=(False, False, gated), large_activation=active)
    path = save(model, tmp_path / "ckpt.pth")
    assert_described(model, path, Setting("", "downsample_act", active), sizes=SIZES)
    (fact,) = {(fact.value, fact.origin) for fact in repdeploy.inspect(path).facts if fact.name == "downsample_act"}
    assert fact == (str(gated), "skeleton")


@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 40), (17, 5)])
def test_maps_may_be_one_pixel_wide(height: int, width: int, tmp_path: Path) -> None:
    model = fastvit(**ATTENTIVE)
    assert_described(model, save(model, tmp_path / "ckpt.pth"), sizes=[(height, width)])


@pytest.mark.parametrize(
    ("place", "channels"),
    [
        ("stages.1.blocks.1.token_mixer", 6),
        ("stages.2.downsample.proj.0", 6),
        ("stages.2.downsample.proj.1", 12),
        ("stages.2.pos_emb", 12),
    ],
)
def test_border_pixels_are_exact(place: str, channels: int, tmp_path: Path) -> None:
    """An impulse in each corner of the map: the norm of the input that a mixer subtracts shifts the border too."""
    model = fastvit(positions=1).double()
    fused = described(save(model, tmp_path / "ckpt.pth")).get_submodule(f"{place}.reparam_conv")
    for row in (0, 6):
        for column in (0, 8):
            x = torch.zeros(1, channels, 7, 9, dtype=torch.float64)
            x[:, :, row, column] = 1
            with torch.no_grad():
                got = fused(x)
                assert torch.allclose(
                    F.gelu(got) if place.endswith("proj.1") else got, model.get_submodule(place)(x), rtol=0, atol=1e-13
                )


ALONE: list[tuple[str, nn.Module, int, int]] = [
    ("token_mixer", RepMixer(6, 1e-5, False), 3, 1),
    ("token_mixer", RepMixer(6, None, False), 3, 1),
    ("pos_emb", PositionEncoding(6, False), 7, 1),
    ("large", LargeKernel(6, 6, False, False, False), 7, 2),
]


@pytest.mark.parametrize(
    ("name", "unit", "kernel", "stride", "apple"),
    # apple's position encoding is just `pe`, which is no proof of one outside its network
    [(*case, apple) for case in ALONE for apple in (False, True) if not (apple and case[0] == "pos_emb")],
)
def test_one_unit_alone_is_fused(name: str, unit: nn.Module, kernel: int, stride: int, apple: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = scattered(nn.ModuleDict({name: unit})).double()
    torch.save(named(model.state_dict(), apple), tmp_path / "unit.pth")
    stated = {"set": [f"{name}.stride={stride}"]} if stride > 1 else {}
    fused = written(tmp_path / "unit.pth", **stated)
    bias, weight = sorted(fused)
    assert (fused[weight].shape, fused[bias].shape) == ((6, 1, kernel, kernel), (6,))
    x = torch.randn(2, 6, 9, 4, dtype=torch.float64)
    with torch.no_grad():
        got = F.conv2d(x, fused[weight], fused[bias], stride, kernel // 2, groups=6)
        assert torch.allclose(got, unit(x), rtol=0, atol=1e-12)


def test_a_mixer_subtracts_the_norm_of_its_input(tmp_path: Path) -> None:
    """K = E + g (M - t E), b = g (m - d): with E the centre tap, M, m the mixer's branches, t, d the norm, g the scale."""
    model = fastvit().double()
    fused = written(save(model, tmp_path / "ckpt.pth"))
    name = "stages.0.blocks.0.token_mixer"
    mixer = model.get_submodule(name)
    assert isinstance(mixer, RepMixer)

    def folded(norm: str) -> tuple[Tensor, Tensor]:
        gamma, beta, mean, var = (model.state_dict()[f"{name}.{norm}.{part}"] for part in ("weight", "bias", *STATISTICS[:2]))
        scale = gamma / (var + 1e-5).sqrt()
        return scale, beta - mean * scale

    kernel, bias = torch.zeros(6, 1, 3, 3, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for branch, sign in (("mixer.conv_kxk.0", 1), ("mixer.conv_scale", 1), ("mixer.identity", 1), ("norm.identity", -1)):
        scale, shift = folded(branch if branch.endswith("identity") else f"{branch}.bn")
        taps = model.state_dict().get(f"{name}.{branch}.conv.weight", torch.ones(6, 1, 1, 1, dtype=torch.float64))
        kernel += sign * F.pad(taps, (1 - taps.shape[2] // 2,) * 4) * scale.view(-1, 1, 1, 1)
        bias += sign * shift
    gamma = model.state_dict()[f"{name}.layer_scale.gamma"]
    kernel, bias = kernel * gamma.unsqueeze(1), bias * gamma.flatten()
    kernel[:, :, 1, 1] += 1
    assert torch.allclose(fused[f"{name}.reparam_conv.weight"], kernel, rtol=0, atol=1e-13)
    assert torch.allclose(fused[f"{name}.reparam_conv.bias"], bias, rtol=0, atol=1e-13)


@pytest.mark.parametrize("apple", [False, True])
@pytest.mark.parametrize(
    "variant", [{}, {"layer_scale": None}, ATTENTIVE, {"squeeze_excite": (False, True, True), "large_activation": True}]
)
def test_the_written_weights_load_into_the_official_deploy_model(variant: dict[str, Any], apple: bool, tmp_path: Path) -> None:
    """The norms of the channel mixers and of the attention, and the layer scales behind both, stay as in timm."""
    model = fastvit(**variant).double()
    torch.save(named(model.state_dict(), apple), tmp_path / "ckpt.pth")
    deploy = deploy_model(written(tmp_path / "ckpt.pth"), apple, **variant)
    x = torch.randn(2, 3, 65, 47, dtype=torch.float64)
    with torch.no_grad():
        wanted = model(x)
        assert float((deploy(x) - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


@pytest.mark.parametrize("apple", [False, True])
@pytest.mark.parametrize(
    "variant", [{}, {**ATTENTIVE, "layers": (1, 1, 2)}, {"squeeze_excite": (False, True, True), "large_activation": True}]
)
def test_a_deploy_file_is_recognised_and_has_nothing_to_fuse(variant: dict[str, Any], apple: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = scattered(FastViT(**{**SMALL, **variant}, deploy=True))
    torch.save(named(model.state_dict(), apple), tmp_path / "fused.pth")
    answer = repdeploy.convert(tmp_path / "fused.pth", output=tmp_path / "b.repdeploy")
    assert answer.already_deployed
    assert not (tmp_path / "b.repdeploy").exists()
    assert_described(model, tmp_path / "fused.pth", sizes=SIZES)


@pytest.mark.parametrize("apple", [False, True])
@pytest.mark.parametrize("part", ["stem.1.", "stages.1.", "stages.2.downsample.proj.0.", "stages.2.pos_emb.", "final_conv."])
def test_a_half_fused_file_is_finished(part: str, apple: bool, tmp_path: Path) -> None:
    model = fastvit(**ATTENTIVE).double()
    fused = written(save(model, tmp_path / "ckpt.pth"))
    half = {key: value for key, value in model.state_dict().items() if not key.startswith(part)}
    half |= {key: value for key, value in fused.items() if key.startswith(part)}
    torch.save(named(half, apple), tmp_path / "half.pth")
    assert_described(model, tmp_path / "half.pth", sizes=[(33, 47)])
    again, wanted = written(tmp_path / "half.pth"), named(fused, apple)
    assert sorted(again) == sorted(wanted)
    assert all(torch.allclose(again[key], wanted[key], rtol=0, atol=1e-13) for key in wanted)


def test_every_block_tells_what_it_is_made_of() -> None:
    """Branches by their norms; groups of the strided large kernels are their input's channels, two outputs in each."""
    found = recognised(fastvit(positions=1).state_dict())
    slots = {slot.name: slot for slot in found.slots}
    norms = {name: sum(key.endswith("running_mean") for key in slot.consumed) for name, slot in slots.items()}
    names = "stem.0", "stem.2", "stages.0.blocks.0.token_mixer", "stages.2.downsample.proj.0", "stages.2.pos_emb", "final_conv"
    assert [norms[name] for name in names] == [2, 2, 4, 2, 0, 2]
    assert [slots[name].squeezed.weight_shape for name in names] == [
        (6, 3, 3, 3), (6, 6, 1, 1), (6, 1, 3, 3), (12, 1, 7, 7), (12, 1, 7, 7), (24, 1, 3, 3),
    ]  # fmt: skip
    assert [slots[name].squeezed.groups for name in names] == [1, 1, 6, 6, 12, 12]


OFFICIAL = [
    ("fastvit_t8", (2, 2, 4, 2), (48, 96, 192, 384), 3, 0, "4.03"),
    ("fastvit_t12", (2, 2, 6, 2), (64, 128, 256, 512), 3, 0, "7.55"),
    ("fastvit_s12", (2, 2, 6, 2), (64, 128, 256, 512), 4, 0, "9.47"),
    ("fastvit_sa12", (2, 2, 6, 2), (64, 128, 256, 512), 4, 1, "11.58"),
    ("fastvit_sa24", (4, 4, 12, 4), (64, 128, 256, 512), 4, 1, "21.55"),
    ("fastvit_sa36", (6, 6, 18, 6), (64, 128, 256, 512), 4, 1, "31.53"),
    ("fastvit_ma36", (6, 6, 18, 6), (76, 152, 304, 608), 4, 1, "44.07"),
]
"""Blocks, widths, channel mixers' ratio, stages of attention; millions of parameters with 1000 classes."""


def shapes(layers: Any, widths: Any, ratio: int, attention: int, *, deploy: bool = False) -> dict[str, Tensor]:
    with torch.device("meta"):
        model = FastViT(layers, widths, 1000, mlp_ratio=ratio, attention=attention, positions=attention, deploy=deploy)
    return model.state_dict()


@pytest.mark.parametrize(("name", "layers", "widths", "ratio", "attention", "millions"), OFFICIAL)
def test_official_variants_are_named_and_counted_from_their_shapes(
    name: str, layers: Any, widths: Any, ratio: int, attention: int, millions: str
) -> None:
    training, merged = (shapes(layers, widths, ratio, attention, deploy=deploy) for deploy in (False, True))
    for state in (training, merged):
        found = recognised(state, arch=name, stored_name=name)
        assert (found.architecture, found.notes, found.families) == (name, (), ("fastvit",))
    assert f"{trained_numbers(training) / 1e6:.2f}" == millions
    for state in (training, apple_names(training)):
        slots = recognised(state).slots
        gone = sum(state[key].numel() for slot in slots for key in slot.consumed if not key.endswith(STATISTICS))
        there = sum(torch.Size(slot.squeezed.weight_shape).numel() + slot.squeezed.out_channels for slot in slots)
        assert trained_numbers(state) - gone + there == trained_numbers(merged)


def test_the_sheets_parameter_counts_are_reached() -> None:
    """fastvit_t8 with 10 classes."""
    with torch.device("meta"):
        forms = [FastViT((2, 2, 4, 2), (48, 96, 192, 384), 10, deploy=deploy) for deploy in (False, True)]
    assert [trained_numbers(form.state_dict()) for form in forms] == [3264922, 3234730]


def test_the_trainers_file_holds_two_networks(tmp_path: Path) -> None:
    """As timm's saver writes it, which apple's trainer uses too."""
    own, ema = fastvit(1, **ATTENTIVE), fastvit(2, **ATTENTIVE)
    path = tmp_path / "checkpoint-3.pth.tar"
    arguments = argparse.Namespace(model="fastvit_sa12", model_ema=True)
    torch.save(
        {
            "epoch": 3, "arch": "fastvit_sa12", "state_dict": own.state_dict(), "optimizer": {"state": {}, "param_groups": []},
            "version": 2, "args": arguments, "state_dict_ema": ema.state_dict(), "metric": 0.5,
        },
        path,
    )  # fmt: skip
    found = repdeploy.inspect(path)
    assert (found.source.where, found.source.has_ema) == ("state_dict", True)
    x = torch.randn(2, 3, 33, 35, dtype=torch.float64)
    for weights, model in (("model", own), ("ema", ema)):
        deploy = deploy_model(written(path, weights=weights), apple=False, **ATTENTIVE)
        path.with_suffix(".repdeploy").rename(tmp_path / f"{weights}.repdeploy")
        with torch.no_grad():
            assert torch.allclose(deploy(x), model.double()(x), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("apple", [False, True])
@pytest.mark.parametrize("where", ["", "state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_found_where_the_repositories_put_them(where: str, prefix: str, apple: bool, tmp_path: Path) -> None:
    model = fastvit()
    state = {f"{prefix}{key}": value for key, value in named(model.state_dict(), apple).items()}
    torch.save({where: state} if where else state, tmp_path / "ckpt.pth")
    assert repdeploy.inspect(tmp_path / "ckpt.pth").source.where == where
    assert_described(model, tmp_path / "ckpt.pth", sizes=[(33, 47)])


def test_keys_in_alphabetical_order_are_the_same_network(tmp_path: Path) -> None:
    """safetensors sorts them: stages.0.blocks.10 comes before stages.0.blocks.2, identity before conv."""
    model = fastvit(layers=(11, 1), widths=(4, 8), positions=1)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    assert_described(model, tmp_path / "model.safetensors", sizes=[(33, 47)])


def test_a_pickled_network_reads_the_same(tmp_path: Path) -> None:
    torch.save(nn.SyncBatchNorm.convert_sync_batchnorm(fastvit(**ATTENTIVE)), tmp_path / "module.pth")
    assert_described(fastvit(**ATTENTIVE), tmp_path / "module.pth", sizes=[(33, 35)])


def test_a_stated_eps_reaches_every_norm(tmp_path: Path) -> None:
    """Inside the blocks, in front of the attention and in the channel mixers."""
    model = fastvit(**ATTENTIVE)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-2
    assert_described(model, save(model, tmp_path / "ckpt.pth"), Setting("", "eps", 1e-2), sizes=SIZES)


def test_strides_are_conventions_and_said_to_be() -> None:
    facts = Facts()
    found = recognised(fastvit().state_dict(), facts=facts)
    assert found.plan is not None
    assert {fact.origin for fact in facts.record()} == {"skeleton"}
    assert {fact.value for fact in facts.record() if fact.name == "stride"} == {"1", "2"}


@pytest.mark.parametrize("apple", [False, True])
@pytest.mark.parametrize("variant", [{}, ATTENTIVE, {"layer_scale": None}])
def test_the_exported_network_has_no_norm_and_no_layer_scale(variant: dict[str, Any], apple: bool, tmp_path: Path) -> None:
    """The norm in front of the attention folds into qkv, the others into their convolutions, scales into fc2 and proj."""
    path = tmp_path / "ckpt.pth"
    model = fastvit(**variant)
    torch.save(named(model.state_dict(), apple), path)
    repdeploy.convert(path, output=tmp_path / "b.repdeploy")
    exported = repdeploy.export(tmp_path / "b.repdeploy")
    graph = onnx.load(exported.bundle / exported.artifacts[0].file).graph
    operations = [node.op_type for node in graph.node]
    assert "BatchNormalization" not in operations
    layers, attention, positions = SMALL["layers"], variant.get("attention", 0), variant.get("positions", 0)
    blocks, attentive = sum(layers), sum(layers[len(layers) - attention :])
    depthwise = blocks - attentive
    stem_and_head, transitions = 3 + 1 + 2, 2 * (len(layers) - 1)
    assert operations.count("Conv") == stem_and_head + transitions + positions + 3 * blocks + depthwise + 2 * attentive
    assert (operations.count("Softmax"), operations.count("Gemm")) == (attentive, 1)
    vectors = [tensor.name for tensor in graph.initializer if len(tensor.dims) in (3, 4) and list(tensor.dims[-2:]) == [1, 1]]
    scaled = [node for node in graph.node if node.op_type == "Mul" and set(node.input) & set(vectors)]
    assert not scaled
    assert repdeploy.verify(tmp_path / "b.repdeploy", against=path).passed


MIXER = "stages.0.blocks.0.token_mixer"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop(f"{MIXER}.mixer.conv_kxk.0.bn.running_mean"), f"{MIXER}.mixer.conv_kxk.0.bn.running_mean is missing"),
        (lambda s: s.pop(f"{MIXER}.norm.identity.running_var"), f"{MIXER}.norm.identity.running_var is missing"),
        (lambda s: s.update({f"{MIXER}.layer_scale.gamma": torch.ones(4, 1, 1)}), MIXER),
        (lambda s: s.update({f"{MIXER}.layer_scale.gamma": torch.ones(6, 2, 1)}), MIXER),
        (lambda s: s[f"{MIXER}.layer_scale.gamma"].fill_(float("nan")), f"{MIXER}.layer_scale.gamma holds 8 NaN"),
        (lambda s: s[f"{MIXER}.norm.identity.running_var"].fill_(-1.0), f"{MIXER}.*variance"),
        (lambda s: s.update({f"{MIXER}.mixer.conv_scale.conv.weight": torch.ones(4, 1, 1, 1)}), MIXER),
        (lambda s: s["stages.0.blocks.0.layer_scale.gamma"].fill_(float("nan")), "layer_scale.gamma holds 8 NaN"),
        (lambda s: s.update({"stages.0.blocks.0.layer_scale.gamma": torch.ones(4, 1, 1)}), "stages.0.blocks.0"),
        (lambda s: s["stages.2.blocks.0.norm.running_var"].fill_(-1.0), "stages.2.blocks.0.*variance"),
        (lambda s: s["stages.2.blocks.0.token_mixer.qkv.weight"].fill_(float("inf")), "qkv.weight"),
        (lambda s: s.update({"stages.2.blocks.0.norm.weight": torch.ones(4)}), "stages.2.blocks.0"),
        (lambda s: s.pop("stages.2.downsample.proj.0.small_conv.conv.weight"), "small_conv.conv.weight is missing"),
        (lambda s: s["stages.2.pos_emb.pos_enc.bias"].fill_(float("nan")), "pos_enc.bias"),
        (lambda s: s["final_conv.conv_scale.bn.running_var"].fill_(-1.0), "final_conv.*variance"),
    ],
)
def test_a_damaged_block_is_refused_by_name(damage: Any, message: str, tmp_path: Path) -> None:
    state = dict(fastvit(**ATTENTIVE).state_dict())
    damage(state)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=message):
        repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b.repdeploy")
    assert not (tmp_path / "b.repdeploy").exists()


@pytest.mark.parametrize("apple", [False, True])
@pytest.mark.parametrize(
    "part",
    [
        f"{MIXER}.norm.", f"{MIXER}.mixer.identity.", f"{MIXER}.", "stages.0.blocks.0.mlp.conv.bn.",
        "stages.0.blocks.0.mlp.conv.", "stages.2.blocks.0.norm.", "stages.2.blocks.0.token_mixer.proj.",
        "stages.2.blocks.0.token_mixer.qkv.", "stages.1.downsample.", "stages.1.downsample.proj.1.identity.",
        "stages.1.blocks.0.", "stem.1.",
    ],
)  # fmt: skip
def test_what_is_missing_is_never_read_as_another_network(part: str, apple: bool, tmp_path: Path) -> None:
    """Refused, or no network any more."""
    state = {key: value for key, value in fastvit(**ATTENTIVE).state_dict().items() if not key.startswith(part)}
    torch.save(named(state, apple), tmp_path / "damaged.pth")
    try:
        found = repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b.repdeploy").manifest
    except InputError:
        assert not (tmp_path / "b.repdeploy").exists()
    else:
        assert found.skeleton is None
        assert found.verdict.grade == "blocks only"


def test_a_layer_norm_in_front_of_the_attention_is_not_read_as_a_batch_norm(tmp_path: Path) -> None:
    """The two largest mci variants: its weight and bias have the batch norm's names, statistics are not there."""
    names = tuple(f"stages.2.blocks.0.norm.{part}" for part in STATISTICS)
    state = {key: value for key, value in fastvit(**ATTENTIVE).state_dict().items() if key not in names}
    torch.save(state, tmp_path / "ckpt.pth")
    with pytest.raises(InputError, match=r"stages\.2\.blocks\.0\.norm is missing"):
        repdeploy.convert(tmp_path / "ckpt.pth", output=tmp_path / "b.repdeploy")
    assert not (tmp_path / "b.repdeploy").exists()


def test_a_layer_scale_of_zero_leaves_the_identity(tmp_path: Path) -> None:
    """1e-5, what training starts with, and exactly zero: the kernel is the centre tap, and no division is needed."""
    model = fastvit().double()
    for key, value in model.state_dict().items():
        if key.endswith(".gamma"):
            value.fill_(1e-5)
            value[:3] = 0
    fused = written(save(model, tmp_path / "ckpt.pth"))
    kernel = fused[f"{MIXER}.reparam_conv.weight"]
    assert torch.equal(kernel[:3].flatten(1), F.one_hot(torch.full((3,), 4), 9).double())
    assert_described(model, tmp_path / "ckpt.pth", sizes=SIZES)


@pytest.mark.parametrize("variant", [{}, ATTENTIVE])
def test_it_trains_on_small_grey_images(variant: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = FastViT(**{**SMALL, **variant, "channels": 1}).train()
    F.cross_entropy(model(torch.randn(4, 1, 32, 32)), torch.arange(4)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
