"""`repdeploy bench` as a user runs it: what is measured, what is kept, what it says where something is missing or wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper

from repdeploy.benchmark import stage
from tests.cli.conftest import CommandLine, InProcess

QUICK = ("--batch", "1", "--seconds", "0.1")


@pytest.fixture
def bundle(quick: InProcess, ckpt: Path, tmp_path: Path) -> Path:
    assert quick("convert", ckpt, "--input-shape", "1x3x33x31").status == 0
    return tmp_path / "ckpt.repdeploy"


def test_a_bench_explains_itself_and_is_kept(quick: InProcess, bundle: Path) -> None:
    answer = quick("bench", *QUICK, "-r", "torch", "-r", "onnxruntime", "--json")
    assert answer.status == 0, answer.stderr
    document = answer.json
    assert document["schema"] == "repdeploy.bench/2"
    assert [(row["runtime"], row["batch"]) for row in document["rows"]] == [("torch", 1), ("onnxruntime", 1)]
    assert document["rooflines"][0]["gflops"] > 1
    assert {table["runtime"] for table in document["density"]} == {"torch", "onnxruntime"}
    assert [[cell["kernel"] for cell in table["cells"]] for table in document["density"]] == [[1, 3, 5, 7]] * 2
    for row in document["rows"]:
        before, after = row["memory"]
        assert (before["network"], after["network"]) == ("training-time", "deploy")
        assert before["live"] > after["live"] > 0
        assert before["weights"] > after["weights"] > 0
        assert after["resident"] > 0
        trained, deployed = row["profiles"]
        convolutions = [layer for layer in deployed["layers"] if layer["kind"] == "convolution"]
        assert len(convolutions) == 6
        assert all(layer["kernel"] == [3, 3] and layer["flops"] > 0 and layer["implementation"] for layer in convolutions)
        assert sum(layer["flops"] for layer in trained["layers"]) > sum(layer["flops"] for layer in deployed["layers"])
        assert deployed["share_3x3_flops"] > 0.9
    kept = json.loads((bundle / "bench.json").read_text())
    assert kept["rows"] == document["rows"]
    said = quick("bench", *QUICK, "-r", "torch", "-r", "onnxruntime", "--resume", "--layers")
    assert said.status == 0, said.stderr
    assert json.loads((bundle / "bench.json").read_text())["rows"] == document["rows"], "nothing was measured again"
    for part in ("live activations", "3x3: FLOPs", "GFLOP/s by kernel size", "at best this device reaches", "kernel that ran"):
        assert part in said.stdout


def test_a_baseline_decides_the_exit_status(quick: InProcess, bundle: Path, tmp_path: Path) -> None:
    measured = ("bench", *QUICK, "-r", "onnxruntime", "--latency-only")
    assert quick(*measured).status == 0
    text = (bundle / "bench.json").read_text()

    def baseline(factor: float) -> str:
        document = json.loads(text)
        for timing in document["rows"][0]["timings"]:
            timing["seconds"] = [factor * value for value in timing["seconds"]]
        (tmp_path / "old.json").write_text(json.dumps(document))
        return "old.json"

    slower = quick(*measured, "--baseline", baseline(0.01))
    assert slower.status == 8, slower.stderr
    assert "slower" in slower.stdout
    faster = quick(*measured, "--baseline", baseline(100), "--json")
    assert faster.status == 0, faster.stderr
    assert [item["is_slower"] for item in faster.json["baseline"]] == [False]
    before = (bundle / "bench.json").read_text()
    (tmp_path / "old.json").write_text("{}")
    broken = quick(*measured, "--baseline", "old.json")
    assert (broken.status, "is no benchmark" in broken.stderr) == (3, True)
    absent = quick(*measured, "--baseline", "absent.json")
    assert (absent.status, "there is no benchmark" in absent.stderr) == (2, True)
    assert (bundle / "bench.json").read_text() == before, "the baseline is read before anything is measured or written"


def test_strict_refuses_an_unstable_row(quick: InProcess, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "WIDE_SPREAD", 0.0)
    measured = ("bench", *QUICK, "-r", "onnxruntime", "--latency-only")
    assert quick(*measured).status == 0
    answer = quick(*measured, "--strict")
    assert answer.status == 7
    assert "too unstable" in answer.stdout


def test_a_batch_beyond_the_memory_is_a_row_that_says_so(quick: InProcess, bundle: Path) -> None:
    huge = ("bench", "-b", "1", "-b", "100000000", "--seconds", "0.1", "--latency-only", "--json")
    answer = quick(*huge)
    assert answer.status == 0, answer.stderr
    rows: list[dict[str, Any]] = [row for row in answer.json["rows"] if row["runtime"] in ("torch", "onnxruntime")]
    assert [bool(row["timings"]) for row in rows if row["batch"] == 1] == [True, True]
    for row in rows:
        if row["batch"] > 1:
            assert "a batch of 100000000 does not fit into memory" in row["missing"]
            assert row["hint"] == "give a smaller --batch"
    named = quick(*huge, "-r", "onnxruntime")
    assert named.status == 6
    assert "does not fit into memory" in named.stderr


def test_what_was_looked_for_where_there_is_no_gpu(repdeploy: CommandLine, bundle: Path) -> None:
    answer = repdeploy("bench", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert answer.status == 5, answer.stderr
    assert "nothing here runs on cuda" in answer.stderr
    for runtime in ("torch:", "onnxruntime:"):
        assert runtime in answer.stderr


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--suite", "resnet-paper"], 2, "there is repvgg-paper"),
        (["--suite", "repvgg-paper", "-b", "1", "-b", "2"], 2, "one batch size"),
        (["--suite", "repvgg-paper", "--train-step"], 2, "give one of them"),
        (["--train-step", "--side", "64"], 2, "two resolutions"),
        (["--train-step", "--model", "nowhere:net"], 2, "there is no module nowhere"),
    ],
)
def test_the_other_benchmarks_refuse(options: list[str], status: int, message: str, quick: InProcess) -> None:
    answer = quick("bench", *options)
    assert answer.status == status, answer
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_training_steps_of_ones_own_networks(repdeploy: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "def plain_stack(): return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())\n"
        "def dbb_stack(): return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.ReLU())\n"
    )
    options = ("bench", "--train-step", "--model", "nets.py:plain_stack", "--model", "nets.py:dbb_stack", "-b", "2")
    answer = repdeploy(*options, "--side", "16", "--side", "32", "--seconds", "0.2", "--json")
    assert answer.status == 0, answer.stderr
    document = answer.json
    assert document["schema"] == "repdeploy.train-step/1"
    assert [(row["block"], row["network"], row["side"]) for row in document["rows"]] == [
        ("plain", "stack", 16), ("dbb", "stack", 16), ("plain", "stack", 32), ("dbb", "stack", 32),
    ]  # fmt: skip
    assert all(row["saved"] > 0 and len(row["seconds"]) >= 6 for row in document["rows"])
    (extra,) = document["extra"]
    assert extra["exponent"] == pytest.approx(1, abs=0.2)


def test_an_onnx_file_is_measured_without_torch(repdeploy: CommandLine, bundle: Path, tmp_path: Path) -> None:
    assert repdeploy("export", bundle, "-o", "alone.onnx").status == 0
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "found = PathFinder.find_spec\n"
        "PathFinder.find_spec = lambda name, path=None, target=None: None if name == 'torch' else found(name, path, target)\n"
    )
    answer = repdeploy("bench", "alone.onnx", *QUICK, "-r", "onnxruntime", "-r", "openvino", "--json", PYTHONPATH=str(hidden))
    assert answer.status == 0, answer.stderr
    rows = answer.json["rows"]
    assert [(row["runtime"], row["timings"][0]["network"]) for row in rows] == [("onnxruntime", "file"), ("openvino", "file")]
    assert all(row["memory"][0]["resident"] > 0 and row["profiles"][0]["layers"] for row in rows)


def test_two_files_are_measured_beside_each_other(quick: InProcess, bundle: Path, tmp_path: Path) -> None:
    for name, options in (("a.onnx", ()), ("b.onnx", ("--no-fold",))):
        assert quick("export", bundle, "-o", name, *options).status == 0
    answer = quick("bench", "a.onnx", "b.onnx", *QUICK, "-r", "onnxruntime", "--latency-only", "--json")
    assert answer.status == 0, answer.stderr
    (row,) = answer.json["rows"]
    assert [timing["network"] for timing in row["timings"]] == ["a.onnx", "b.onnx"]
    assert row["speedup"]["low"] <= row["speedup"]["ratio"] <= row["speedup"]["high"]
    refused = quick("bench", bundle, "b.onnx", *QUICK)
    assert (refused.status, "is no ONNX file" in refused.stderr) == (2, True)


def test_modules_in_the_folder_are_not_run(repdeploy: CommandLine, bundle: Path, tmp_path: Path) -> None:
    """Repositories have files called like libraries."""
    for name in ("numpy", "resource", "types"):
        (tmp_path / f"{name}.py").write_text(f"open('{name} was run', 'w')\n")
    script = "import sys; sys.path.pop(0); from repdeploy_cli.app import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "bench", str(bundle), *QUICK, "-r", "onnxruntime", "--latency-only"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("*was run"))


def test_a_bundle_converted_again_does_not_get_the_old_rows(
    quick: InProcess, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = stage.bench

    def meanwhile(wanted: Any, progress: Any, on_row: Any) -> Any:
        result = measured(wanted, progress, lambda row: None)
        manifest = bundle / "manifest.json"
        manifest.write_text(manifest.read_text().replace('"value": "1e-05"', '"value": "1e-03"'))
        return result

    monkeypatch.setattr(stage, "bench", meanwhile)
    answer = quick("bench", *QUICK, "-r", "onnxruntime", "--latency-only")
    assert answer.status == 2
    assert "was converted again while it was measured" in answer.stderr
    assert not (bundle / "bench.json").exists()


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 64), (), "takes no images: its input x is 1x64"),
        ((4, 3, 9, 9), ("-b", "2"), "is fixed to a batch of 4"),
        ((1, 3, -1, -1), (), "takes images of any size"),
        ((1, 3, 9, 9), ("--suite", "repvgg-paper"), "SUBJECT is about a bundle or file"),
    ],
)
def test_files_that_cannot_be_measured_so(
    shape: tuple[int, ...], options: tuple[str, ...], message: str, quick: InProcess, tmp_path: Path
) -> None:
    value, result = (helper.make_tensor_value_info(name, 1, shape) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [value], [result])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), tmp_path / "f.onnx")
    answer = quick("bench", "f.onnx", *options)
    assert answer.status == 2, answer
    assert message in answer.stderr
