"""The sample models: trained checkpoints of every family, converted and exported without one changed prediction."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import repdeploy
from repdeploy.checkpoint import load
from repdeploy.runtimes.onnx_runtime import OnnxSession
from sample_models.digits import load_digits
from sample_models.repconv import classifier
from sample_models.samples import SAMPLES, Sample


def trained(name: str, sample: Sample) -> nn.Module:
    """The sample model with the weights of its committed checkpoint."""
    model = sample.build()
    stored = load(sample.checkpoint(name)).tensors
    model.load_state_dict({key: stored[key].read() for key in model.state_dict()}, strict=True)
    return model.eval()


def unchanged(predict: Tensor, wanted: Tensor) -> None:
    assert torch.equal(predict.argmax(1), wanted.argmax(1))


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_no_prediction_changes(name: str, tmp_path: Path) -> None:
    """On every test image: trained network, fused weights, ONNX. A network nobody knows is rebuilt by hand."""
    sample, digits = SAMPLES[name], load_digits(SAMPLES[name].side)
    checkpoint, images = sample.checkpoint(name), digits.test_images
    assert checkpoint.stat().st_size < 1_000_000
    model = trained(name, sample)
    with torch.no_grad():
        wanted = model(images)
    assert float((wanted.argmax(1) == digits.test_labels).double().mean()) > 0.96
    if sample.family == "repconv":
        repdeploy.convert(checkpoint, output=tmp_path / "b.repdeploy")
        deploy = classifier(12, 10, deploy=True).eval()
        deploy.load_state_dict(load_file(tmp_path / "b.repdeploy" / "weights.safetensors"), strict=True)
        with torch.no_grad():
            unchanged(deploy(images), wanted)
        return
    np.savez(tmp_path / "expect.npz", input=images[:8].numpy(), output=wanted[:8].numpy())
    shape = (1, 1, sample.side, sample.side)
    found = repdeploy.convert(
        checkpoint, output=tmp_path / "b.repdeploy", set=sample.options, input_shape=shape, expect=tmp_path / "expect.npz"
    ).manifest
    assert found.family == sample.family
    assert (found.verdict.passed, found.verdict.grade) == (True, "anchored")
    repdeploy.export(tmp_path / "b.repdeploy")
    unchanged(torch.from_numpy(OnnxSession(tmp_path / "b.repdeploy" / "model.fp32.onnx").run(images.numpy())), wanted)


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_every_sample_takes_a_training_step(name: str) -> None:
    """All that the optimizer would move gets a gradient."""
    torch.manual_seed(0)
    sample = SAMPLES[name]
    model = sample.build().train()
    torch.nn.functional.cross_entropy(model(torch.randn(8, 1, sample.side, sample.side)), torch.arange(8)).backward()
    assert all(value.grad is not None for value in model.parameters())
