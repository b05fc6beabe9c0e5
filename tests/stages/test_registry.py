"""Families come through entry points: an outsider's plugin works like ours, a broken one does not disturb the rest."""

from __future__ import annotations

import itertools
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import repdeploy
from repdeploy import plugins, registry
from repdeploy.errors import UnknownFamily, UsageError
from repdeploy.runtimes.onnx_runtime import OnnxSession

GROUP = registry.FAMILIES.group
PLUGIN = Path(__file__).parents[1] / "example_plugin"


@pytest.fixture
def outsider(monkeypatch: pytest.MonkeyPatch) -> None:
    """The example plugin's entry points beside ours, without installing it into the environment."""
    monkeypatch.syspath_prepend(str(PLUGIN))
    real = plugins.entry_points
    ours = list(plugins.entry_points(group=GROUP))
    theirs = [
        EntryPoint("twobranch", "repdeploy_twobranch:FAMILY", GROUP),
        EntryPoint("broken", "repdeploy_twobranch:NOTHING", GROUP),
        EntryPoint("wrong", "repdeploy_twobranch:forward", GROUP),
        EntryPoint("absent", "no_such_module:FAMILY", GROUP),
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: ours + theirs if group == GROUP else real(group=group))
    monkeypatch.delitem(sys.modules, "repdeploy_twobranch", raising=False)


def test_a_broken_plugin_is_listed_and_the_others_work(outsider: None) -> None:
    listed = {item.name: item for item in repdeploy.families()}
    assert listed["repvgg"].error == ""
    assert listed["twobranch"].title == "5x5-BN + AVG-1x1"
    assert "AttributeError" in listed["broken"].error
    assert "is no repdeploy.family.Family" in listed["wrong"].error
    assert "no_such_module" in listed["absent"].error
    with pytest.raises(UnknownFamily, match="does not load"):
        registry.require("broken")


def test_two_plugins_of_one_name_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = next(iter(plugins.entry_points(group=GROUP)))
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry, entry])
    with pytest.raises(UsageError, match="two distributions provide the family"):
        registry.FAMILIES.installed()


def test_an_outsiders_family_goes_all_the_way(outsider: None, tmp_path: Path) -> None:
    """Recognised, fused, proved, exported, run: with nothing but its own file."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Any] = {}
    widths = (3, 6, 4)
    for index, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        name = f"layers.{index}"
        state[f"{name}.wide.conv.weight"] = torch.randn(outputs, inputs, 5, 5, generator=generator) * 0.2
        for part in ("weight", "bias", "running_mean"):
            state[f"{name}.wide.bn.{part}"] = torch.randn(outputs, generator=generator)
        state[f"{name}.wide.bn.running_var"] = torch.rand(outputs, generator=generator) + 0.5
        state[f"{name}.point.weight"] = torch.randn(outputs, inputs, 1, 1, generator=generator)
        state[f"{name}.point.bias"] = torch.randn(outputs, generator=generator)
    state["classes.weight"], state["classes.bias"] = torch.randn(7, 4, generator=generator), torch.zeros(7)
    torch.save(state, tmp_path / "two.pth")

    def trained(x: torch.Tensor) -> torch.Tensor:
        for index in range(2):
            name = f"layers.{index}"
            wide = F.conv2d(x, state[f"{name}.wide.conv.weight"], padding=2)
            parts = [state[f"{name}.wide.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
            pooled = F.conv2d(F.avg_pool2d(x, 3, 1, 1), state[f"{name}.point.weight"], state[f"{name}.point.bias"])
            x = F.gelu(F.batch_norm(wide, *parts) + pooled)
        return F.linear(x.amax((2, 3)), state["classes.weight"], state["classes.bias"])

    conversion = repdeploy.convert(tmp_path / "two.pth", output=tmp_path / "two.repdeploy")
    assert conversion.manifest.family == "twobranch"
    assert conversion.manifest.skeleton == "twobranch"
    assert conversion.manifest.input_shape == (1, 3, 32, 32)
    repdeploy.export(tmp_path / "two.repdeploy")
    x = torch.randn(2, 3, 32, 32, generator=generator)
    got = OnnxSession(tmp_path / "two.repdeploy" / "model.fp32.onnx").run(x.numpy())
    assert torch.allclose(torch.from_numpy(got), trained(x), atol=1e-4)
    assert repdeploy.verify(tmp_path / "two.repdeploy").passed
