"""Mistakes of a user: two clear lines, the exit status of the design, and nothing half-written left behind."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sample_models import resrep
from sample_models.acnet import ACBlock, Layers
from sample_models.backbones import CifarResNet, Layer, repeated
from sample_models.dbb import DBB
from sample_models.orepa import OrepaVGG
from sample_models.repghost import RepGhostModule
from sample_models.replknet import LargeKernel
from sample_models.repmlp import RepMLPNet
from sample_models.scatter import scatter
from tests.cli.conftest import CommandLine, InProcess
from tests.conftest import tree
from tests.networks import repvgg, save


def text_file(folder: Path) -> None:
    (folder / "ckpt.pth").write_text("loss 0.1\n")


def truncated(folder: Path) -> None:
    path = save(repvgg(), folder / "ckpt.pth")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


class Touch:
    def __reduce__(self) -> Any:
        return os.system, ("touch owned",)


def runs_code(folder: Path) -> None:
    torch.save({"state_dict": repvgg().state_dict(), "x": Touch()}, folder / "ckpt.pth")


def zip_bomb(folder: Path) -> None:
    with zipfile.ZipFile(folder / "ckpt.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}.")
        archive.writestr("a/data/0", bytes(300 << 20))


def with_value(value: float, key: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        model = repvgg()
        model.state_dict()[key].view(-1)[0] = value
        save(model, folder / "ckpt.pth")

    return make


def another_family(folder: Path) -> None:
    torch.save({"layer1.0.conv1.weight": torch.ones(4, 4, 3, 3), "fc.weight": torch.ones(2, 4)}, folder / "ckpt.pth")


def plain(folder: Path) -> None:
    save(repvgg(), folder / "ckpt.pth")


def plain_pickle(folder: Path) -> None:
    (folder / "ckpt.pth").write_bytes(pickle.dumps({"a": 1}))


def negative_variance(folder: Path) -> None:
    with_value(-1.0, "stage2.0.rbr_dense.bn.running_var")(folder)


def nothing(folder: Path) -> None:
    pass


def other_bundle(folder: Path) -> None:
    plain(folder)
    save(repvgg(seed=5), folder / "first.pth")
    CommandLine(folder)("convert", "first.pth", "-o", "ckpt.repdeploy", "--gates", "blocks")


def foreign_folder(folder: Path) -> None:
    plain(folder)
    (folder / "ckpt.repdeploy").mkdir()
    (folder / "ckpt.repdeploy" / "thesis.tex").write_text("precious")


def a_linear_model(folder: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), folder / "ckpt.pth")


def one_block(name: str, **changes: Any) -> Callable[[Path], None]:
    """A file with one block of a sample model."""

    def make(folder: Path) -> None:
        save(BLOCKS[name](**changes), folder / "ckpt.pth")

    return make


BLOCKS: dict[str, Callable[..., nn.Module]] = {
    "acnet": lambda: scatter(ACBlock(Layer(4, 6, 3))),
    "dbb": lambda: scatter(DBB(Layer(4, 6, 3))),
    "repghost": lambda fusion="bn": scatter(RepGhostModule(4, 6, True, fusion, False)),
    "replknet": lambda: scatter(LargeKernel(4, 7, 3, False)),
}


def grouped_orepa_vgg(folder: Path) -> None:
    state = OrepaVGG(Layer(8, 8, 3)).state_dict()
    state["rbr_dense.weight_rbr_origin"] = torch.randn(8, 4, 3, 3)
    torch.save(state, folder / "ckpt.pth")


def a_fixed_window(folder: Path) -> None:
    """A CIFAR ResNet, whose head averages over 8x8."""
    blocks = repeated((1, 1, 1), ((4, 4), (6, 6), (8, 8)))
    save(scatter(CifarResNet(Layers(), blocks, 3)), folder / "ckpt.pth")


def oblong_tiles(folder: Path) -> None:
    """RepMLPNet with tiles of 4x3 and 2x3: nothing in the file tells 12 places from 3x4."""
    save(scatter(RepMLPNet((4, 8), (1, 1), ((4, 3), (2, 3)), (2, 4), 3, patch=2)), folder / "ckpt.pth")


def square_tiles(folder: Path) -> None:
    save(scatter(RepMLPNet((4, 8), (1, 1), ((4, 4), (2, 2)), (2, 4), 3, patch=2)), folder / "ckpt.pth")


def with_compactors(folder: Path) -> None:
    model = CifarResNet(resrep.TRAINING, repeated((1, 1, 1), ((4, 4), (6, 6), (8, 8))), 3)
    save(scatter(resrep.compacted(model, resrep.inner_layers(model))), folder / "ckpt.pth")


CASES: list[tuple[str, Callable[[Path], None], list[str], int, str]] = [
    ("missing file", nothing, [], 2, "there is no file ckpt.pth"),
    ("text file", text_file, [], 3, "is a text file"),
    ("truncated zip", truncated, [], 3, "damaged zip archive"),
    ("runs code", runs_code, [], 3, "Nothing was executed"),
    ("zip bomb", zip_bomb, [], 3, "zip bomb"),
    ("plain pickle", plain_pickle, [], 3, "plain pickle"),
    ("NaN", with_value(float("nan"), "stage1.0.rbr_dense.conv.weight"), [], 3, "stage1.0.rbr_dense.conv.weight holds 1 NaN"),
    (
        "Inf",
        with_value(float("inf"), "stage2.1.rbr_identity.running_var"),
        [],
        3,
        "stage2.1.rbr_identity.running_var holds 1 Inf",
    ),
    ("NaN in the head", with_value(float("nan"), "linear.weight"), [], 3, "linear.weight holds 1 NaN"),
    ("negative variance", negative_variance, [], 3, "block stage2.0"),
    ("another family", another_family, ["--family", "repvgg"], 3, "no repvgg weights"),
    ("no family", another_family, [], 3, "no block of an installed family"),
    ("no network", a_linear_model, [], 3, "no block of an installed family"),
    ("unknown family", plain, ["--family", "repvg"], 2, "did you mean 'repvgg'"),
    ("unknown arch", plain, ["--arch", "RepVGG-Z9"], 2, "no architecture is called"),
    ("wrong arch", plain, ["--arch", "repvgg_a0"], 3, "this is not RepVGG-A0"),
    ("unknown fact", plain, ["--set", "epsilon=1"], 2, "no fact is called 'epsilon'"),
    ("fact without a value", plain, ["--set", "eps"], 2, "expected [SCOPE.]NAME=VALUE"),
    ("fact of another kind", plain, ["--set", "eps=small"], 2, "eps"),
    ("negative fact", plain, ["--set", "stride=0"], 2, "stride"),
    ("fact nowhere", plain, ["--set", "stage9.eps=1e-3"], 2, "changed nothing"),
    ("shape", plain, ["--input-shape", "224"], 2, "expected BATCHxCHANNELSxHEIGHTxWIDTH"),
    ("channels", plain, ["--input-shape", "1x4x65x65"], 3, "takes 3 channels"),
    ("more than memory", plain, ["--input-shape", "1x3x999999x999999"], 3, "do not fit into this machine's memory"),
    ("no seed", plain, ["--seed", "99999999999999999999"], 2, "expected a whole number"),
    ("no ema", plain, ["--weights", "ema"], 3, "no EMA weights"),
    ("weights", plain, ["--weights", "best"], 2, "expected model or ema"),
    ("other source", other_bundle, [], 2, "made from another source"),
    ("foreign folder", foreign_folder, ["--force"], 2, "is no bundle"),
    ("expect missing", plain, ["--expect", "no.npz"], 2, "there is no file no.npz"),
    ("expect is none", plain, ["--expect", "ckpt.pth"], 3, "input"),
    ("output below a file", plain, ["-o", "ckpt.pth/b.repdeploy"], 2, "cannot be written"),
    ("fusion not told", one_block("repghost", fusion="identity"), [], 3, "its keys do not tell"),
    ("fusion contradicts", one_block("repghost"), ["--set", "fusion=none"], 3, "contradicts its keys"),
    ("no such fusion", one_block("repghost"), ["--set", "fusion=conv"], 2, "is no value of fusion"),
    ("shortcut of one block", one_block("repghost"), ["--set", "shortcut=false"], 2, "changed nothing"),
    ("dilated dbb", one_block("dbb"), ["--set", "dilation=2"], 3, "only its first branch would dilate"),
    ("dilated acnet", one_block("acnet"), ["--set", "dilation=2"], 3, "cannot be dilated"),
    ("dilated replknet", one_block("replknet"), ["--set", "dilation=2"], 3, "not defined"),
    ("groups that do not divide", one_block("acnet"), ["--set", "groups=5"], 3, "divide"),
    ("groups against the shapes", one_block("dbb"), ["--set", "groups=2"], 3, "1 groups by its tensors"),
    ("dbb with another padding", one_block("dbb"), ["--set", "padding=0"], 3, "different heights"),
    ("grouped OREPA_VGG", grouped_orepa_vgg, [], 3, "OREPA_VGG block of 2 groups"),
    ("image below a fixed window", a_fixed_window, ["--input-shape", "1x3x16x16"], 3, "fixed window of 8x8"),
    ("image of two windows", a_fixed_window, ["--input-shape", "1x3x64x64"], 3, "linear takes 8 numbers"),
    ("no window", a_fixed_window, ["--set", "window=wide"], 2, "is no value of window"),
    ("partition not told", oblong_tiles, [], 3, "how many places a tile has (stage by stage 12, 6)"),
    ("partition left open", oblong_tiles, ["--input-shape", "1x3x24x24"], 3, "stage 0: 1x12, 2x6, 3x4, 4x3, 6x2, 12x1"),
    ("partition that does not divide", square_tiles, ["--input-shape", "1x3x18x16"], 3, "do not divide its 9x8 map"),
    ("partition of other tiles", square_tiles, ["--set", "partition=4x4"], 3, "contradicts"),
    ("no partition", square_tiles, ["--set", "partition=4"], 2, "is no value of partition"),
    ("a threshold that is no number", with_compactors, ["--set", "threshold=small"], 2, "is no value of threshold"),
    ("a negative threshold", with_compactors, ["--set", "threshold=-1"], 2, "is no value of threshold"),
    ("an endless threshold", with_compactors, ["--set", "threshold=inf"], 2, "is no value of threshold"),
    ("a threshold without compactors", plain, ["--set", "threshold=1e-5"], 2, "changed nothing"),
    ("pruning one block", one_block("dbb"), ["--prune-dead"], 3, "--prune-dead needs the network around the blocks"),
    (
        "pruning a model of one's own",
        plain,
        ["--prune-dead", "--model", "a:b"],
        2,
        "--prune-dead works on networks that are known here",
    ),
    ("unknown option", plain, ["--frobnicate"], 2, "--frobnicate"),
    ("unknown gates", plain, ["--gates", "none"], 2, "gates"),
]


@pytest.mark.parametrize(
    ("make", "options", "status", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_convert(
    make: Callable[[Path], None], options: list[str], status: int, message: str, quick: InProcess, tmp_path: Path
) -> None:
    make(tmp_path)
    before = tree(tmp_path)
    answer = quick("convert", "ckpt.pth", *options)
    assert answer.status == status, answer
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
    lines = answer.stderr.strip().split("\n")
    assert lines[0].startswith("error: ")
    assert len(lines) == 2, lines
    assert lines[1].startswith("hint: ")
    assert answer.stdout == ""
    assert tree(tmp_path) == before


def test_force_replaces_a_bundle_of_another_source(repdeploy: CommandLine, tmp_path: Path) -> None:
    other_bundle(tmp_path)
    assert repdeploy("convert", "ckpt.pth", "--force", "--gates", "blocks").status == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere, so a read-only folder proves nothing")
def test_a_read_only_folder(repdeploy: CommandLine, ckpt: Path, tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    answer = repdeploy("convert", ckpt, "-o", locked / "b.repdeploy")
    assert answer.status == 2
    assert "cannot be written" in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["export"], 2, "no bundle in this folder"),
        (["verify"], 2, "no bundle in this folder"),
        (["bench"], 2, "no bundle in this folder"),
        (["export", "nowhere"], 2, "is no bundle"),
        (["inspect", "nowhere.pth"], 2, "there is no file"),
        (["bench", "--device", "tpu"], 2, "tpu"),
        (["explode"], 2, "explode"),
    ],
)
def test_other_commands(arguments: list[str], status: int, message: str, quick: InProcess, tmp_path: Path) -> None:
    answer = quick(*arguments)
    assert answer.status == status, answer
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
    assert answer.stderr.startswith("error: ")
    assert tree(tmp_path) == []


def test_a_damaged_manifest(quick: InProcess, ckpt: Path, tmp_path: Path) -> None:
    quick("convert", ckpt, "--gates", "blocks")
    (tmp_path / "ckpt.repdeploy" / "manifest.json").write_text('{"schema": "repdeploy.manifest/1"}')
    answer = quick("export")
    assert answer.status == 3
    assert "not understood" in answer.stderr


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--input-shape", "1x3x0x9"], 2, "expected"),
        (["--input-shape", "1x1x64x64"], 3, "takes 3 channels"),
        (["--batch", "0"], 2, "batch sizes"),
        (["--runtime", "fastest"], 2, "no runtime for cpu"),
        (["--seconds", "0"], 2, "positive time"),
    ],
)
def test_bench_options(options: list[str], status: int, message: str, quick: InProcess, ckpt: Path) -> None:
    quick("convert", ckpt, "--gates", "blocks")
    answer = quick("bench", *options)
    assert answer.status == status, answer
    assert message in answer.stderr


def test_a_bug_of_ours_keeps_its_traceback(repdeploy: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import repdeploy.digest\ndef broken(*a, **k): raise ZeroDivisionError('ours')\n"
        "repdeploy.digest.Digest.result = broken\n"
    )
    save(repvgg(), tmp_path / "ckpt.pth")
    answer = repdeploy("inspect", "ckpt.pth", PYTHONPATH=str(tmp_path))
    assert answer.status == 1
    assert "Traceback" in answer.stderr
    assert "ZeroDivisionError" in answer.stderr
