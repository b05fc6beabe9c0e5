"""OREPA against its sheet: the formulas of every block, whole networks, stored buffers, variants that do not exist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import repdeploy
from repdeploy.algebra import linearize
from repdeploy.checkpoint import load
from repdeploy.errors import InputError
from repdeploy.facts import Facts, Setting
from repdeploy.network import squeeze
from repdeploy.rebuild import reader
from repdeploy.recognise import keys_of, recognise
from repdeploy.registry import families
from sample_models import dbb, orepa
from sample_models.backbones import Layer, ResNet, settled
from tests.networks import assert_described, described, save


def shaken(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every tensor moved, buffers, vectors and norms included: nothing may be taken for the constant it started as."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) * 2.7 + 0.3)
        elif value.is_floating_point():
            value.add_(torch.randn(value.shape, generator=generator) * 0.3)
    return model.double().eval()


def at_centre(kernel: Tensor, size: int) -> Tensor:
    """(out, in, 1, 1) in the middle of (out, in, size, size)."""
    return F.pad(kernel, (size // 2,) * 4)


def weights(state: dict[str, Tensor], names: str, groups: int) -> Tensor:
    """W of the sheet, index by index: (out, in / groups, k, k)."""

    def tensor(name: str) -> Tensor:
        return state[f"weight_{names}_{name}"]

    vector, origin = state["vector"][..., None, None, None], tensor("origin")
    outputs, within, size, _ = origin.shape
    first, second = tensor("1x1_kxk_idconv1") + state["id_tensor"], tensor("1x1_kxk_conv2")
    middle, per_group = first.shape[0] // groups, outputs // groups
    series, separable = torch.zeros_like(origin), torch.zeros_like(origin)
    depth = tensor("gconv_dw").view(groups, within, 8, size, size)
    point = tensor("gconv_pw").view(per_group, groups, within, 8)
    for group in range(groups):
        rows = slice(group * per_group, (group + 1) * per_group)
        inside = first[group * middle : (group + 1) * middle, :, 0, 0]
        series[rows] = torch.einsum("otyx,ti->oiyx", second[rows], inside)
        separable[rows] = torch.einsum("ieyx,aie->aiyx", depth[group], point[:, group])
    branches = [
        origin,
        tensor("avg_conv") * tensor("avg_avg"),
        tensor("pfir_conv") * tensor("prior")[:, None],
        series,
        *([at_centre(tensor("1x1"), size)] if names == "orepa" else []),
        separable,
    ]
    total: Tensor = sum(scale * branch for scale, branch in zip(vector, branches, strict=False))  # type: ignore[assignment]
    return total


def normed(state: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    names = ("running_mean", "running_var", "weight", "bias")
    return F.batch_norm(x, *(state[f"{prefix}.{name}"] for name in names))


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")}


def official_orepa(state: dict[str, Tensor], layer: Layer, x: Tensor) -> Tensor:
    kernel = weights(state, "orepa", layer.groups)
    return normed(state, "bn", F.conv2d(x, kernel, None, layer.stride, layer.padding, 1, layer.groups))


def official_1x1(state: dict[str, Tensor], layer: Layer, x: Tensor) -> Tensor:
    one, two = state["vector"]
    product = state["weight_or1x1_l2i_conv2"][:, :, 0, 0] @ state["weight_or1x1_l2i_conv1"][:, :, 0, 0]
    kernel = one[:, None] * state["weight_or1x1_origin"][:, :, 0, 0] + two[:, None] * product
    return normed(state, "bn", F.conv2d(x, kernel[..., None, None], None, layer.stride))


def official_stem(state: dict[str, Tensor], layer: Layer, x: Tensor) -> Tensor:
    count = (layer.kernel - 1) // 2
    is_base = "weight0" in state
    parts = [state[f"weight{i}"] if is_base else weights(below(state, f"weight{i}"), "orepa", 1) for i in range(count)]
    kernel = parts[0].transpose(0, 1)
    for part in parts[1:]:
        kernel = F.conv2d(kernel, part, padding=2, groups=layer.groups)
    kernel = kernel.transpose(0, 1)
    return normed(state, "bn", F.conv2d(x, kernel, None, layer.stride, layer.padding, 1, layer.groups))


def official_vgg(state: dict[str, Tensor], layer: Layer, x: Tensor) -> Tensor:
    dense = F.conv2d(x, weights(below(state, "rbr_dense"), "rbr", 1), None, layer.stride, 1)
    total = normed(state, "rbr_dense.bn", dense)
    total = total + normed(state, "rbr_1x1.bn", F.conv2d(x, state["rbr_1x1.conv.weight"], None, layer.stride))
    return total + normed(state, "rbr_identity", x) if "rbr_identity.weight" in state else total


Official = Callable[[dict[str, Tensor], Layer, Tensor], Tensor]
BLOCKS: list[tuple[Callable[[Layer], nn.Module], Official, Layer]] = [
    (orepa.Orepa, official_orepa, Layer(6, 10, 3)),
    (orepa.Orepa, official_orepa, Layer(6, 10, 3, 2)),
    (orepa.Orepa, official_orepa, Layer(8, 12, 3, 1, 2)),
    (orepa.Orepa, official_orepa, Layer(12, 12, 3, 3, 4)),
    (orepa.Orepa, official_orepa, Layer(16, 32, 3, 2, 8)),
    (orepa.Orepa, official_orepa, Layer(6, 6, 3, 1, 6)),
    (orepa.Orepa, official_orepa, Layer(4, 7, 5, 2)),
    (orepa.Orepa, official_orepa, Layer(4, 6, 7, 1, 2)),
    (orepa.Orepa1x1, official_1x1, Layer(6, 10, 1)),
    (orepa.Orepa1x1, official_1x1, Layer(10, 6, 1, 2)),
    (orepa.LargeConv, official_stem, Layer(3, 8, 7, 2)),
    (orepa.LargeConv, official_stem, Layer(4, 6, 5)),
    (orepa.LargeConv, official_stem, Layer(3, 5, 9, 2)),
    (lambda layer: orepa.LargeConv(layer, is_base=True), official_stem, Layer(3, 8, 7, 2)),
    (lambda layer: orepa.LargeConv(layer, is_base=True), official_stem, Layer(4, 8, 7, 1, 2)),
    (orepa.OrepaVGG, official_vgg, Layer(8, 8, 3)),
    (orepa.OrepaVGG, official_vgg, Layer(5, 8, 3, 2)),
]


@pytest.mark.parametrize(("make", "official", "layer"), BLOCKS)
def test_every_reading_of_a_block_is_the_formula_of_the_sheet(
    make: Callable[[Layer], nn.Module], official: Official, layer: Layer, tmp_path: Path
) -> None:
    """The module that trains through the description, the description of its file, and the fused convolution."""
    model = shaken(make(layer), seed=layer.outputs)
    state = model.state_dict()
    checkpoint = load(save(model, tmp_path / "block.pth"))
    stated = Facts([Setting("", "stride", layer.stride), Setting("", "groups", layer.groups)])
    (slot,) = recognise(checkpoint.tensors, families(), stated, family="orepa").slots
    expression = slot.describe(reader(checkpoint.tensors), stated, keys_of(checkpoint.tensors))
    for height, width in ((9, 12), (7, 7), (5, 4)):
        x = torch.randn(2, layer.inputs, height, width, dtype=torch.float64)
        with torch.no_grad():
            wanted = official(state, layer, x)
            for got in (model(x), expression.run(x), squeeze("", expression).run(x)):
                assert got.shape == wanted.shape
                assert torch.allclose(got, wanted, rtol=0, atol=1e-11 * max(1.0, float(wanted.abs().max())))


NETWORKS: list[tuple[str, Callable[[], nn.Module]]] = [
    ("resnet18", lambda: ResNet(orepa.Layers(), (2, 1, 1, 2), (4, 4, 6, 8, 10), 5)),
    ("resnet50", lambda: ResNet(orepa.Layers(), (1, 2, 1, 1), (4, 8, 12, 16, 20), 5, inner=(4, 6, 8, 10))),
    ("resnext50", lambda: ResNet(orepa.Layers(), (1, 2, 1, 1), (4, 16, 16, 32, 32), 5, inner=(8, 8, 16, 16), groups=8)),
    ("orepa_vgg", lambda: orepa.RepVGG((1, 2, 2, 1), (4, 6, 8, 8, 12), 5)),
    ("plain_orepa", lambda: orepa.RepVGG((1, 2, 1, 1), (4, 6, 6, 8, 12), 5, is_plain=True)),
    ("dbb", lambda: ResNet(dbb.TRAINING, (1, 1, 1, 1), (4, 4, 6, 8, 10), 5)),
]


@pytest.mark.parametrize(("name", "build"), NETWORKS, ids=[name for name, _ in NETWORKS])
def test_both_readings_of_a_network_are_the_module(name: str, build: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = settled(build(), 3, 64)
    path = tmp_path / "ckpt.pth.tar"
    torch.save({"arch": name, "state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, path)
    assert_described(model, path, sizes=[(65, 63), (64, 96), (33, 35)])


def test_the_written_weights_load_into_the_official_deploy_model(tmp_path: Path) -> None:
    torch.manual_seed(2)
    model = settled(ResNet(orepa.Layers(), (1, 1, 1, 1), (4, 4, 6, 8, 10), 5), 3, 64)
    found = repdeploy.convert(save(model, tmp_path / "ckpt.pth"), output=tmp_path / "b.repdeploy").manifest
    assert {block.family for block in found.blocks} == {"orepa"}
    deploy = ResNet(orepa.Layers(deploy=True), (1, 1, 1, 1), (4, 4, 6, 8, 10), 5)
    deploy.load_state_dict(load_file(tmp_path / "b.repdeploy" / "weights.safetensors"), strict=True)
    x = torch.randn(2, 3, 65, 63)
    with torch.no_grad():
        assert torch.allclose(deploy.eval()(x), model(x), rtol=0, atol=1e-4 * float(model(x).abs().max()))
    again = repdeploy.convert(tmp_path / "b.repdeploy" / "weights.safetensors", output=tmp_path / "c.repdeploy")
    assert again.already_deployed


def test_the_training_step_reaches_every_branch() -> None:
    """One step in training mode: the gradient comes through the squeezed kernel to all tensors that train."""
    torch.manual_seed(0)
    model = ResNet(orepa.Layers(), (1, 1, 1, 1), (4, 4, 6, 8, 10), 5).train()
    F.cross_entropy(model(torch.randn(4, 3, 32, 32)), torch.tensor([0, 1, 2, 3])).backward()
    still = [name for name, value in model.named_parameters() if value.grad is None or not bool(value.grad.any())]
    # behind a row of the vector that starts at zero, and behind the first of two factors of which one is still zero
    assert {name.rpartition(".")[2] for name in still} <= {"weight_orepa_pfir_conv"}


def test_a_row_that_nothing_reads_may_hold_anything(tmp_path: Path) -> None:
    model = shaken(orepa.OrepaVGG(Layer(6, 6, 3)))
    clean = repdeploy.convert(save(model, tmp_path / "a.pth"), output=tmp_path / "a.repdeploy", family="orepa")
    with torch.no_grad():
        model.rbr_dense.vector[5] = 1e30  # type: ignore[union-attr,index,operator]
    repdeploy.convert(save(model, tmp_path / "b.pth"), output=tmp_path / "b.repdeploy", family="orepa")
    assert clean.manifest.verdict.passed
    first, second = (load_file(tmp_path / f"{name}.repdeploy" / "weights.safetensors") for name in "ab")
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_grouped_orepa_vgg_does_not_exist(tmp_path: Path) -> None:
    state = orepa.OrepaVGG(Layer(8, 8, 3)).state_dict()
    state["rbr_dense.weight_rbr_origin"] = torch.randn(8, 4, 3, 3)
    torch.save(state, tmp_path / "grouped.pth")
    with pytest.raises(InputError, match="OREPA_VGG block of 2 groups"):
        repdeploy.convert(tmp_path / "grouped.pth", output=tmp_path / "b.repdeploy")
    assert not (tmp_path / "b.repdeploy").exists()


def test_stated_facts_reach_the_blocks(tmp_path: Path) -> None:
    """Any dilation is exact here: the kernel is generated before it is convolved."""
    model = shaken(orepa.Orepa(Layer(4, 6, 3)))
    save(model, tmp_path / "block.pth")
    settings = ["dilation=2", "padding=2", "eps=1e-3"]
    repdeploy.convert(tmp_path / "block.pth", output=tmp_path / "b.repdeploy", set=settings)
    state, stored = model.state_dict(), load_file(tmp_path / "b.repdeploy" / "weights.safetensors")
    scale = state["bn.weight"] / torch.sqrt(state["bn.running_var"] + 1e-3)
    wanted = weights(state, "orepa", 1) * scale.view(-1, 1, 1, 1)
    assert torch.allclose(stored["orepa_reparam.weight"].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("weight_orepa_prior"), "weight_orepa_prior is missing"),
        (lambda s: s.pop("vector"), "vector is missing"),
        (lambda s: s.update(vector=torch.ones(6, 3)), "contradict"),
        (lambda s: s.update(weight_orepa_gconv_pw=torch.ones(9, 48, 1, 1)), "contradict"),
        (lambda s: s["weight_orepa_prior"].fill_(float("nan")), "NaN"),
    ],
)
def test_a_damaged_block_is_refused_by_name(
    damage: Callable[[dict[str, Tensor]], object], message: str, tmp_path: Path
) -> None:
    state = dict(shaken(orepa.Orepa(Layer(6, 10, 3))).state_dict())
    damage(state)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=message):
        repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b.repdeploy")
    assert not (tmp_path / "b.repdeploy").exists()


def test_official_networks_are_named_and_counted_from_their_shapes() -> None:
    from tests.stages.test_recognise import recognised

    with torch.device("meta"):
        networks: dict[str, tuple[nn.Module, int, int]] = {
            "ResNet-18": (ResNet(orepa.Layers(), (2, 2, 2, 2), (64, 64, 128, 256, 512), 1000), 37756041, 11684712),
            "RepVGG-A0": (orepa.RepVGG((2, 4, 14, 1), (48, 48, 96, 192, 1280), 1000), 24754137, 8309384),
        }
    for name, (model, before, after) in networks.items():
        state = model.state_dict()
        found = recognised(state, stored_name=name)
        assert (found.architecture, found.notes) == (name, ())
        fused = sum(torch.Size(slot.squeezed.weight_shape).numel() + slot.squeezed.out_channels for slot in found.slots)
        assert fused + state["linear.weight"].numel() + 1000 == after
        assert sum(value.numel() for value in model.parameters()) == before


def test_linearizing_another_family_gives_a_block_that_can_train_online(tmp_path: Path) -> None:
    """DBB's block without its norms, one behind the sum: the same map (section 3.2), and its kernel is generated."""
    model = settled(ResNet(dbb.TRAINING, (1, 1, 1, 1), (4, 4, 6, 8, 10), 5), 3, 64)
    network = described(save(model, tmp_path / "ckpt.pth"), squeezed=False)
    checkpoint, facts = load(tmp_path / "ckpt.pth"), Facts()
    slot = network.plan.slots["stage2.0.conv1"]
    block = slot.describe(reader(checkpoint.tensors), facts, keys_of(checkpoint.tensors))
    linear = linearize(block)
    assert repr(linear).count("BN") == 1
    x = torch.randn(1, 4, 9, 11, dtype=torch.float64)
    assert torch.allclose(linear.run(x), block.run(x), rtol=0, atol=1e-11)
