"""Files a bundle is made of: streamed weights, references, manifest, atomic replacement."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import repdeploy
from repdeploy.bundle import Bundle, check_target, new_bundle, newest, replacing, save_references
from repdeploy.errors import InputError, UsageError
from repdeploy.measurements import Interval, Timing
from repdeploy.pipeline import stem
from repdeploy.records import Manifest, manifest_from_json, plain, to_json
from repdeploy.weights_file import WeightsWriter
from tests.conftest import sha256, tree
from tests.networks import repvgg, save


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    folder = tmp_path / "made"
    folder.mkdir()
    repdeploy.convert(save(repvgg(), folder / "a.pth"), output=folder / "a.repdeploy")
    return Bundle(folder / "a.repdeploy").manifest


def test_streamed_weights_are_an_ordinary_safetensors_file(tmp_path: Path) -> None:
    table = {
        "a": torch.arange(6.0).reshape(2, 3),
        "half": torch.ones(3, dtype=torch.float16),
        "count": torch.tensor(5),
        "empty": torch.zeros(0, 2),
        "turned": torch.arange(6.0).reshape(2, 3).t(),
    }
    with WeightsWriter(tmp_path / "w.safetensors", {k: (tuple(v.shape), v.dtype) for k, v in table.items()}) as writer:
        for key, value in table.items():
            writer.write(key, value)
    assert writer.sha256 == sha256(tmp_path / "w.safetensors")
    loaded = load_file(tmp_path / "w.safetensors")
    assert set(loaded) == set(table)
    for key, value in table.items():
        assert loaded[key].dtype == value.dtype
        assert torch.equal(loaded[key], value)


def test_the_writer_refuses_what_was_not_announced(tmp_path: Path) -> None:
    announced = {"a": ((2,), torch.float32), "b": ((2,), torch.float32)}
    for key, value in (("b", torch.ones(2)), ("a", torch.ones(3)), ("a", torch.ones(2, dtype=torch.float64))):
        with pytest.raises(ValueError, match="expected a"), WeightsWriter(tmp_path / "w", announced) as writer:
            writer.write(key, value)
    with pytest.raises(ValueError, match="b was announced"), WeightsWriter(tmp_path / "w", announced) as writer:
        writer.write("a", torch.ones(2))


def test_a_full_disk_is_a_usage_error() -> None:
    with (
        pytest.raises(UsageError, match="cannot be written"),
        WeightsWriter(Path("/dev/full"), {"a": ((1 << 20,), torch.float32)}) as writer,
    ):
        writer.write("a", torch.ones(1 << 20))


def test_a_manifest_reads_back_as_it_was_written(manifest: Manifest) -> None:
    again = manifest_from_json(to_json(manifest))
    assert again == manifest
    assert json.loads(to_json(manifest))["schema"] == "repdeploy.manifest/1"


def test_a_manifest_names_no_machine_path(manifest: Manifest, tmp_path: Path) -> None:
    assert str(tmp_path) not in to_json(manifest)
    assert manifest.source.file == "a.pth"
    assert manifest.command == "repdeploy convert a.pth"


def test_every_deploy_key_says_where_it_came_from(manifest: Manifest) -> None:
    block = next(block for block in manifest.blocks if block.name == "stage2.1")
    assert block.deploy_keys == ("stage2.1.rbr_reparam.weight", "stage2.1.rbr_reparam.bias")
    assert "stage2.1.rbr_identity.running_var" in block.source_keys
    assert block.residual is not None
    assert block.residual < 1e-12


def test_another_schema_is_refused(manifest: Manifest) -> None:
    with pytest.raises(ValueError, match="expected schema"):
        manifest_from_json(to_json(dataclasses.replace(manifest, schema="repdeploy.manifest/99")))


def test_references_are_written_byte_for_byte_and_read_back(tmp_path: Path) -> None:
    x, y = np.ones((3, 1, 4, 5), np.float32), np.ones((3, 2))
    for name in ("a.npz", "b.npz"):
        save_references(tmp_path / name, {(1, 4, 5): (x, y), (1, 8, 8): (np.zeros((1, 1, 8, 8), np.float32), np.ones((1, 2)))})
    assert sha256(tmp_path / "a.npz") == sha256(tmp_path / "b.npz")
    with np.load(tmp_path / "a.npz") as content:
        assert sorted(content) == ["input", "input_1x8x8", "output", "output_1x8x8"]
    assert tree(tmp_path) == ["a.npz", "b.npz"]


def test_references_have_a_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("repdeploy.bundle.MAX_REFERENCE_BYTES", 2 * (80 + 16))
    save_references(tmp_path / "a.npz", {(1, 4, 5): (np.ones((9, 1, 4, 5), np.float32), np.ones((9, 2)))})
    with np.load(tmp_path / "a.npz") as content:
        assert content["input"].shape[0] == content["output"].shape[0] == 2


def test_nothing_half_written_stays_behind(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), new_bundle(tmp_path / "b.repdeploy") as folder:
        (folder / "weights").write_text("x")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file") as temporary:
        temporary.write_text("x")
        raise ZeroDivisionError
    assert tree(tmp_path) == []


def test_a_bundle_is_replaced_at_once(tmp_path: Path) -> None:
    target = tmp_path / "b.repdeploy"
    for content in ("old", "new"):
        with new_bundle(target) as folder:
            (folder / content).write_text(content)
    assert tree(tmp_path) == ["b.repdeploy", "b.repdeploy/new"]
    assert target.stat().st_mode & 0o777 == 0o777 & ~_umask()


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_targets_that_are_no_bundle_are_left_alone(tmp_path: Path) -> None:
    assert check_target(tmp_path / "new", force=False) is None
    (tmp_path / "empty").mkdir()
    assert check_target(tmp_path / "empty", force=False) is None
    (tmp_path / "file").write_text("x")
    for name in ("file", "."):
        with pytest.raises(UsageError, match="is no bundle"):
            check_target(tmp_path / name, force=True)


def test_the_newest_bundle_is_the_one_written_last(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no bundle in this folder"):
        newest(tmp_path)
    for seed, name in enumerate(("b", "a")):
        repdeploy.convert(save(repvgg(seed), tmp_path / f"{name}.pth"), output=tmp_path / f"{name}.repdeploy", gates="blocks")
    assert newest(tmp_path).name == "a.repdeploy"


def test_a_damaged_reference_file_is_noticed(tmp_path: Path) -> None:
    repdeploy.convert(save(repvgg(), tmp_path / "a.pth"), output=tmp_path / "a.repdeploy")
    (tmp_path / "a.repdeploy" / "references.npz").write_bytes(b"nothing")
    with pytest.raises(InputError, match="vouches"):
        Bundle(tmp_path / "a.repdeploy").references()


@pytest.mark.parametrize(
    ("name", "wanted"), [("best.pth.tar", "best"), ("a.b.pth", "a.b"), ("model.safetensors", "model"), ("x", "x")]
)
def test_bundles_are_named_after_their_checkpoint(name: str, wanted: str) -> None:
    assert stem(Path("somewhere") / name) == wanted


def test_records_write_what_json_can_hold() -> None:
    timing = Timing("deploy", "torch", "cpu", "float32", 2, 4, (4, 3, 8, 8), (0.1, 0.3, 0.2), 1, True)
    written = plain(timing)
    assert written["median"] == 0.2
    assert written["images_per_second"] == pytest.approx(20)
    assert plain({"a": float("inf"), "b": float("nan"), "c": Path("x")}) == {"a": "inf", "b": "nan", "c": "x"}
    assert Interval(1.5, 1.2, 1.8).differs
    assert not Interval(1.005, 1.001, 1.009).differs
    assert not Interval(1.5, 0.9, 2.0).differs


@pytest.mark.parametrize(("flag", "value"), [("gates", "foo"), ("dtype", "int8"), ("weights", "best")])
def test_python_checks_what_the_command_line_checks(flag: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--{flag} {value}: expected"):
        repdeploy.convert(save(repvgg(), tmp_path / "a.pth"), **{flag: value})  # type: ignore[arg-type]


def test_one_setting_may_be_a_string(tmp_path: Path) -> None:
    found = repdeploy.inspect(save(repvgg(), tmp_path / "a.pth"), set="eps=1e-3")
    assert [fact.value for fact in found.facts if fact.name == "eps"] == ["0.001"]
