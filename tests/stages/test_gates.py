"""The gates must fail: every planted mistake is found, named, and nothing is written."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import repdeploy
from repdeploy import fusion, gates
from repdeploy.algebra import Conv, Linear, Norm, Online
from repdeploy.bundle import Bundle
from repdeploy.checkpoint import load
from repdeploy.errors import InputError, VerificationFailed
from repdeploy.facts import Facts
from repdeploy.network import ConvLayer, Network, describe, sample_images
from repdeploy.rebuild import reader
from repdeploy.recognise import recognise
from repdeploy.registry import families
from tests.conftest import tree
from tests.networks import repvgg, save


def both(path: Path) -> tuple[Network, Network]:
    facts, checkpoint = Facts(), load(path)
    plan = recognise(checkpoint.tensors, families(), facts).plan
    assert plan is not None
    read = reader(checkpoint.tensors)
    training, deploy = (
        describe(plan, read, facts).network(squeezed=squeezed, dtype=torch.float64) for squeezed in (False, True)
    )
    return training, deploy


def expression() -> Any:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
    mean, var = (
        torch.randn(4, generator=generator, dtype=torch.float64),
        torch.rand(4, generator=generator, dtype=torch.float64),
    )
    return Conv(weight, pads=(1, 1, 1, 1)) >> Norm(mean, var + 0.1)


class SqueezedWrongly(Linear):
    """Runs one convolution and squeezes to another: what a mistake in a composition rule would look like."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return self.squeeze().run(x) * 1.001

    def squeeze(self, tolerance: float = 0.0) -> Conv:
        return Conv(torch.ones(4, 4, 1, 1, dtype=torch.float64))

    @property
    def geometry(self) -> Any:
        return self.squeeze().geometry


def test_gate_1_looks_into_what_generates_a_kernel() -> None:
    """A block that squeezes before it runs agrees with itself, whatever it squeezes to; its branches must not."""
    block = Online(SqueezedWrongly()) >> expression().parts[1]
    assert not gates.algebra("b", block, block.squeeze()).passed
    sound = Online(Conv(torch.ones(4, 4, 1, 1, dtype=torch.float64))) >> expression().parts[1]
    assert gates.algebra("b", sound, sound.squeeze()).passed


@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2)])
def test_gate_1_sees_every_single_wrong_tap(stride: tuple[int, int]) -> None:
    block = Conv(expression().parts[0].weight, pads=(1, 1, 1, 1), stride=stride) >> expression().parts[1]
    fused = block.squeeze()
    assert gates.algebra("b", block, fused).passed
    for index in range(fused.weight.numel()):
        wrong = fused.weight.clone()
        wrong.view(-1)[index] += 1e-6
        assert not gates.algebra("b", block, dataclasses.replace(fused, weight=wrong)).passed, index
    assert fused.bias is not None
    for index in range(4):
        wrong = fused.bias.clone()
        wrong[index] += 1e-6
        assert not gates.algebra("b", block, dataclasses.replace(fused, bias=wrong)).passed


def test_gate_1_sees_a_wrong_border_and_nan() -> None:
    block = expression()
    fused = block.squeeze()
    shifted = dataclasses.replace(fused, pads=(2, 1, 0, 1))
    assert not gates.algebra("b", block, shifted).passed
    smaller = dataclasses.replace(fused, pads=(0, 0, 0, 0))
    assert "branches" in gates.algebra("b", block, smaller).failure
    broken = dataclasses.replace(fused, weight=fused.weight * float("nan"))
    assert gates.algebra("b", block, broken).failure == "the output has NaN"


def test_gate_2_names_the_first_block_that_differs(tmp_path: Path) -> None:
    training, deploy = both(save(repvgg(), tmp_path / "a.pth"))
    images = gates.gate_images((3, 67, 65))
    assert gates.network_gate(training, deploy, images)[0].passed
    layer = deploy.get_submodule("stage2.1.rbr_reparam")
    assert isinstance(layer, ConvLayer)
    layer.weight += 1e-3
    check, _ = gates.network_gate(training, deploy, images)
    assert not check.passed
    assert "the first block that differs is stage2.1 (3x3-BN + 1x1-BN + BN)" in check.failure


def test_gate_3_is_bitwise_and_pooled(tmp_path: Path) -> None:
    training, deploy = both(save(repvgg(), tmp_path / "a.pth"))
    exact = deploy.state_dict()
    pairs = [(name, value, value.float()) for name, value in exact.items()]
    assert gates.stored_gate(pairs).passed
    name, value, stored = pairs[3]
    nudged = torch.nextafter(stored, torch.full_like(stored, 9e9))
    assert name in gates.stored_gate([*pairs[:3], (name, value, nudged)]).failure
    images = gates.gate_images((3, 67, 65))
    reference = gates.run_in_chunks(training, images.double())
    assert gates.rounding_gate(training.float(), deploy.float(), images, reference).passed
    for layer in deploy.modules():
        if isinstance(layer, ConvLayer):
            layer.weight *= 1 + 3e-5
    assert not gates.rounding_gate(training, deploy, images, reference).passed


@pytest.mark.parametrize(
    ("spoil", "failure"),
    [
        (lambda y: y * float("nan"), "NaN"),
        (lambda y: y / 0, "Inf"),
        (lambda y: y[:, :2], "shape"),
        (lambda y: y * 0, "zero everywhere"),
        (lambda y: y * 0 + 1, "constant"),
    ],
)
def test_gate_5_calls_each_failure_by_its_name(spoil: Any, failure: str) -> None:
    reference = torch.arange(1.0, 13.0).view(3, 4)
    assert gates.output_failure(reference, reference) == ""
    assert failure in gates.output_failure(spoil(reference), reference)
    assert not gates.artifact_check("x", spoil(reference), reference, "bf16").passed
    assert gates.output_failure(reference * 0, reference * 0) == ""


def test_a_failed_gate_writes_no_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake planted in the algebra's sum: gate 1 finds it, and the folder stays as it was."""
    path = save(repvgg(), tmp_path / "a.pth")
    right = Conv.plus

    def wrong(self: Conv, *others: Conv, **options: Any) -> Conv:
        total = right(self, *others, **options)
        return dataclasses.replace(total, weight=total.weight.flip(3))

    monkeypatch.setattr(Conv, "plus", wrong)
    with pytest.raises(VerificationFailed, match="gate 'algebra'") as caught:
        repdeploy.convert(path, output=tmp_path / "b.repdeploy")
    assert caught.value.exit_status == 4
    assert tree(tmp_path) == ["a.pth"]


def test_a_write_that_goes_wrong_is_found_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(repvgg(), tmp_path / "a.pth")
    right = fusion.WeightsWriter.write

    def wrong(self: Any, key: str, tensor: torch.Tensor) -> None:
        right(self, key, tensor + 1e-7 if key == "stage2.0.rbr_reparam.bias" else tensor)

    monkeypatch.setattr(fusion.WeightsWriter, "write", wrong)
    with pytest.raises(VerificationFailed, match=r"gate 'stored'.*stage2\.0\.rbr_reparam\.bias"):
        repdeploy.convert(path, output=tmp_path / "b.repdeploy")
    assert tree(tmp_path) == ["a.pth"]


def test_expectations_must_fit(tmp_path: Path) -> None:
    training, _ = both(save(repvgg(), tmp_path / "a.pth"))
    x = sample_images((2, 3, 65, 65), 0)
    y = gates.run_in_chunks(training, x.double())
    assert gates.expectation(training, {"input": x.numpy(), "output": y.numpy()}).passed
    assert gates.expectation(training, {"input": x.numpy(), "output": y.float().numpy()}).passed
    assert not gates.expectation(training, {"input": x.numpy(), "output": y.numpy() * (1 + 1e-3)}).passed
    with pytest.raises(InputError, match="expected \\(batch, 3"):
        gates.expectation(training, {"input": x.numpy()[:, :1], "output": y.numpy()})
    with pytest.raises(InputError, match="this network gives"):
        gates.expectation(training, {"input": x.numpy(), "output": y.numpy()[:, :2]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.pop("output"), "needs the arrays"),
        (lambda a: a.update(input=a["input"][:0], output=a["output"][:0]), "input is empty"),
        (lambda a: a.update(output=a["output"] * np.nan), "output has NaN or Inf"),
        (lambda a: a.update(output=a["output"] * 0), "output is zero everywhere"),
        (lambda a: a.update(output=a["output"].astype(np.float16)), "output has type float16"),
        (lambda a: a.update(input=a["input"][0]), "expected \\(batch, channels"),
        (lambda a: a.update(output=np.concatenate([a["output"]] * 2)), "expected \\(batch, channels"),
    ],
)
def test_recorded_outputs_that_prove_nothing_are_refused(change: Any, message: str) -> None:
    arrays = {"input": np.ones((2, 3, 9, 9), np.float32), "output": np.ones((2, 5), np.float32)}
    gates.check_recorded(arrays)
    change(arrays)
    with pytest.raises(InputError, match=message):
        gates.check_recorded(arrays)


def test_what_is_assumed_is_listed_in_the_verdict(tmp_path: Path) -> None:
    repdeploy.convert(save(repvgg(), tmp_path / "a.pth"), output=tmp_path / "b.repdeploy", set=["stage1.eps=1e-5"])
    verdict = Bundle(tmp_path / "b.repdeploy").manifest.verdict
    assert {fact.name for fact in verdict.assumed} == {"eps", "stride", "dilation", "padding"}
    assert all("stage1.0" not in fact.scopes for fact in verdict.assumed if fact.name == "eps")


def test_running_variances_near_zero_are_proved_in_float64(tmp_path: Path) -> None:
    """Dead channels: scales of 316 against ordinary ones (families sheet, pitfall 6)."""
    model = repvgg()
    for name, value in model.state_dict().items():
        if name.endswith("rbr_identity.running_var"):
            value[:2] = 1e-12
    conversion = repdeploy.convert(save(model, tmp_path / "a.pth"), output=tmp_path / "b.repdeploy")
    assert conversion.manifest.verdict.passed
