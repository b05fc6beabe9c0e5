"""The graph road as a user types it: an ONNX file in, a bundle out, and every command on it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from repdeploy.exporters.onnx_file import write_plain
from tests.cli.conftest import CommandLine, InProcess
from tests.conftest import REFERENCE, tree
from tests.networks import repvgg, save

CASES = sorted(path.parent.name for path in (REFERENCE / "graph").glob("*/meta.json"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training-time RepVGG with every layer as it was trained, its batch open."""
    path = tmp_path_factory.mktemp("graph") / "net.onnx"
    write_plain(repvgg().eval(), path, (1, 3, 65, 63))
    return path


@pytest.fixture
def net(exported: Path, tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    path.write_bytes(exported.read_bytes())
    return path


def test_every_command_on_a_graph(repdeploy: CommandLine, net: Path, tmp_path: Path) -> None:
    converted = repdeploy("convert", "net.onnx")
    assert converted.status == 0, converted.stderr
    assert "verified, anchored" in converted.stdout
    assert "BatchNormalization 13 -> 0" in converted.stdout
    bundle = tmp_path / "net.repdeploy"
    assert tree(bundle) == ["manifest.json", "model.fp32.onnx", "references.npz", "source.onnx"]
    assert (bundle / "source.onnx").read_bytes() == net.read_bytes()
    original, squeezed = (onnx.load(bundle / name) for name in ("source.onnx", "model.fp32.onnx"))
    for side in ("input", "output"):
        ports = [[item.SerializeToString() for item in getattr(model.graph, side)] for model in (original, squeezed)]
        assert ports[0] == ports[1]
    kinds = [node.op_type for node in squeezed.graph.node]
    assert kinds.count("Conv") == 6
    assert "BatchNormalization" not in kinds

    exported = repdeploy("export", "--trt")
    assert exported.status in (0, 5), exported.stderr
    assert "model.fp32.onnx was current already" in exported.stdout
    assert "SHAPES = " in (bundle / "build_engine.py").read_text()
    assert repdeploy("export", "-o", "alone.onnx").status == 0
    assert (tmp_path / "alone.onnx").read_bytes() == (bundle / "model.fp32.onnx").read_bytes()

    verified = repdeploy("verify", "--json")
    assert verified.status == 0, verified.stdout
    assert {check["subject"].split(" ")[0] for check in verified.json["checks"]} == {"source.onnx", "model.fp32.onnx"}
    again = repdeploy("verify", "--against", "net.onnx", "--seed", "3", "--json")
    assert again.status == 0, again.stdout
    assert {check["gate"] for check in again.json["checks"]} == {"algebra", "stored", "network", "rounding"}
    assert repdeploy("verify", "net.onnx", "net.repdeploy", "--input-shape", "1x3x65x63").status == 0

    benched = repdeploy("bench", "--batch", "1", "--seconds", "0.1", "-r", "onnxruntime", "--json")
    assert benched.status == 0, benched.stderr
    (row,) = benched.json["rows"]
    for part in ("timings", "memory", "profiles"):
        assert [item["network"] for item in row[part]] == ["original", "squeezed"]
    assert row["memory"][0]["live"] >= row["memory"][1]["live"] > 0


def test_the_bundle_says_what_was_done_and_is_the_same_twice(quick: InProcess, net: Path, tmp_path: Path) -> None:
    first, second = (quick("convert", net, "-o", tmp_path / name, "--json") for name in ("a.repdeploy", "b.repdeploy"))
    assert first.status == second.status == 0, first.stderr
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("a.repdeploy", "b.repdeploy")]
    assert manifests[0]["weights_sha256"] == manifests[1]["weights_sha256"]
    graph = manifests[0]["graph"]
    assert graph["flops_after"] < graph["flops_before"]
    assert graph["inputs"][0]["shape"][1:] == ["3", "65", "63"]
    assert len(manifests[0]["blocks"]) == 6
    assert all(block["residual"] <= 1e-10 and block["source_keys"] for block in manifests[0]["blocks"])
    changed = tmp_path / "a.repdeploy" / "model.fp32.onnx"
    changed.write_bytes(changed.read_bytes()[:-1] + b"x")
    assert quick("verify", tmp_path / "a.repdeploy").status == 4


def test_nothing_to_squeeze_is_no_error_and_a_dry_run_writes_nothing(quick: InProcess, net: Path, tmp_path: Path) -> None:
    dry = quick("convert", net, "--dry-run", "--explain")
    assert dry.status == 0, dry.stderr
    assert "dry run: nothing was proved or written" in dry.stdout
    assert tree(tmp_path) == ["net.onnx"]
    assert quick("convert", net).status == 0
    squeezed = tmp_path / "net.repdeploy" / "model.fp32.onnx"
    again = quick("convert", squeezed, "-o", tmp_path / "again.repdeploy")
    assert again.status == 0, again.stderr
    assert "nothing to squeeze" in again.stdout
    assert not (tmp_path / "again.repdeploy").exists()


def graph_of(path: Path, nodes: list[onnx.NodeProto], stored: dict[str, np.ndarray], opset: int = 17) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4, 9, 11])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in stored.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


def test_what_stays_is_explained_and_can_be_forced(quick: InProcess, tmp_path: Path) -> None:
    """A depthwise and a pointwise convolution become a dense kernel: nine times the operations."""
    rng = np.random.default_rng(0)
    path = graph_of(
        tmp_path / "a.onnx",
        [
            helper.make_node("Conv", ["x", "dw"], ["a"], group=4, pads=[1, 1, 1, 1], name="depthwise"),
            helper.make_node("Conv", ["a", "pw"], ["b"], name="pointwise"),
            helper.make_node("Relu", ["b"], ["c"]),
            helper.make_node("Add", ["b", "c"], ["y"], name="residual"),
        ],
        {"dw": rng.standard_normal((4, 1, 3, 3)), "pw": rng.standard_normal((16, 4, 1, 1))},
    )
    stays = quick("convert", path, "--explain")
    assert stays.status == 0, stays.stderr
    assert "nothing to squeeze" in stays.stdout
    assert "Conv stays (1x): it would grow" in stays.stdout
    assert "pointwise: " in stays.stdout
    assert "Relu" in stays.stdout
    forced = quick("convert", path, "--force-squeeze", "--json")
    assert forced.status == 0, forced.stderr
    manifest = json.loads(forced.stdout)["manifest"]
    assert dict(manifest["graph"]["operators_after"])["Conv"] == 1
    assert manifest["blocks"][0]["kernel"] == [16, 4, 3, 3]
    assert manifest["graph"]["forced"] is True
    assert quick("verify", "a.repdeploy", "--against", path).status == 0


def test_a_zero_padded_convolution_behind_a_biased_one_stays_with_the_numbers(quick: InProcess, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    path = graph_of(
        tmp_path / "a.onnx",
        [
            helper.make_node("Conv", ["x", "one", "bias"], ["a"], name="one"),
            helper.make_node("Conv", ["a", "three"], ["y"], pads=[1, 1, 1, 1], name="three"),
        ],
        {"one": rng.standard_normal((4, 4, 1, 1)), "bias": np.full(4, 0.75), "three": rng.standard_normal((4, 4, 3, 3))},
    )
    answer = quick("convert", path, "--explain")
    assert answer.status == 0, answer.stderr
    assert "0.75" in answer.stdout
    assert "outside the image" in answer.stdout


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("text", "is no ONNX file"),
        ("empty", "holds no graph"),
        ("truncated", "is no ONNX file"),
        ("opset", "uses opset 6; 9 to"),
        ("future", "uses opset 99"),
        ("external", "keeps its weights in weights.bin, which is not beside it"),
        ("outside", "outside its own folder"),
        ("operator", "not valid ONNX"),
        ("cycle", "not valid ONNX"),
    ],
)
def test_a_damaged_graph_is_refused_with_the_reason(quick: InProcess, tmp_path: Path, damage: str, said: str) -> None:
    path = tmp_path / "a.onnx"
    relu = [helper.make_node("Relu", ["x"], ["y"])]
    graph_of(path, relu, {"w": np.zeros(3)})
    model = onnx.load(path)
    if damage == "text":
        path.write_text("<html>not found</html>")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "truncated":
        graph_of(path, relu, {"w": np.ones(4000)})
        path.write_bytes(path.read_bytes()[:3000])
    elif damage in ("opset", "future"):
        model.opset_import[0].version = 6 if damage == "opset" else 99
        path.write_bytes(model.SerializeToString())
    elif damage in ("external", "outside"):
        onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
        (tmp_path / "weights.bin").unlink()
        if damage == "outside":
            path.write_bytes(path.read_bytes().replace(b"weights.bin", b"../ghts.bin"))
    elif damage == "operator":
        model.graph.node[0].op_type = "Nonsense"
        path.write_bytes(model.SerializeToString())
    else:
        model.graph.node[0].input[0] = "y"
        path.write_bytes(model.SerializeToString())
    answer = quick("convert", path)
    assert answer.status == 3, answer
    assert said in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "a.repdeploy").exists()


def test_weights_in_a_file_beside_the_graph_are_read_and_kept(quick: InProcess, net: Path, tmp_path: Path) -> None:
    onnx.save(onnx.load(net), tmp_path / "big.onnx", save_as_external_data=True, location="big.data", size_threshold=0)
    answer = quick("convert", tmp_path / "big.onnx")
    assert answer.status == 0, answer.stderr
    assert tree(tmp_path / "big.repdeploy") == ["big.data", "manifest.json", "model.fp32.onnx", "references.npz", "source.onnx"]
    assert quick("verify", tmp_path / "big.repdeploy").status == 0


@pytest.mark.parametrize(
    "flags",
    [
        ("--family", "repvgg"), ("--arch", "RepVGG-A0"), ("--set", "eps=1e-3"), ("--weights", "ema"), ("--dtype", "float64"),
        ("--model", "a:b"),
    ],
)  # fmt: skip
def test_what_is_said_about_checkpoints_is_refused_for_graphs(quick: InProcess, net: Path, flags: tuple[str, str]) -> None:
    answer = quick("convert", net, *flags)
    assert answer.status == 2
    assert f"{flags[0]} is about a checkpoint" in answer.stderr


def test_an_image_that_the_graph_does_not_take_is_refused(quick: InProcess, net: Path) -> None:
    answer = quick("convert", net, "--input-shape", "1x3x64x64")
    assert answer.status == 3
    assert "x3x65x63" in answer.stderr
    assert quick("convert", "nothing.onnx").status == 2


def test_recorded_outputs_anchor_a_graph_and_wrong_ones_do_not(quick: InProcess, net: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 65, 63)
    with torch.no_grad():
        output = repvgg().eval()(x).numpy()
    np.savez(tmp_path / "right.npz", input=x.numpy(), output=output)
    np.savez(tmp_path / "wrong.npz", input=x.numpy(), output=output + 0.1)
    right = quick("convert", net, "--expect", tmp_path / "right.npz", "--json")
    assert right.status == 0, right.stderr
    assert [check["gate"] for check in json.loads(right.stdout)["manifest"]["verdict"]["checks"]].count("anchor") == 1
    wrong = quick("convert", net, "--expect", tmp_path / "wrong.npz", "-o", tmp_path / "b.repdeploy")
    assert wrong.status == 4
    assert not (tmp_path / "b.repdeploy").exists()


OWN = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))
def number(): return 3
def broken(): raise RuntimeError("no such luck")
class Twice(Net):
    def forward(self, x):
        x = super().forward(x)
        return x, {"again": x}
def Chatty():
    print("building")
    return Net()
class Dynamic(Net):
    def forward(self, x):
        x = super().forward(x)
        return x.numpy() if x.sum() > 0 else x
"""


class Own(nn.Module):
    """The same network as in OWN."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)


def test_a_network_of_ones_own(quick: InProcess, tmp_path: Path) -> None:
    (tmp_path / "own_net.py").write_text(OWN)
    save(Own(), tmp_path / "own.pth")
    shape = ("--input-shape", "1x3x9x11")
    done = quick("convert", "own.pth", "--model", "own_net.py:Net", "--model-args", '{"width": 4}', *shape)
    assert done.status == 0, done.stderr
    assert "--model ran the code of own_net.py:Net; nothing in own.pth was executed" in done.stdout.replace("\n", " ")
    assert "verified, anchored" in done.stdout
    assert quick("verify", "--against", "own.pth").status == 2
    for model, status, said in (
        ("own_net:number", 3, "gave int, expected a torch.nn.Module"),
        ("own_net:broken", 3, "no such luck"),
        ("own_net:nothing", 2, "has no nothing"),
        ("own_net:Dynamic", 3, "cannot be exported"),
        ("nowhere.py:Net", 2, "there is no file nowhere.py"),
        ("no_such_package:Net", 2, "there is no module no_such_package"),
        ("Net", 2, "expected MODULE:FACTORY"),
    ):
        answer = quick("convert", "own.pth", "--model", model, "-o", "b.repdeploy", *shape)
        assert (answer.status, said in answer.stderr) == (status, True), (model, answer)
    for model in ("own_net:Twice", "own_net:Chatty"):
        answer = quick("convert", "own.pth", "--model", model, "-o", f"{model[8:]}.repdeploy", *shape, "--json")
        assert answer.status == 0, answer.stderr
        assert json.loads(answer.stdout)["manifest"]["verdict"]["passed"]
    wide = quick("convert", "own.pth", "--model", "own_net.py:Net", "--model-args", '{"width": 5}', *shape)
    assert wide.status == 3
    assert "conv.weight (4, 3, 3, 3) for (5, 3, 3, 3)" in wide.stderr
    assert quick("convert", "own.pth", "--model", "own_net.py:Net", "--model-args", "[1]").status == 2
    assert quick("convert", "own.pth", "--model", "own_net.py:Net", "--input-shape", "1x4x9x9").status == 3
    assert quick("convert", "own.pth", "--force-squeeze").status == 2
    assert not (tmp_path / "b.repdeploy").exists()


@pytest.mark.parametrize("case", CASES or [pytest.param("", marks=pytest.mark.skip(reason="shared/reference is not here"))])
def test_the_reference_graphs(quick: InProcess, tmp_path: Path, case: str) -> None:
    """All of them with as many convolutions as their regions, and outputs within the bound of check-graph."""
    import onnxruntime

    folder = REFERENCE / "graph" / case
    meta = json.loads((folder / "meta.json").read_text())
    answer = quick("convert", folder / "model.onnx", "-o", tmp_path / "a.repdeploy")
    assert answer.status == 0, answer.stderr
    model = tmp_path / "a.repdeploy" / "model.fp32.onnx"
    kinds = [node.op_type for node in onnx.load(model).graph.node]
    assert kinds.count("Conv") == meta["convs_after"]
    assert "BatchNormalization" not in kinds
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    got = session.run(None, {"input": np.load(folder / "input.npy")})
    with np.load(folder / "outputs.npz") as wanted:
        largest = max(float(np.abs(wanted[name]).max()) for name in wanted)
        for output, array in zip(session.get_outputs(), got, strict=True):
            assert np.abs(array - wanted[output.name]).max() <= 6 * meta["train_float32_max_abs_err"] + 1e-6 * largest
