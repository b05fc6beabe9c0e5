"""Whole networks and blocks of the reference set, through the same verbs that the command line calls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import repdeploy
from repdeploy.bundle import Bundle
from repdeploy.checkpoint import load
from repdeploy.facts import Facts
from repdeploy.network import describe
from repdeploy.rebuild import reader
from repdeploy.recognise import recognise
from repdeploy.registry import families
from repdeploy.runtimes.onnx_cpu import OnnxSession
from tests.golden.cases import Case, cases

REPVGG_NETWORKS = ("repvgg/[!b]*", "timm/repvgg_*")


@pytest.mark.parametrize("case", cases(*REPVGG_NETWORKS))
@pytest.mark.parametrize("squeezed", [False, True])
def test_both_readings_are_the_official_training_time_network(case: Case, squeezed: bool) -> None:
    """In float64, against the official outputs: the description is right, not only consistent."""
    facts, checkpoint = Facts(), load(case.checkpoint)
    plan = recognise(checkpoint.tensors, families(), facts).plan
    assert plan is not None
    network = describe(plan, checkpoint.tensors, reader(checkpoint.tensors), facts).network(
        squeezed=squeezed, dtype=torch.float64
    )
    pairs = [("input", "output")]
    if (case.folder / "input_nonsquare.npy").exists():
        pairs.append(("input_nonsquare", "output_nonsquare"))
    for given, wanted in pairs:
        reference = case.array(wanted)
        with torch.no_grad():
            error = float((network(case.array(given).double()) - reference).abs().max())
        assert error <= 1e-12 * float(reference.abs().max())


@pytest.mark.parametrize("case", cases(*REPVGG_NETWORKS))
def test_converted_and_exported_it_gives_the_official_outputs(case: Case, tmp_path: Path) -> None:
    x = case.array("input").numpy()
    expect = tmp_path / "expect.npz"
    np.savez(expect, input=x, output=case.array("output").numpy())
    for weights, output in (("model", "output"), ("ema", "output_ema")):
        if not (case.folder / f"{output}.npy").exists():
            continue
        bundle = tmp_path / f"{weights}.repdeploy"
        anchored = expect if weights == "model" else None
        conversion = repdeploy.convert(case.checkpoint, output=bundle, weights=weights, input_shape=x.shape, expect=anchored)
        assert conversion.manifest.verdict.passed
        assert conversion.manifest.verdict.grade == ("anchored" if anchored else "self-consistent")
        assert conversion.manifest.parameters_after == case.meta.get(
            "official_deploy_params", conversion.manifest.parameters_after
        )
        repdeploy.export(bundle)
        got = OnnxSession(bundle / "model.fp32.onnx").run(x)
        assert float(np.abs(got - case.array(output).numpy()).max()) <= case.bound
        assert repdeploy.verify(bundle).passed


@pytest.mark.parametrize("case", cases("repvgg/block_*"))
def test_a_single_block_is_fused_and_proved(case: Case, tmp_path: Path) -> None:
    conversion = repdeploy.convert(case.checkpoint, family="repvgg", output=tmp_path / "block.repdeploy")
    assert conversion.manifest.verdict.grade == "blocks only"
    tensors, arguments = load_file(tmp_path / "block.repdeploy" / "weights.safetensors"), case.meta["constructor"]
    assert sorted(tensors) == ["rbr_reparam.bias", "rbr_reparam.weight"]
    x = case.array("input")
    got = F.relu(
        F.conv2d(
            x,
            tensors["rbr_reparam.weight"],
            tensors["rbr_reparam.bias"],
            stride=arguments["stride"],
            padding=1,
            groups=arguments["groups"],
        )
    )
    assert float((got - case.array("output")).abs().max()) <= case.bound


@pytest.mark.parametrize("case", cases("repvgg/plus_pse"))
def test_auxiliary_heads_are_dropped_and_said_so(case: Case, tmp_path: Path) -> None:
    repdeploy.convert(case.checkpoint, output=tmp_path / "plus.repdeploy")
    manifest = Bundle(tmp_path / "plus.repdeploy").manifest
    assert {name.split(".")[0] for name, _ in manifest.dropped} == {"stage1_aux", "stage2_aux", "stage3_first_aux"}
    assert not any("_aux" in key for key in load_file(tmp_path / "plus.repdeploy" / "weights.safetensors"))
