"""Recognition: which network, which blocks, which facts, from names and shapes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import repdeploy
from repdeploy.checkpoint import StoredTensor, load
from repdeploy.errors import InputError, NotRecognised, UnknownFact, UsageError
from repdeploy.facts import GEOMETRY, Facts, Setting, parse_settings, settings_of
from repdeploy.keys import Keys
from repdeploy.recognise import Recognition, arch_settings, recognise
from repdeploy.records import Match, NoMatch
from repdeploy.registry import families
from sample_models.repvgg import RepVGG
from tests.networks import blocks_inside_a_detector, repvgg, save


def ghosts(state: dict[str, torch.Tensor]) -> dict[str, StoredTensor]:
    """The shapes of a state dict without its numbers: reading one would fail the test."""

    def unread() -> torch.Tensor:
        raise AssertionError("recognition read a tensor")

    return {key: StoredTensor(tuple(value.shape), value.dtype, unread) for key, value in state.items()}


def recognised(state: dict[str, torch.Tensor], **options: Any) -> Recognition:
    return recognise(ghosts(state), families(), options.pop("facts", Facts()), **options)


OFFICIAL = [
    ("RepVGG-A0", (2, 4, 14, 1), (48, 48, 96, 192, 1280), 1, 9108968, 8309384),
    ("RepVGG-B0", (4, 6, 16, 1), (64, 64, 128, 256, 1280), 1, 15817960, 14339048),
    ("RepVGG-B1g4", (4, 6, 16, 1), (64, 128, 256, 512, 2048), 4, None, 36125416),
    ("RepVGG-B2g2", (4, 6, 16, 1), (64, 160, 320, 640, 2560), 2, None, 63956712),
]


@pytest.mark.parametrize(("name", "blocks", "widths", "groups", "before", "after"), OFFICIAL)
def test_official_variants_are_named_from_their_shapes(
    name: str, blocks: Any, widths: Any, groups: int, before: int | None, after: int, tmp_path: Path
) -> None:
    """Names and parameter counts as in the sheet; the weights are never read, so the file need not hold any."""
    with torch.device("meta"):
        state = RepVGG(blocks, widths, 1000, groups=groups).state_dict()
    found = recognised(state, arch=name, stored_name=name)
    assert found.architecture == name
    assert found.notes == ()
    counted = sum(v.numel() for k, v in state.items() if not k.endswith(("running_mean", "running_var", "num_batches_tracked")))
    assert before is None or counted == before
    fused = sum(torch.Size(slot.squeezed.weight_shape).numel() + slot.squeezed.out_channels for slot in found.slots)
    assert fused + state["linear.weight"].numel() + 1000 == after


def test_the_gate_image_is_the_smallest_with_an_interior() -> None:
    plan = recognised(dict(repvgg().state_dict())).plan
    assert plan is not None
    assert plan.gate_shape == (3, 67, 65)


def test_ten_blocks_are_counted_in_numerical_order() -> None:
    plan = recognised(dict(repvgg(blocks=(1, 12, 1, 1)).state_dict())).plan
    assert plan is not None
    assert [name for name in plan.slots if name.startswith("stage2.")] == [f"stage2.{index}" for index in range(12)]


def test_a_left_over_tensor_means_another_network() -> None:
    state, facts = dict(repvgg().state_dict()) | {"neck.weight": torch.ones(3)}, Facts()
    found = recognised(state, facts=facts)
    assert {fact.origin for fact in facts.record()} == {"default"}  # nothing of the attempt that failed
    assert found.plan is None
    assert isinstance(found.skeletons[0], NoMatch)
    assert "neck.weight" in found.skeletons[0].reason
    assert len(found.slots) == 6


def test_blocks_inside_a_detector_are_found_and_bare_pairs_left_alone() -> None:
    found = recognised(blocks_inside_a_detector())
    assert found.plan is None
    assert {slot.name.split(".")[0] for slot in found.slots} == {"backbone"}
    assert found.architecture == "6 blocks of an unknown network"


def test_a_shape_for_an_unknown_network_is_refused() -> None:
    with pytest.raises(NotRecognised, match="no use"):
        recognised(blocks_inside_a_detector(), input_shape=(3, 64, 64))
    with pytest.raises(InputError, match="only single blocks"):
        recognised(blocks_inside_a_detector(), arch="RepVGG-A0")


def test_no_match_is_a_value_with_a_reason() -> None:
    found = recognised(dict(repvgg().state_dict()))
    assert found.matches[[match.family for match in found.matches].index("repvgg")] == Match("repvgg", 6, 0)
    with pytest.raises(NotRecognised, match=r"no key ends in 'rbr_dense\.conv\.weight'"):
        recognised({"fc.weight": torch.ones(2, 2)})


def test_groups_come_from_the_channels_in_front() -> None:
    found = recognised(dict(repvgg(groups=2).state_dict()))
    assert [slot.squeezed.groups for slot in found.slots] == [1, 1, 2, 1, 2, 1]


def test_facts_are_recorded_with_their_origin(tmp_path: Path) -> None:
    path = save(repvgg(), tmp_path / "a.pth")
    found = repdeploy.inspect(path, set=["eps=1e-3", "stage3.dilation=2", "stage3.0.stride=1"])
    origins = {(fact.name, fact.value): (fact.origin, fact.scopes) for fact in found.facts}
    assert origins["eps", "0.001"][0] == "set"
    assert origins["dilation", "2"] == ("set", ("stage3.0",))
    assert origins["stride", "1"][0] in ("set", "skeleton")
    assert origins["stride", "2"][0] == "skeleton"
    again = Facts(settings_of(found.facts, GEOMETRY))
    recognise(load(path).tensors, families(), again)
    assert {(fact.name, fact.value, fact.scopes) for fact in again.record()} == {
        (fact.name, fact.value, fact.scopes) for fact in found.facts
    }


def test_the_innermost_setting_wins() -> None:
    facts = Facts([Setting("", "eps", 1.0), Setting("stage1", "eps", 2.0), Setting("stage1.0", "eps", 3.0)])
    assert facts.resolve("stage1.0", "eps", convention=0.0) == 3.0
    assert facts.resolve("stage1.1", "eps", convention=0.0) == 2.0
    assert facts.resolve("stage10.1", "eps", convention=0.0) == 1.0


def test_settings_are_read_strictly() -> None:
    assert parse_settings(["stage3.0.stride=1"], GEOMETRY) == (Setting("stage3.0", "stride", 1),)
    for text in ("eps", "=1", "eps=", "eps=-1", "eps=nan", "eps=inf", "stride=1.5", "padding=-1"):
        with pytest.raises(UsageError):
            parse_settings([text], GEOMETRY)
    with pytest.raises(UnknownFact, match="no fact is called 'stirde'"):
        parse_settings(["stirde=2"], GEOMETRY)


def test_arch_names_are_forgiving() -> None:
    assert arch_settings("repvgg_b1g4", None, families())[0] == "RepVGG-B1g4"
    assert arch_settings(None, None, families()) == (None, ())


def test_keys_are_a_tree() -> None:
    keys = Keys({"a.10.w": (1,), "a.2.w": (1,), "a.b.w": (1,), "c": ()})
    assert keys.children("a") == ("a.2", "a.10")
    assert "a.b" in keys
    assert "a.1" not in keys
