"""What a training step keeps and how long it takes, and what follows about blocks."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repdeploy import training_cost
from repdeploy.errors import UsageError
from repdeploy.measurements import ExtraMemory, OnlineGain, TrainStep, read_json
from repdeploy.records import plain
from repdeploy.training_cost import LEAST_STEPS, findings, kept_for_backward, loss, measured, named, usual_models
from sample_models import training_costs

TINY = {"classes": 10, "widths": (8, 8, 8, 16, 16)}
FLOAT = 4


def kept(work: Callable[[Tensor], Tensor], *apart: Tensor) -> int:
    """Of what `work` does to a map of 2 x 3 x 5 x 7 numbers, which is left out like `apart`."""
    x = torch.ones(2, 3, 5, 7, requires_grad=True)
    return kept_for_backward(lambda: work(x), (x, *apart))


def test_every_storage_counts_once() -> None:
    size = 2 * 3 * 5 * 7 * FLOAT
    assert kept(lambda x: x * 2) == 0  # a constant factor needs nothing
    assert kept(lambda x: x.exp()) == size
    assert kept(lambda x: F.relu(x.exp()) * 3) == 2 * size
    assert kept(lambda x: (lambda y: y * y + y.sin())(x.exp())) == size  # four nodes keep one map


def test_a_view_keeps_its_whole_storage() -> None:
    size = 2 * 3 * 5 * 7 * FLOAT
    assert kept(lambda x: (x * 2)[:, :1].square()) == size
    assert kept(lambda x: (x * 2)[:, :1].clone().square()) == size / 3


def test_what_the_forward_pass_drops_is_not_kept() -> None:
    def forward(x: Tensor) -> Tensor:
        x.exp().exp()
        return x.sin()

    assert kept(forward) == 0


def test_parameters_and_buffers_are_left_out() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    norm = nn.BatchNorm2d(4)
    own = (*conv.parameters(), *norm.parameters(), *norm.buffers())
    map_bytes = 2 * 4 * 5 * 7 * FLOAT
    assert kept(lambda x: conv(x), *own) == 0  # its input and its weight
    assert kept(lambda x: norm(conv(x)), *own) == map_bytes + 2 * 4 * FLOAT  # the map in front, its mean and deviation
    assert kept(lambda x: conv.weight.view(-1).square().sum() * x.sum(), *own) == 2 * FLOAT


def test_anything_can_be_trained() -> None:
    logits = torch.tensor([[0.0, 0.0], [0.0, 0.0], [3.0, 0.0]], requires_grad=True)
    expected = (2 * math.log(2) + math.log(1 + math.exp(-3))) / 3  # labels 0, 1, 0
    assert float(loss(logits).detach()) == pytest.approx(expected)
    maps = [torch.full((2, 3, 4, 4), 2.0, requires_grad=True), {"b": torch.full((1,), 3.0, requires_grad=True)}, "text"]
    assert float(loss(maps).detach()) == 4.0 + 9.0


def test_names_tell_block_and_network() -> None:
    assert named("sample_models.training_costs:orepa_resnet18") == ("resnet18", "orepa")
    assert named("nets.py:plain_seg_head") == ("seg_head", "plain")
    assert named("timm:repvgg_a0") == ("a0", "repvgg")
    assert named("timm:wide_resnet50_2") == ("wide_resnet50_2", "")
    assert named("nets:Nets.orepa") == ("orepa", "")


@pytest.fixture(scope="module")
def rows() -> tuple[TrainStep, ...]:
    models = [spec for spec in usual_models() if named(spec)[1] in ("plain", "dbb", "orepa")]
    steps = measured(models, (64, 32), 2, device="cpu", threads=1, seconds=0.0, model_arguments=TINY)
    return tuple(steps)


def test_all_networks_step_in_the_same_rounds(rows: tuple[TrainStep, ...]) -> None:
    assert [(row.side, row.block) for row in rows] == [
        (side, block) for side in (64, 32) for block in ("plain", "dbb", "orepa")
    ]
    assert {row.network for row in rows} == {"resnet18"}
    assert not any(row.missing for row in rows)
    assert {len(row.seconds) for row in rows} == {LEAST_STEPS}
    assert all(min(row.seconds) > 0 for row in rows)
    assert all(row.parameters > rows[0].parameters for row in rows if row.block != "plain")


def test_generated_kernels_cost_the_same_at_every_resolution(rows: tuple[TrainStep, ...]) -> None:
    """To the byte: what OREPA keeps beyond the plain network are kernels."""
    extra = {item.block: item for item in findings(rows) if isinstance(item, ExtraMemory)}
    orepa, dbb = extra["orepa"], extra["dbb"]
    assert orepa.sides == dbb.sides == (32, 64)
    assert orepa.extra[0] == orepa.extra[1] > 0
    assert orepa.is_flat
    assert dbb.pixels == 4
    assert dbb.exponent is not None
    assert dbb.exponent > 0.8
    assert not dbb.is_flat


def test_online_stands_beside_offline(rows: tuple[TrainStep, ...]) -> None:
    gains = [item for item in findings(rows) if isinstance(item, OnlineGain)]
    assert [item.side for item in gains] == [32, 64]
    assert all(item.faster is not None for item in gains)
    assert gains[0].break_even is not None
    assert gains[1].break_even is not None
    assert gains[1].break_even < gains[0].break_even  # larger images, fewer of them


def step(block: str, side: int, saved: int, seconds: float, missing: str = "") -> TrainStep:
    return TrainStep("net", block, "cpu", 4, side, 10, (seconds,) * 8, saved, missing=missing)


def test_findings_by_hand() -> None:
    told = (
        step("plain", 10, 100, 1.0), step("dbb", 10, 300, 4.0), step("orepa", 10, 160, 2.0),
        step("plain", 20, 400, 1.0), step("dbb", 20, 1200, 6.0), step("orepa", 20, 460, 2.0),
        step("plain", 40, 1600, 1.0), step("dbb", 40, 0, 1.0, "out of memory"), step("orepa", 40, 1660, 2.0),
    )  # fmt: skip
    found = findings(told)
    dbb, orepa = (item for item in found if isinstance(item, ExtraMemory))
    assert (dbb.sides, dbb.extra, dbb.growth, dbb.pixels, dbb.exponent) == ((10, 20), (200, 800), 4.0, 4.0, 1.0)
    assert (orepa.sides, orepa.extra, orepa.growth, orepa.exponent, orepa.is_flat) == (
        (10, 20, 40),
        (60, 60, 60),
        1.0,
        0.0,
        True,
    )
    gains = [item for item in found if isinstance(item, OnlineGain)]
    assert [(item.side, item.saved, item.break_even) for item in gains] == [(10, 0.7, 1.2), (20, 0.925, 0.3)]
    assert [item.faster.ratio for item in gains if item.faster is not None] == [2.0, 3.0]
    assert gains[0].paper_saved == (0.65, 0.75)
    assert read_json(OnlineGain, plain(gains[0])) == gains[0]
    assert read_json(ExtraMemory, plain(dbb)) == dbb


def test_one_resolution_tells_no_growth() -> None:
    extra = findings((step("plain", 10, 100, 1.0), step("dbb", 10, 300, 1.0)))[0]
    assert isinstance(extra, ExtraMemory)
    assert (extra.growth, extra.exponent, extra.is_flat) == (None, None, None)


NETS = """
import torch
from torch import nn

class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.runs = nn.Conv2d(3, 4, 3), 0

    def forward(self, x):
        return self.conv(x).mean((2, 3))

class Greedy(Plain):
    def forward(self, x):
        if x.shape[2] > 8:
            torch.empty(1 << 60)
        return super().forward(x)

class Tired(Plain):
    def forward(self, x):
        self.runs += 1
        if self.runs > 6:
            raise ValueError("enough")
        return super().forward(x)

class Frozen(Plain):
    def forward(self, x):
        return [super(Frozen, self).forward(x).detach(), 3]
"""


def test_a_network_that_fails_is_a_row_and_the_rest_go_on(tmp_path: Path) -> None:
    """Memory that is really not there, a failure in the middle, nothing to train."""
    (tmp_path / "nets.py").write_text(NETS)
    models = [f"{tmp_path}/nets.py:{name}" for name in ("Greedy", "Plain", "Tired", "Frozen")]
    small, large = (list(measured(models, (side,), 2, device="cpu", threads=1, seconds=0.0)) for side in (8, 16))
    assert [bool(row.missing) for row in small] == [False, False, True, True]
    assert [bool(row.missing) for row in large] == [True, False, True, True]
    greedy, fine, tired, frozen = large
    assert "allocate" in greedy.missing
    assert "enough" in tired.missing
    assert "training could improve" in frozen.missing
    assert greedy.seconds == tired.seconds == ()
    assert len(fine.seconds) == LEAST_STEPS
    assert tired.parameters == fine.parameters > 0


def test_a_factory_that_is_not_there_stops_everything() -> None:
    with pytest.raises(UsageError, match="training_costs has no plain_resnet19"):
        list(measured(["sample_models.training_costs:plain_resnet19"], (8,), 1, device="cpu", threads=1, seconds=0.0))


def test_without_the_sample_models_models_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_cost, "SAMPLES", "no_such_package")
    with pytest.raises(UsageError) as reason:
        usual_models()
    assert "--model" in reason.value.hint


@pytest.mark.parametrize("spec", usual_models())
def test_the_usual_models_are_there(spec: str) -> None:
    module, _, name = spec.partition(":")
    network = getattr(importlib.import_module(module), name)(**TINY)
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "parameters"), [("orepa_resnet18", 37_756_041), ("orepa_a0", 24_754_137), ("repvgg_a0", 9_108_968)]
)
def test_samples_are_as_large_as_the_repositories_networks(name: str, parameters: int) -> None:
    network: nn.Module = getattr(training_costs, name)()
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.cuda
def test_cuda_tells_the_allocators_peak() -> None:
    spec = "sample_models.training_costs:plain_resnet18"
    (row,) = measured([spec], (64,), 2, device="cuda", threads=1, seconds=0.0, model_arguments=TINY)
    assert row.allocated is not None
    assert row.allocated > row.saved > 0
