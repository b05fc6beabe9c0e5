"""Dead channels leave a network and nothing else changes: constants, unread channels, sums, borders, squeeze-excite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import repdeploy
from repdeploy.channels import Classes, Traced, traced
from repdeploy.checkpoint import load
from repdeploy.errors import InputError, UsageError
from repdeploy.facts import Facts
from repdeploy.pruning import Thinned, thin
from repdeploy.rebuild import reader
from repdeploy.recognise import recognise
from repdeploy.registry import families
from sample_models.fastvit import FastViT
from sample_models.mobileone import MobileOne
from sample_models.replknet import RepLKNet
from sample_models.scatter import scatter
from tests.networks import blocks_inside_a_detector, repvgg, save

IMAGES = [(33, 35), (48, 31)]


def thinned(path: Path) -> Thinned:
    checkpoint, facts = load(path), Facts()
    found = recognise(checkpoint.tensors, families(), facts)
    assert found.plan is not None
    return thin(found.plan, reader(checkpoint.tensors), facts, found.plan.usual_shape, dead=True)


def assert_same(model: nn.Module, result: Thinned, sizes: Sequence[tuple[int, int]] = IMAGES) -> None:
    """The network on the channels that stay is the module, in float64."""
    deploy, model = result.deploy().network(squeezed=True, dtype=torch.float64), model.double().eval()
    for height, width in sizes:
        x = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(height), dtype=torch.float64)
        with torch.no_grad():
            wanted, got = model(x), deploy(x)
        assert float((got - wanted).abs().max()) <= 1e-11 * float(wanted.abs().max()), (height, width)


def norms_of(block: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)]


def silence(block: nn.Module, channel: int, constant: float) -> None:
    """Make one output of a multi-branch block the same constant everywhere."""
    norms = norms_of(block)
    for norm in norms:
        with torch.no_grad():
            norm.weight[channel] = 0
            norm.bias[channel] = constant / len(norms)


def widths(result: Thinned) -> dict[str, tuple[int, int]]:
    return {layer.name: (layer.before, layer.after) for layer in result.report.layers}


def test_a_channel_that_a_relu_makes_zero_leaves(tmp_path: Path) -> None:
    model = repvgg()
    silence(model.stage1[0], 3, -0.5)
    result = thinned(save(model, tmp_path / "dead.pth"))
    assert widths(result) == {"stage1.0": (8, 7)}
    assert_same(model, result)


def test_a_constant_that_padding_would_show_stays(tmp_path: Path) -> None:
    """Behind the ReLU it is 0.5 inside the image and 0 outside: no bias of a padded convolution gives that."""
    model = repvgg()
    silence(model.stage1[0], 3, 0.5)
    result = thinned(save(model, tmp_path / "constant.pth"))
    assert not widths(result)
    assert_same(model, result)


def test_a_constant_moves_into_the_head(tmp_path: Path) -> None:
    """The average of a constant is the constant, and a fully connected layer has no border."""
    model = repvgg()
    silence(model.stage4[0], 5, 0.75)
    result = thinned(save(model, tmp_path / "head.pth"))
    assert widths(result) == {"stage4.0": (16, 15)}
    assert_same(model, result)
    head = result.convs["linear", "linear"]
    assert head.weight.shape[1] == 15
    assert head.bias is not None
    assert torch.allclose(head.bias, model.linear.bias.double() + 0.75 * model.linear.weight[:, 5].double(), atol=1e-12)


def test_a_channel_that_nobody_reads_leaves(tmp_path: Path) -> None:
    """Whatever it holds: every tap on it is zero."""
    model = repvgg()
    with torch.no_grad():
        model.linear.weight[:, 2] = 0
    result = thinned(save(model, tmp_path / "unread.pth"))
    assert widths(result) == {"stage4.0": (16, 15)}
    assert_same(model, result)


def test_a_dead_layer_keeps_one_channel(tmp_path: Path) -> None:
    model = repvgg()
    for channel in range(16):
        silence(model.stage4[0], channel, -1.0)
    result = thinned(save(model, tmp_path / "all.pth"))
    assert widths(result)["stage4.0"] == (16, 1)
    assert_same(model, result)


def test_what_nobody_reads_keeps_one_channel_too(tmp_path: Path) -> None:
    model = repvgg()
    with torch.no_grad():
        model.linear.weight.zero_()
    result = thinned(save(model, tmp_path / "none.pth"))
    assert widths(result)["stage4.0"][1] == 1
    deploy = result.deploy().network(squeezed=True, dtype=torch.float64)
    got = deploy(torch.randn(2, 3, 33, 35, dtype=torch.float64))
    assert torch.allclose(got, model.linear.bias.double().expand_as(got))


def test_what_only_a_leaving_channel_reads_leaves_too(tmp_path: Path) -> None:
    """The head ignores an output, which alone read a channel before it, which alone read one before that."""
    model = repvgg()
    with torch.no_grad():
        model.linear.weight[:, 5] = 0
        for block, column in ((model.stage4[0], 3), (model.stage3[0], 2)):
            others = [row for row in range(block.rbr_dense.conv.out_channels) if row != (5 if block is model.stage4[0] else 3)]
            for name, module in block.named_modules():
                if name.endswith("conv"):
                    module.weight[others, column] = 0
    result = thinned(save(model, tmp_path / "chain.pth"))
    assert widths(result) == {"stage2.1": (8, 7), "stage3.0": (12, 11), "stage4.0": (16, 15)}
    assert_same(model, result)


def test_attention_keeps_its_heads(tmp_path: Path) -> None:
    """The stream around it may lose channels; what is cut into heads does not."""
    torch.manual_seed(0)
    model = scatter(FastViT(layers=(1, 1), widths=(8, 64), classes=5, attention=1, positions=1))
    assert isinstance(model, FastViT)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.startswith("stages.1.") and value.shape[:1] == (64,) and not name.endswith("running_var"):
                value[7] = 0
            if name.startswith("final_conv.conv") and value.shape[:1] == (128,) and not name.endswith("running_var"):
                value[14:16] = 0  # what its two filters make of the channel, which a gate would multiply
    result = thinned(save(model, tmp_path / "heads.pth"))
    assert widths(result)["stages.1.downsample.proj.1"] == (64, 63)
    assert "stages.1.blocks.0.token_mixer.qkv" not in widths(result)
    assert_same(model, result)


def test_a_sum_couples_its_channels(tmp_path: Path) -> None:
    """A residual stream loses a channel only where nothing reads it and every branch may stop writing it."""
    torch.manual_seed(0)
    model = scatter(RepLKNet(kernels=(7, 5), layers=(2, 1), channels=(6, 8), classes=5, small_kernel=3, in_channels=3))
    assert isinstance(model, RepLKNet)
    block = model.stages[0].blocks[0]
    silence(block.pw2, 4, 0.0)  # one branch alone stops writing channel 4: it stays
    silence(block.pw1, 1, -1.0)  # inside the branch, before a depthwise kernel whose norm shifts it: both leave
    result = thinned(save(model, tmp_path / "sum.pth"))
    names = widths(result)
    assert names["stages.0.blocks.0.pw1"] == (6, 5)
    assert names["stages.0.blocks.0.large_kernel"] == (6, 5)
    assert "stages.0.blocks.0.pw2" not in names
    assert_same(model, result)


def test_squeeze_excite_follows(tmp_path: Path) -> None:
    """A gate times zero is zero: the gate's own output leaves as well, and what it squeezed loses a column."""
    torch.manual_seed(0)
    model = scatter(MobileOne(blocks=(1, 2, 2, 1), widths=(6, 8, 8, 8, 12), classes=5, channels=3, squeeze_excite=(0, 0, 0, 1)))
    assert isinstance(model, MobileOne)
    last = list(model.stage4)[-1]
    silence(last, 7, 0.0)
    result = thinned(save(model, tmp_path / "gate.pth"))
    name = next(name for name in widths(result) if name.endswith("se.expand"))
    assert widths(result)[name] == (12, 11)
    assert result.convs[name.replace("expand", "reduce"), name.replace("expand", "reduce")].in_channels == 11
    assert_same(model, result)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_damage_leaves_the_function_as_it_is(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Random constants and random zero columns anywhere: the thinned network is the same function."""
    model = repvgg(seed=data.draw(st.integers(0, 3)), groups=data.draw(st.sampled_from((1, 2))))
    blocks = [name for name, module in model.named_modules() if hasattr(module, "rbr_dense")]
    for name in data.draw(st.lists(st.sampled_from(blocks), max_size=5)):
        block = model.get_submodule(name)
        channels = norms_of(block)[0].num_features
        constant = data.draw(st.sampled_from((-1.0, 0.0, 0.5)))
        silence(block, data.draw(st.integers(0, channels - 1)), constant)
    with torch.no_grad():
        for column in data.draw(st.lists(st.integers(0, 15), max_size=3)):
            model.linear.weight[:, column] = 0
    result = thinned(save(model, tmp_path_factory.mktemp("damage") / "net.pth"))
    assert_same(model, result, IMAGES[:1])


def deploy_tensors(bundle: Path) -> dict[str, Tensor]:
    return dict(load_file(bundle / "weights.safetensors"))


def test_a_bundle_lists_what_left_and_verifies_again(tmp_path: Path) -> None:
    model = repvgg()
    silence(model.stage1[0], 3, -0.5)
    path = save(model, tmp_path / "dead.pth")
    plain = repdeploy.convert(path, output=tmp_path / "plain.repdeploy")
    made = repdeploy.convert(path, output=tmp_path / "dead.repdeploy", prune_dead=True)
    assert plain.manifest.pruning is None
    pruning = made.manifest.pruning
    assert pruning is not None
    assert pruning.dead
    assert [(layer.name, layer.before, layer.after) for layer in pruning.layers] == [("stage1.0", 8, 7)]
    assert pruning.flops_after < pruning.flops_before
    assert pruning.parameters_before - pruning.parameters_after == (
        plain.manifest.parameters_after - made.manifest.parameters_after
    )
    assert pruning.cost is None
    assert made.bundle is not None
    assert deploy_tensors(made.bundle)["stage1.0.rbr_reparam.weight"].shape[0] == 7
    assert "--prune-dead" in made.manifest.command
    assert repdeploy.verify(made.bundle).passed
    assert repdeploy.verify(made.bundle, against=path).passed
    assert repdeploy.export(made.bundle).artifacts[0].checks[0].passed
    assert repdeploy.verify(plain.bundle, made.bundle).passed


def test_layers_that_stay_unfused_are_narrowed_too(tmp_path: Path) -> None:
    """RepLKNet's official merged model keeps norms: a pair that loses channels is stored folded, norms around it narrowed."""
    torch.manual_seed(0)
    model = scatter(RepLKNet(kernels=(7, 5), layers=(2, 1), channels=(6, 8), classes=5, small_kernel=3, in_channels=3))
    assert isinstance(model, RepLKNet)
    silence(model.stages[0].blocks[1].pw1, 2, 0.3)
    path = save(model, tmp_path / "pairs.pth")
    made = repdeploy.convert(path, output=tmp_path / "pairs.repdeploy", prune_dead=True)
    assert made.bundle is not None
    stored, name = deploy_tensors(made.bundle), "stages.0.blocks.1"
    assert stored[f"{name}.pw1.conv.weight"].shape[0] == 23
    assert f"{name}.pw1.bn.weight" not in stored
    assert stored[f"{name}.preffn_bn.weight"].shape == (6,)
    assert repdeploy.verify(made.bundle, against=path).passed
    assert repdeploy.export(made.bundle).artifacts[0].checks[0].passed


def test_a_fused_file_can_lose_channels_too(tmp_path: Path) -> None:
    """RepVGG's argument: a network of one branch can be thinned freely."""
    model = repvgg()
    path = save(model, tmp_path / "net.pth")
    fused = repdeploy.convert(path, output=tmp_path / "net.repdeploy").bundle
    assert fused is not None
    state = deploy_tensors(fused)
    state["stage2.0.rbr_reparam.weight"][1], state["stage2.0.rbr_reparam.bias"][1] = 0, -2
    torch.save(state, tmp_path / "thin.pth")
    assert repdeploy.convert(tmp_path / "thin.pth", output=tmp_path / "nothing.repdeploy").already_deployed
    made = repdeploy.convert(tmp_path / "thin.pth", output=tmp_path / "thin.repdeploy", prune_dead=True)
    assert made.bundle is not None
    assert deploy_tensors(made.bundle)["stage2.0.rbr_reparam.weight"].shape[0] == state["stage2.0.rbr_reparam.bias"].numel() - 1
    assert repdeploy.verify(made.bundle, against=tmp_path / "thin.pth").passed


@pytest.mark.parametrize(
    ("options", "error"),
    [({"model": "module:factory"}, UsageError), ({}, InputError)],
    ids=["own model", "unknown network"],
)
def test_where_no_network_is_known_nothing_can_leave(tmp_path: Path, options: dict[str, Any], error: type[Exception]) -> None:
    torch.save(blocks_inside_a_detector(), tmp_path / "detector.pth")
    with pytest.raises(error, match="--prune-dead"):
        repdeploy.convert(tmp_path / "detector.pth", output=tmp_path / "no.repdeploy", prune_dead=True, **options)
    assert not (tmp_path / "no.repdeploy").exists()


def test_an_operation_that_is_not_known_keeps_what_it_touches() -> None:
    """What a skeleton of somebody else may do: concatenate, split, reshape, multiply by a number."""
    classes = Classes()

    def image() -> Traced:
        return traced(torch.empty(0, 4, 5, 5, dtype=torch.float64), classes, classes.new(4), torch.zeros(4).double())

    first, second, third, fourth = (image() for _ in range(4))
    joined = torch.cat([first, second], 1)
    halves = third.chunk(2, 1)
    doubled = fourth * 2
    assert isinstance(joined, Traced)
    assert joined.constants.isnan().all()
    assert all(isinstance(half, Traced) and len(half.names) == 2 for half in halves)
    assert isinstance(doubled, Traced)
    touched = torch.cat([item.names for item in (first, second, third, fourth, joined, *halves, doubled)])  # type: ignore[attr-defined]
    assert set(classes.of(touched)) <= classes.kept()
