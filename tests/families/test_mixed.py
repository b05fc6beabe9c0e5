"""Several families' blocks in one file of no known network: every block is fused by its own family."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import repdeploy
from repdeploy.errors import InputError
from sample_models.acnet import ACBlock
from sample_models.backbones import Layer
from sample_models.dbb import DBB
from sample_models.mobileone import MobileOneBlock
from sample_models.orepa import Orepa, Orepa1x1, OrepaVGG
from sample_models.repconv import RepConv
from sample_models.repghost import RepGhostModule
from sample_models.replknet import LargeKernel
from sample_models.repvgg import RepVGGBlock
from sample_models.scatter import scatter

BLOCKS: dict[str, tuple[str, nn.Module]] = {
    "neck.a": ("acnet", ACBlock(Layer(4, 6, 3))),
    "neck.b": ("dbb", DBB(Layer(4, 6, 3))),
    "neck.c": ("mobileone", MobileOneBlock(4, 6, 3, copies=2)),
    "neck.d": ("orepa", Orepa(Layer(4, 6, 3))),
    "neck.e": ("orepa", Orepa1x1(Layer(4, 6, 1))),
    "neck.f": ("orepa", OrepaVGG(Layer(4, 4, 3))),
    "neck.g": ("repconv", RepConv(4, 4)),
    "neck.h": ("repghost", RepGhostModule(4, 6, True, "bn", False)),
    "neck.i": ("replknet", LargeKernel(4, 7, 3, False)),
    "neck.j": ("repvgg", RepVGGBlock(4, 4, 1, 1, False)),
}


def mixed() -> dict[str, Tensor]:
    torch.manual_seed(0)
    state = {}
    for name, (_, block) in BLOCKS.items():
        scatter(block)
        state |= {f"{name}.{key}": value for key, value in block.state_dict().items()}
    # what no block owns: a bare pair, whose order nothing proves, and a number that is no weight
    state |= {f"head.{key}": value for key, value in nn.Sequential(nn.Conv2d(6, 2, 1), nn.BatchNorm2d(2)).state_dict().items()}
    state["anchors"] = torch.full((2, 2), float("inf"))
    return state


def test_every_block_is_fused_by_its_own_family(tmp_path: Path) -> None:
    state = mixed()
    torch.save({"state_dict": state}, tmp_path / "mixed.pth")
    found = repdeploy.convert(tmp_path / "mixed.pth", output=tmp_path / "b.repdeploy").manifest
    assert {block.name: block.family for block in found.blocks} == {name: family for name, (family, _) in BLOCKS.items()}
    assert all(check.passed for check in found.verdict.checks)
    assert len(found.verdict.checks) == len(BLOCKS)
    again = repdeploy.verify(tmp_path / "b.repdeploy", against=tmp_path / "mixed.pth")
    assert again.passed
    assert {check.subject for check in again.checks if check.gate == "algebra"} == set(BLOCKS)
    whole = load_file(tmp_path / "b.repdeploy" / "weights.safetensors")
    for name, (family, block) in BLOCKS.items():
        torch.save(block.state_dict(), tmp_path / f"{name}.pth")
        repdeploy.convert(tmp_path / f"{name}.pth", family=family, output=tmp_path / f"{name}.repdeploy")
        alone = load_file(tmp_path / f"{name}.repdeploy" / "weights.safetensors")
        assert all(torch.equal(whole[f"{name}.{key}"], value) for key, value in alone.items()), name
    untouched = {key for key in state if key.startswith("head.") or key == "anchors"}
    assert untouched <= set(whole)
    assert all(torch.equal(whole[key], state[key]) for key in untouched)


def test_a_named_family_leaves_the_others_alone_and_says_so(tmp_path: Path) -> None:
    torch.save(mixed(), tmp_path / "mixed.pth")
    found = repdeploy.convert(tmp_path / "mixed.pth", family="dbb", output=tmp_path / "b.repdeploy").manifest
    assert [block.name for block in found.blocks] == ["neck.b"]
    assert any("blocks of acnet, mobileone, orepa" in note and "leave --family out" in note for note in found.notes)
    assert "neck.a.square_conv.weight" in load_file(tmp_path / "b.repdeploy" / "weights.safetensors")


def test_one_block_that_needs_a_fact_stops_the_whole_file(tmp_path: Path) -> None:
    """RepGhost without its norm: nothing tells whether the input is added, and a guess would change the result."""
    state = {key: value for key, value in mixed().items() if ".fusion_bn." not in key}
    torch.save(state, tmp_path / "mixed.pth")
    with pytest.raises(InputError, match=r"neck\.h: its keys do not tell") as refused:
        repdeploy.convert(tmp_path / "mixed.pth", output=tmp_path / "b.repdeploy")
    assert "--set fusion=identity or --set fusion=none" in refused.value.hint
    assert not (tmp_path / "b.repdeploy").exists()
    settled = repdeploy.convert(tmp_path / "mixed.pth", output=tmp_path / "b.repdeploy", set=["neck.h.fusion=none"])
    assert settled.manifest.verdict.passed
