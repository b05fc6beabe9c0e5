"""Whole networks of the reference set, through the same verbs that the command line calls."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import repdeploy
from repdeploy.bundle import Bundle
from repdeploy.checkpoint import load
from repdeploy.facts import Facts, parse_settings
from repdeploy.network import describe
from repdeploy.rebuild import fact_kinds, reader
from repdeploy.recognise import recognise
from repdeploy.registry import families
from repdeploy.runtimes.onnx_runtime import OnnxSession
from tests.golden.cases import Case, cases

NETWORKS = (
    "repvgg/[!b]*", "acnet/[!bw]*", "dbb/[!b]*", "orepa/[rv]*", "replknet/*", "repghost/*", "repmlp/*", "timm/*",
)  # fmt: skip


@pytest.mark.parametrize("case", cases(*NETWORKS))
def test_both_readings_are_the_official_training_time_network(case: Case) -> None:
    """In float64, against the official outputs: the description is right, not only consistent."""
    for weights, output in case.outputs():
        checkpoint = load(case.checkpoint, weights)
        facts = Facts(parse_settings(case.settings, fact_kinds(families())), checkpoint.attributes)
        plan = recognise(checkpoint.tensors, families(), facts).plan
        assert plan is not None
        description = describe(plan, reader(checkpoint.tensors), facts)
        pairs = [("input", output)]
        if (case.folder / "input_nonsquare.npy").exists():
            pairs.append(("input_nonsquare", "output_nonsquare"))
        for squeezed in (False, True):
            network = description.network(squeezed=squeezed, dtype=torch.float64)
            for given, wanted in pairs:
                reference = case.array(wanted)
                with torch.no_grad():
                    error = float((network(case.array(given).double()) - reference).abs().max())
                assert error <= case.exactness * float(reference.abs().max())


@pytest.mark.parametrize("case", cases(*NETWORKS))
def test_converted_and_exported_it_gives_the_official_outputs(case: Case, tmp_path: Path) -> None:
    x = case.array("input").numpy()
    expect = tmp_path / "expect.npz"
    np.savez(expect, input=x, output=case.array("output").numpy())
    for weights, output in case.outputs():
        bundle = tmp_path / f"{weights}.repdeploy"
        anchored = expect if weights == "model" else None
        conversion = repdeploy.convert(
            case.checkpoint, output=bundle, weights=weights, input_shape=x.shape, expect=anchored, set=case.settings
        )
        assert conversion.manifest.verdict.passed
        assert conversion.manifest.verdict.grade == ("anchored" if anchored else "self-consistent")
        if "official_deploy_params" in case.meta:
            assert conversion.manifest.parameters_after == case.meta["official_deploy_params"]
        repdeploy.export(bundle)
        got = OnnxSession(bundle / "model.fp32.onnx").run(x)
        assert float(np.abs(got - case.array(output).numpy()).max()) <= case.bound
        assert repdeploy.verify(bundle).passed


@pytest.mark.parametrize("case", cases("repvgg/plus_pse"))
def test_auxiliary_heads_are_dropped_and_said_so(case: Case, tmp_path: Path) -> None:
    repdeploy.convert(case.checkpoint, output=tmp_path / "plus.repdeploy")
    manifest = Bundle(tmp_path / "plus.repdeploy").manifest
    assert {name.split(".")[0] for name, _ in manifest.dropped} == {"stage1_aux", "stage2_aux", "stage3_first_aux"}
    assert not any("_aux" in key for key in load_file(tmp_path / "plus.repdeploy" / "weights.safetensors"))
