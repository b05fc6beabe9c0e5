"""Single blocks of the reference set: the families' own descriptions against the official outputs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

import repdeploy
from repdeploy.checkpoint import load
from repdeploy.facts import Facts, parse_settings
from repdeploy.family import Family
from repdeploy.network import describe
from repdeploy.rebuild import fact_kinds, reader
from repdeploy.recognise import keys_of, recognise
from repdeploy.registry import families
from repdeploy.skeletons import Net, Skeleton
from repdeploy.skeletons.wide_resnet import block
from tests.golden.cases import Case, cases

BLOCKS = cases("repvgg/block_*", "acnet/block_*", "dbb/block_*", "orepa/block_*", "orepa/stem_*")


def stated(case: Case) -> list[str]:
    """The geometry that the block was constructed with, as --set takes it."""
    arguments = case.meta["constructor"]
    return [f"{name}={arguments[name]}" for name in ("stride", "padding", "groups") if name in arguments]


def activation(case: Case, x: Tensor) -> Tensor:
    arguments = case.meta["constructor"]
    return F.relu(x) if "nonlinear" in arguments or arguments["cls"].startswith("RepVGGBlock") else x


@pytest.mark.parametrize("case", BLOCKS)
def test_both_readings_are_the_official_block(case: Case) -> None:
    checkpoint = load(case.checkpoint)
    facts = Facts(parse_settings(stated(case), fact_kinds(families())))
    (slot,) = recognise(checkpoint.tensors, families(), facts, family=case.folder.parent.name).slots
    expression = slot.describe(reader(checkpoint.tensors), facts, keys_of(checkpoint.tensors))
    x, wanted = case.array("input").double(), case.array("output")
    for reading in (expression, expression.squeeze().zero_filled()):
        assert float((activation(case, reading.run(x)) - wanted).abs().max()) <= case.exactness * float(wanted.abs().max())


@pytest.mark.parametrize("case", BLOCKS)
def test_a_single_block_is_fused_and_proved(case: Case, tmp_path: Path) -> None:
    family, bundle = case.folder.parent.name, tmp_path / "block.repdeploy"
    conversion = repdeploy.convert(case.checkpoint, family=family, output=bundle, set=stated(case))
    assert conversion.manifest.verdict.passed
    assert conversion.manifest.verdict.grade == "blocks only"
    tensors, arguments = load_file(bundle / "weights.safetensors"), case.meta["constructor"]
    bias, weight = sorted(tensors)
    x = case.array("input")
    got = F.conv2d(
        x,
        tensors[weight],
        tensors[bias],
        stride=arguments.get("stride", 1),
        padding=arguments.get("padding", 0),
        groups=x.shape[1] // tensors[weight].shape[1],
    )
    assert float((activation(case, got) - case.array("output")).abs().max()) <= case.bound


@pytest.mark.parametrize("case", cases("acnet/wrn_block"))
def test_a_pre_activation_block_keeps_the_norms_in_front_of_its_relus(case: Case) -> None:
    """conv2.bn stands between two convolutions and folds into the first; conv1.bn and proj.bn read the block's input."""
    acnet = next(item for item in families() if item.name == "acnet")

    def forward(net: Net, x: Tensor) -> Tensor:
        return block(net, "", x, case.meta["constructor"]["stride"])

    skeleton = Skeleton("wrn_block", forward, ("conv1",))
    family = Family("wrn", "", "", acnet.kinds, (skeleton,))
    checkpoint, facts = load(case.checkpoint), Facts()
    recognition = recognise(checkpoint.tensors, [family], facts, input_shape=(8, 15, 17))
    assert recognition.plan is not None
    assert list(recognition.plan.norms) == ["conv1.bn", "proj.bn"]
    description = describe(recognition.plan, reader(checkpoint.tensors), facts)
    x, wanted = case.array("input").double(), case.array("output")
    for squeezed in (False, True):
        got = description.network(squeezed=squeezed, dtype=torch.float64)(x)
        assert float((got - wanted).abs().max()) <= 1e-12 * float(wanted.abs().max())
