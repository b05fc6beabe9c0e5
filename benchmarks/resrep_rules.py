"""The three rules that ResRep's official converter gets wrong, each on a network that needs it: its error beside ours.

usage: python -m benchmarks.resrep_rules

Errors are the largest absolute ones against the training-time network in float64, with the rows that leave at zero, on images
that no gate has used. Ours: convert and export, run in onnxruntime in float32. The official rule, on the same network:

- MobileNet: behind a channel that left, the depthwise norm counts as |beta|, not as relu(beta - mean * scale);
- LeNet: the flattened map loses the columns that a position-major order would give;
- a compactor on a residual sum: the first layer's compactor is applied to every layer that is added to it.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import repdeploy
from repdeploy.network import sample_images
from repdeploy.runtimes.onnx_runtime import OnnxSession
from sample_models.acnet import save_hdf5
from sample_models.backbones import CifarResNet, MobileNet, Plain
from sample_models.resrep import Compactor, compactors, without_forgotten
from tests.families.test_resrep import CASES, Case


def ours(case: Case, model: nn.Module, x: Tensor) -> np.ndarray:
    with tempfile.TemporaryDirectory() as scratch:
        path, bundle = save_hdf5(model.state_dict(), Path(scratch) / "finish.hdf5"), Path(scratch) / "b.repdeploy"
        repdeploy.convert(path, family="resrep", output=bundle, input_shape=x.shape)
        repdeploy.export(bundle)
        return OnnxSession(bundle / "model.fp32.onnx").run(x.numpy())


def absolute_beta(model: nn.Module) -> nn.Module:
    """What a dead channel's depthwise norm gives from zero, by the official rule."""
    changed = without_forgotten(model)
    assert isinstance(changed, MobileNet)
    before: Compactor = changed.conv1.compactor  # type: ignore[assignment]
    for block in changed.stem:
        norm, gone = block["depthwise"].bn, before.forgotten()  # type: ignore[index]
        norm.running_mean[gone], norm.bias.data[gone] = 0, norm.bias.data[gone].abs()
        if not hasattr(block["pointwise"], "compactor"):  # type: ignore[index]
            break
        before = block["pointwise"].compactor  # type: ignore[index]
    return changed


class PositionMajor(nn.Module):
    """A network whose first fully connected layer lost the wrong columns."""

    def __init__(self, model: Plain) -> None:
        super().__init__()
        self.model, self.gone = model, list(compactors(model).values())[-1].forgotten()

    def forward(self, x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        hook = self.model.linear1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        self.model(x)
        hook.remove()
        places = seen[0].shape[1] // len(self.gone)
        kept = seen[0][:, (~self.gone).repeat_interleave(places)]
        first, second = self.model.linear1, self.model.linear2
        logits: Tensor = second(F.relu(F.linear(kept, first.weight[:, (~self.gone).repeat(places)], first.bias)))
        return logits


def leader_everywhere(model: nn.Module) -> nn.Module:
    """The stem's compactor, its tiny rows at zero, behind every layer that the stem's output is added to."""
    changed = copy.deepcopy(model)
    assert isinstance(changed, CifarResNet)
    leader = without_forgotten(model).get_submodule("stage1.conv1.compactor")
    for name, layer in changed.named_modules():
        if name == "stage1.conv1" or (name.startswith("stage1.block") and name.endswith("conv2")):
            layer.compactor = copy.deepcopy(leader)  # type: ignore[assignment]
    return changed


def position_major(model: nn.Module) -> nn.Module:
    pruned = without_forgotten(model)
    assert isinstance(pruned, Plain)
    return PositionMajor(pruned)


RULES: tuple[tuple[str, str, Callable[[nn.Module], nn.Module]], ...] = (
    ("MobileNet: the constant of a dead one", "smi1", absolute_beta),
    ("LeNet: the order of a flattened map", "lenet5bn", position_major),
    ("a compactor on a residual sum", "src20, coupled layers alone", leader_everywhere),
)


def main() -> None:
    torch.set_num_threads(2)
    print("rule                                  our error   official rule's   largest output")
    for title, name, official in RULES:
        case = CASES[name]
        model = case.model().eval()
        x = sample_images((4, case.channels, *case.sizes[0]), seed=11)
        with torch.no_grad():
            wanted = case.reference(model).eval()(x.double())
            wrong = official(model).double().eval()(x.double())
        errors = [float((torch.as_tensor(got) - wanted).abs().max()) for got in (ours(case, model, x), wrong)]
        print(f"{title:38}{errors[0]:9.1e}{errors[1]:18.1e}{float(wanted.abs().max()):17.1e}")


if __name__ == "__main__":
    main()
