"""ResRep's reference networks: what its rows are worth, and what is left of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import repdeploy
from repdeploy.checkpoint import load
from repdeploy.facts import Facts
from repdeploy.network import Network, describe
from repdeploy.pruning import thin
from repdeploy.rebuild import reader
from repdeploy.recognise import recognise
from repdeploy.registry import families
from repdeploy.runtimes.onnx_runtime import OnnxSession
from tests.golden.cases import Case, cases


def agrees(network: Network, case: Case, output: str) -> bool:
    reference = case.array(output)
    with torch.no_grad():
        error = float((network(case.array("input").double()) - reference).abs().max())
    return error <= case.exactness * float(reference.abs().max())


@pytest.mark.parametrize("case", cases("resrep/*"))
def test_every_reading_is_the_official_network(case: Case) -> None:
    """In float64: as stored, with the given-up rows at zero, and without them."""
    checkpoint, facts = load(case.checkpoint), Facts()
    plan = recognise(checkpoint.tensors, families(), facts).plan
    assert plan is not None
    read = reader(checkpoint.tensors)
    thinned = thin(plan, read, facts, plan.usual_shape, dead=False)
    as_stored = describe(plan, read, facts).network(squeezed=False, dtype=torch.float64)
    silenced = describe(plan, read, facts, thinned.silenced).network(squeezed=False, dtype=torch.float64)
    deploy = thinned.deploy().network(squeezed=True, dtype=torch.float64)
    assert agrees(as_stored, case, "output_kept")
    assert agrees(silenced, case, "output")
    assert agrees(deploy, case, "output")
    assert not agrees(as_stored, case, "output")


@pytest.mark.parametrize("case", cases("resrep/*"))
def test_the_widths_are_the_official_ones(case: Case, tmp_path: Path) -> None:
    """Every convolution's, in the order of its index, and the parameters; the exported network gives the official outputs."""
    x = case.array("input").numpy()
    np.savez(tmp_path / "expect.npz", input=x, output=case.array("output_kept").numpy())
    made = repdeploy.convert(
        case.checkpoint, output=tmp_path / "net.repdeploy", input_shape=x.shape, expect=tmp_path / "expect.npz"
    )
    manifest, pruning = made.manifest, made.manifest.pruning
    assert manifest.verdict.grade == "anchored"
    assert pruning is not None
    kernels = {block.name: block.kernel for block in manifest.blocks}
    official = case.meta["official_pruned_deps"]
    names = sorted(kernels, key=index_in_construction_order)
    assert [kernels[name][0] for name in names] == official
    assert manifest.parameters_after == pruning.parameters_after == case.meta["official_deploy_param_count"]
    assert manifest.parameters_before == case.meta["train_param_count"]
    assert pruning.cost is not None
    assert 0 < pruning.cost < 1e-3
    assert made.bundle is not None
    tensors = load_file(made.bundle / "weights.safetensors")
    assert not [key for key in tensors if "mask" in key or "compactor" in key or ".bn." in key]
    repdeploy.export(made.bundle)
    got = OnnxSession(made.bundle / "model.fp32.onnx").run(x)
    assert float(np.abs(got - case.array("output").numpy()).max()) <= case.bound
    assert repdeploy.verify(made.bundle).passed
    assert repdeploy.verify(made.bundle, against=case.checkpoint).passed


def index_in_construction_order(name: str) -> tuple[int, ...]:
    """The convolution's place in the official index: stem, then per stage the projection and the blocks."""
    numbers = [int("".join(filter(str.isdigit, part))) for part in name.split(".") if any(map(str.isdigit, part))]
    if name.endswith("projection"):
        return (numbers[0], -1)
    if name.startswith("stage") and "block" not in name:
        return (numbers[0], -2)
    if name.startswith("stem.") and not name.startswith("stem.conv"):
        return (numbers[0], 0 if name.endswith("depthwise") else 1)
    return tuple(numbers) if name != "conv1" else (-1,)
