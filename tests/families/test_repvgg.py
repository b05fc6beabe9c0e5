"""RepVGG against its sheet: both readings, key layouts, groups, squeeze-excite, facts, deploy files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import repdeploy
from repdeploy.checkpoint import load
from repdeploy.errors import IllegalInput, InputError
from repdeploy.facts import Facts, Setting
from repdeploy.network import describe
from repdeploy.rebuild import reader
from repdeploy.recognise import recognise
from repdeploy.registry import families
from sample_models.repvgg import DeployRepVGG
from tests.networks import described, repvgg, save, timm_names

VARIANTS: list[dict[str, Any]] = [
    {},
    {"groups": 2},
    {"groups": 4, "widths": (4, 8, 16, 16, 32)},
    {"blocks": (2, 1, 3, 2), "widths": (3, 5, 7, 9, 11)},
    {"squeeze_excite": True, "widths": (16, 16, 32, 32, 48)},
    {"channels": 1, "classes": 1},
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [(65, 65), (67, 65), (96, 64), (33, 33)])
def test_both_readings_are_the_module(variant: dict[str, Any], size: tuple[int, int], tmp_path: Path) -> None:
    model = repvgg(**variant)
    path = save(model, tmp_path / "ckpt.pth")
    x = torch.randn(2, variant.get("channels", 3), *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        wanted = model.double()(x)
        for squeezed in (False, True):
            got = described(path, squeezed=squeezed)(x)
            assert float((got - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())


def test_timm_names_are_the_same_described(tmp_path: Path) -> None:
    model = repvgg(groups=2)
    torch.save(timm_names(model.state_dict()), tmp_path / "timm.pth")
    x = torch.randn(1, 3, 65, 65, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(described(tmp_path / "timm.pth")(x), model.double()(x), rtol=0, atol=1e-12)


def test_border_pixels_are_exact(tmp_path: Path) -> None:
    """An impulse in each corner of the stem's input, through stem and block: every tap of every border meets it."""
    model = repvgg()
    fused = described(save(model, tmp_path / "ckpt.pth"))
    for row in (0, 32):
        for column in (0, 32):
            x = torch.zeros(1, 3, 33, 33, dtype=torch.float64)
            x[:, :, row, column] = 1
            with torch.no_grad():
                wanted = model.double().stage1(model.stage0(x))
                got = torch.relu(fused.outputs_by_slot(x)["stage1.0"])
            assert torch.allclose(got, wanted, rtol=0, atol=1e-12)


def test_the_written_weights_load_into_the_official_deploy_model(tmp_path: Path) -> None:
    model = repvgg(groups=2)
    repdeploy.convert(save(model, tmp_path / "ckpt.pth"), output=tmp_path / "b.repdeploy")
    deploy = DeployRepVGG(model)
    deploy.load_state_dict(load_file(tmp_path / "b.repdeploy" / "weights.safetensors"), strict=True)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(deploy.eval()(x), model(x), atol=1e-4)


def test_a_deploy_file_has_nothing_to_fuse(tmp_path: Path) -> None:
    repdeploy.convert(save(repvgg(), tmp_path / "ckpt.pth"), output=tmp_path / "b.repdeploy")
    again = repdeploy.convert(tmp_path / "b.repdeploy" / "weights.safetensors", output=tmp_path / "c.repdeploy")
    assert again.already_deployed
    assert again.bundle is None
    assert not (tmp_path / "c.repdeploy").exists()


def test_a_quantization_aware_block_folds_its_own_norm(tmp_path: Path) -> None:
    model = repvgg()
    repdeploy.convert(save(model, tmp_path / "ckpt.pth"), output=tmp_path / "b.repdeploy")
    state = load_file(tmp_path / "b.repdeploy" / "weights.safetensors")
    wrapped: dict[str, Tensor] = {}
    for key, value in state.items():
        if key.endswith("rbr_reparam.weight"):
            prefix, channels = key.removesuffix("weight"), value.shape[0]
            wrapped[f"{prefix}conv.weight"] = value
            wrapped[f"{prefix}bn.weight"] = torch.full((channels,), 2.0)
            wrapped[f"{prefix}bn.bias"] = 2 * state[f"{prefix}bias"]
            wrapped[f"{prefix}bn.running_mean"] = torch.zeros(channels)
            wrapped[f"{prefix}bn.running_var"] = torch.full((channels,), 1 - 1e-5)
        elif not key.endswith("rbr_reparam.bias"):
            wrapped[key] = value
    save_file(wrapped, tmp_path / "qat.safetensors")
    repdeploy.convert(tmp_path / "qat.safetensors", output=tmp_path / "q.repdeploy")
    folded = load_file(tmp_path / "q.repdeploy" / "weights.safetensors")
    for key, value in folded.items():
        factor = 2.0 if "rbr_reparam" in key else 1.0
        assert torch.allclose(value, factor * state[key], atol=1e-6), key


@pytest.mark.parametrize(("eps", "dilation"), [(1e-3, 1), (1e-5, 2), (1e-2, 4)])
def test_stated_facts_reach_the_training_time_network(eps: float, dilation: int, tmp_path: Path) -> None:
    """eps everywhere; stage 3 dilated, as the segmentation example edits it after construction."""
    model = repvgg(blocks=(1, 1, 3, 1))
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eps = eps
    for block in model.stage3.children():
        dense = block.rbr_dense.conv  # type: ignore[union-attr]
        dense.dilation, dense.padding = (dilation, dilation), (dilation, dilation)  # type: ignore[union-attr]
        for branch in (dense, block.rbr_1x1.conv):  # type: ignore[union-attr]
            branch.stride = (1, 1)  # type: ignore[union-attr]
    path = save(model, tmp_path / "ckpt.pth")
    stated = [Setting("", "eps", eps), Setting("stage3", "dilation", dilation), Setting("stage3", "stride", 1)]
    x = torch.randn(1, 3, 67, 65, dtype=torch.float64)
    with torch.no_grad():
        wanted = model.double()(x)
        for squeezed in (False, True):
            assert torch.allclose(described(path, *stated, squeezed=squeezed)(x), wanted, rtol=0, atol=1e-11)


def test_a_pickled_module_tells_its_own_facts(tmp_path: Path) -> None:
    """eps and the dilation of a whole pickled network are read from its attributes; nothing of it is loaded."""
    model = repvgg()
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.eps = 1e-3
    torch.save({"model": model.double()}, tmp_path / "module.pth")
    found = repdeploy.inspect(tmp_path / "module.pth")
    eps = [fact for fact in found.facts if fact.name == "eps"]
    assert [(fact.value, fact.origin) for fact in eps] == [("0.001", "file")]
    x = torch.randn(1, 3, 65, 65, dtype=torch.float64)
    facts, checkpoint = Facts((), load(tmp_path / "module.pth").attributes), load(tmp_path / "module.pth")
    plan = recognise(checkpoint.tensors, families(), facts).plan
    assert plan is not None
    fused = describe(plan, reader(checkpoint.tensors), facts).network(squeezed=True, dtype=torch.float64)
    with torch.no_grad():
        assert torch.allclose(fused(x), model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [(63, 65), (140, 65)])
def test_squeeze_excite_refuses_what_its_window_does_not_cover(size: tuple[int, int], tmp_path: Path) -> None:
    path = save(repvgg(squeeze_excite=True, widths=(16, 16, 32, 32, 48)), tmp_path / "se.pth")
    with pytest.raises(IllegalInput, match="square of the map's width"):
        described(path, image=(3, *size))


def test_official_names_are_found_from_shapes() -> None:
    family = next(item for item in families() if item.name == "repvgg")
    assert family.architectures["RepVGG-B1g4"].groups == 4
    assert family.architectures["RepVGG-A0"].depths == (1, 2, 4, 14, 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.pop("stage1.0.rbr_1x1.conv.weight"), "stage1.0.rbr_1x1.conv.weight is missing"),
        (lambda s: s.pop("stage2.1.rbr_identity.running_var"), "stage2.1.rbr_identity.running_var is missing"),
        (lambda s: s.update({"stage1.0.rbr_dense.bn.weight": torch.ones(3)}), "contradict"),
        (lambda s: s.update({"stage2.1.rbr_identity.weight": torch.ones(3)}), "have different shapes"),
    ],
)
def test_a_damaged_block_is_refused_by_name(damage: Any, message: str, tmp_path: Path) -> None:
    state = dict(repvgg().state_dict())
    damage(state)
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match=message):
        repdeploy.convert(tmp_path / "damaged.pth", output=tmp_path / "b.repdeploy")
    assert not (tmp_path / "b.repdeploy").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.update({"stage1.0.rbr_dense.bn.running_var": torch.ones(8, dtype=torch.complex64)}), "complex64"),
        (lambda s: s.update({"linear.weight": s["linear.weight"].to(torch.complex64)}), "complex64"),
        (lambda s: s.update({"stage1.0.rbr_dense.conv.weight": torch.tensor(1.0)}), "expected a kernel"),
        (lambda s: s.update({"stage1.0.rbr_dense.conv.weight": torch.ones(8)}), "expected a kernel"),
        (lambda s: s.update({"linear.bias": torch.ones(3)}), "the tensors of block linear contradict each other"),
    ],
)
def test_tensors_of_a_wrong_kind_are_refused_by_name(damage: Any, message: str, tmp_path: Path) -> None:
    state = dict(repvgg().state_dict())
    damage(state)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(InputError, match=message):
        repdeploy.convert(tmp_path / "odd.pth", output=tmp_path / "b.repdeploy", input_shape="1x3x65x65")
    assert not (tmp_path / "b.repdeploy").exists()


@pytest.mark.parametrize(
    ("name", "value"), [("stride", (0, 0)), ("stride", True), ("padding", 10**30), ("eps", 10**400), ("eps", float("inf"))]
)
def test_a_pickled_attribute_that_cannot_be_is_refused(name: str, value: Any, tmp_path: Path) -> None:
    model = repvgg()
    block = model.stage1[0]  # type: ignore[index]
    setattr(block.rbr_dense.bn if name == "eps" else block.rbr_dense.conv, name, value)  # type: ignore[union-attr]
    torch.save(model, tmp_path / "odd.pth")
    with pytest.raises(InputError, match=f"pickled with {name}"):
        repdeploy.convert(tmp_path / "odd.pth", output=tmp_path / "b.repdeploy")
