"""Every command, as a user types it."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from sample_models.samples import SAMPLES
from tests.cli.conftest import CommandLine, InProcess
from tests.conftest import sha256, tree
from tests.networks import blocks_inside_a_detector, repvgg, save


def test_the_three_commands_in_one_folder(repdeploy: CommandLine, ckpt: Path, tmp_path: Path) -> None:
    """As design section 1 has them, on a machine without TensorRT or CUDA."""
    before = sha256(ckpt)
    converted = repdeploy("convert", "ckpt.pth", "--family", "repvgg", "--input-shape", "1x3x65x65")
    assert converted.status == 0, converted.stderr
    assert "verified, self-consistent" in converted.stdout
    exported = repdeploy("export", "--trt")
    assert exported.status in (0, 5), exported.stderr
    assert "taking the newest bundle here: ckpt.repdeploy" in exported.stderr
    bundle = tmp_path / "ckpt.repdeploy"
    assert {"model.fp32.onnx", "build_engine.py", "manifest.json", "references.npz", "weights.safetensors"} <= set(tree(bundle))
    assert "trtexec --onnx=model.fp32.onnx" in exported.stdout
    if exported.status == 5:
        assert "TensorRT" in exported.stderr
        assert "python build_engine.py" in exported.stderr
    benched = repdeploy("bench", "--device", "cuda", "--seconds", "0.1")
    assert benched.status in (0, 5), benched.stderr
    if benched.status == 5:
        assert "--device cpu" in benched.stderr
    assert sha256(ckpt) == before
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt.pth", "ckpt.repdeploy"}


def test_bench_on_the_cpu_fills_and_merges_rows(repdeploy: CommandLine, ckpt: Path, tmp_path: Path) -> None:
    assert repdeploy("convert", ckpt, "--input-shape", "1x3x65x65").status == 0
    answer = repdeploy("bench", "--batch", "1", "--seconds", "0.2", "--latency-only", "--json")
    assert answer.status == 0, answer.stderr
    document = answer.json
    assert document["schema"] == "repdeploy.bench/2"
    ours = {("torch", 1), ("onnxruntime", 1)}
    assert ours <= {(row["runtime"], row["batch"]) for row in document["rows"]}
    document["rows"] = [row for row in document["rows"] if not row["missing"]]
    for row in document["rows"]:
        assert [timing["network"] for timing in row["timings"]] == ["training-time", "deploy"]
        assert all(len(timing["seconds"]) >= 12 and timing["precision"] == "float32" for timing in row["timings"])
        assert row["speedup"]["low"] <= row["speedup"]["ratio"] <= row["speedup"]["high"]
    assert repdeploy("bench", "--batch", "2", "--seconds", "0.1", "--runtime", "torch", "--latency-only").status == 0
    rows = json.loads((tmp_path / "ckpt.repdeploy" / "bench.json").read_text())["rows"]
    assert {(row["runtime"], row["batch"]) for row in rows} >= {*ours, ("torch", 2)}


def test_bench_of_an_onnx_file_alone(repdeploy: CommandLine, ckpt: Path, tmp_path: Path) -> None:
    repdeploy("convert", ckpt, "--input-shape", "1x3x65x65")
    assert repdeploy("export", "-o", tmp_path / "alone.onnx").status == 0
    answer = repdeploy("bench", "alone.onnx", "--batch", "1", "--seconds", "0.1", "--latency-only", "--json")
    assert answer.status == 0, answer.stderr
    measured = {(row["runtime"], row["timings"][0]["network"]) for row in answer.json["rows"] if not row["missing"]}
    assert measured >= {("torch", "file"), ("onnxruntime", "file")}


def test_inspect_executes_nothing_and_says_what_is_there(repdeploy: CommandLine, ckpt: Path) -> None:
    answer = repdeploy("inspect", ckpt, "--json")
    assert answer.status == 0, answer.stderr
    found = answer.json
    assert found["schema"] == "repdeploy.inspect/1"
    assert found["family"] == "repvgg"
    assert len(found["blocks"]) == 6
    assert found["parameters_after"] < found["parameters_before"]
    assert "3x3-BN + 1x1-BN + BN" in repdeploy("inspect", ckpt).stdout


def test_inspect_compares_branches_when_asked(quick: InProcess, ckpt: Path) -> None:
    assert quick("inspect", ckpt, "--json").json["branches"] == []
    (first, *_) = quick("inspect", ckpt, "--branches", "--json").json["branches"]
    assert (first["name"], [branch["formula"] for branch in first["branches"]]) == ("stage0", ["3x3-BN", "1x1-BN"])
    table = quick("inspect", ckpt, "--branches").stdout
    assert "branch of all blocks" in table
    assert "output channels have a fused kernel of zero" in table


def test_a_norm_that_no_block_takes_in_is_listed_and_folds_at_export(quick: InProcess, tmp_path: Path) -> None:
    """RepLKNet's last norm stands in front of the head's pooling: the graph's squeezer moves it into the linear layer."""
    sample = SAMPLES["replknet"].checkpoint("replknet")
    said = "stays a batch norm: norm (it follows a residual sum, in front of the head's pooling)"
    assert said in quick("convert", sample, "-o", "b.repdeploy", "--input-shape", "1x1x16x16").stdout
    for options, norms in ((("--no-fold",), 1), ((), 0)):
        answer = quick("export", "b.repdeploy", *options)
        assert answer.status == 0, answer.stderr
        assert (said in answer.stdout) == bool(norms)
        kinds = [node.op_type for node in onnx.load(tmp_path / "b.repdeploy" / "model.fp32.onnx").graph.node]
        assert kinds.count("BatchNormalization") == norms
    assert "model.fp32.onnx was current already" in quick("export", "b.repdeploy").stdout
    assert quick("verify", "b.repdeploy").status == 0


def test_a_long_formula_stands_below_its_table_once(quick: InProcess) -> None:
    answer = quick("inspect", SAMPLES["orepa"].checkpoint("orepa")).stdout
    assert answer.count("DW3x3-1x1-SCALE") == 1
    assert "B = (3x3-SCALE + " in answer


def test_a_second_conversion_keeps_what_was_exported(repdeploy: CommandLine, ckpt: Path, tmp_path: Path) -> None:
    repdeploy("convert", ckpt, "--input-shape", "1x3x65x65")
    repdeploy("export")
    onnx_file = tmp_path / "ckpt.repdeploy" / "model.fp32.onnx"
    before = sha256(onnx_file)
    assert repdeploy("convert", ckpt, "--input-shape", "1x3x65x65").status == 0
    assert sha256(onnx_file) == before
    again = repdeploy("export")
    assert "model.fp32.onnx was current already" in again.stdout
    assert repdeploy("verify").status == 0


def test_exporting_twice_gives_the_same_bytes_and_no_local_path(repdeploy: CommandLine, ckpt: Path, tmp_path: Path) -> None:
    repdeploy("convert", ckpt, "--input-shape", "1x3x65x65")
    for name in ("a.onnx", "b.onnx"):
        assert repdeploy("export", "-o", tmp_path / name).status == 0
    content = (tmp_path / "a.onnx").read_bytes()
    assert content == (tmp_path / "b.onnx").read_bytes()
    for trace in (str(tmp_path).encode(), b"repdeploy/", b".py", b"stack_trace", b"site-packages"):
        assert trace not in content
    model = onnx.load(tmp_path / "a.onnx")
    properties = {item.key: item.value for item in model.metadata_props}
    assert properties["repdeploy.source_sha256"] == sha256(ckpt)
    assert "stage1.0.rbr_reparam" in {node.name for node in model.graph.node}
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == 6
    assert "BatchNormalization" not in kinds


def test_a_fixed_batch_and_another_size(repdeploy: CommandLine, ckpt: Path, tmp_path: Path) -> None:
    repdeploy("convert", ckpt)
    answer = repdeploy("export", "--input-shape", "3x3x96x64", "--dynamic", "none", "--json")
    assert answer.status == 0, answer.stderr
    assert answer.json["artifacts"][0]["input_shape"] == [3, 3, 96, 64]
    model = onnx.load(tmp_path / "ckpt.repdeploy" / "model.fp32.onnx")
    assert [dim.dim_value for dim in model.graph.input[0].type.tensor_type.shape.dim] == [3, 3, 96, 64]
    assert repdeploy("verify").status == 0


def test_verify_notices_every_change(repdeploy: CommandLine, ckpt: Path, tmp_path: Path) -> None:
    repdeploy("convert", ckpt, "--input-shape", "1x3x65x65")
    repdeploy("export")
    bundle = tmp_path / "ckpt.repdeploy"
    assert repdeploy("verify", bundle, "--against", ckpt).status == 0
    changed = bytearray((bundle / "model.fp32.onnx").read_bytes())
    changed[-100] ^= 1
    (bundle / "model.fp32.onnx").write_bytes(bytes(changed))
    answer = repdeploy("verify")
    assert answer.status == 4
    assert "model.fp32.onnx: the file has changed since it was made" in answer.stdout
    weights = bytearray((bundle / "weights.safetensors").read_bytes())
    weights[-1] ^= 1
    (bundle / "weights.safetensors").write_bytes(bytes(weights))
    answer = repdeploy("verify")
    assert answer.status == 4
    assert "vouches" in answer.stdout


def test_verify_compares_any_two_artifacts(repdeploy: CommandLine, ckpt: Path, tmp_path: Path) -> None:
    repdeploy("convert", ckpt, "--input-shape", "1x3x65x65")
    repdeploy("export", "-o", tmp_path / "a.onnx")
    assert repdeploy("verify", "ckpt.repdeploy", "a.onnx").status == 0
    other = save(repvgg(seed=9, groups=2), tmp_path / "other.pth")
    repdeploy("convert", other, "--input-shape", "1x3x65x65")
    assert repdeploy("verify", "other.repdeploy", "a.onnx").status == 4


def test_an_expectation_anchors_the_verdict_and_a_wrong_fact_fails_it(
    repdeploy: CommandLine, ckpt: Path, tmp_path: Path
) -> None:
    x = torch.randn(3, 3, 67, 65)
    with torch.no_grad():
        np.savez(tmp_path / "expect.npz", input=x.numpy(), output=repvgg(groups=2)(x).numpy())
    anchored = repdeploy("convert", ckpt, "--expect", "expect.npz")
    assert anchored.status == 0, anchored.stderr
    assert "verified, anchored" in anchored.stdout
    wrong = repdeploy("convert", ckpt, "--expect", "expect.npz", "--set", "eps=0.01", "-o", "wrong.repdeploy")
    assert wrong.status == 4
    assert "gate 'anchor'" in wrong.stderr
    assert not (tmp_path / "wrong.repdeploy").exists()
    kept = repdeploy("convert", ckpt, "--expect", "expect.npz", "--set", "eps=0.01", "-o", "wrong.repdeploy", "--keep-failed")
    assert kept.status == 4
    failed = tmp_path / "wrong.failed.repdeploy"
    assert (failed / "manifest.json").exists()
    assert "taking the newest bundle here: ckpt.repdeploy" in repdeploy("verify").stderr
    assert repdeploy("verify", failed).status == 4
    for command in ("export", "bench"):
        refused = repdeploy(command, failed)
        assert refused.status == 4
        assert "failed verification" in refused.stderr


def test_blocks_of_an_unknown_network(repdeploy: CommandLine, tmp_path: Path) -> None:
    state = blocks_inside_a_detector()
    torch.save(state, tmp_path / "detector.pth")
    answer = repdeploy("convert", "detector.pth", "--json")
    assert answer.status == 0, answer.stderr
    manifest = answer.json["manifest"]
    assert "rep_vgg does not fit" in manifest["notes"][0]
    assert manifest["verdict"]["grade"] == "blocks only"
    assert "eps = 1e-05 is an assumption" in manifest["verdict"]["warnings"][0]
    assert len(manifest["blocks"]) == 6
    assert {"head.conv.weight", "head.bn.running_mean", "anchors", "mask"} <= set(manifest["copied"])
    stated = repdeploy("convert", "detector.pth", "--set", "eps=1e-3", "-o", "stated.repdeploy", "--json")
    assert stated.json["manifest"]["verdict"]["warnings"] == []
    refused = repdeploy("export", "detector.repdeploy")
    assert refused.status == 3
    assert "nothing tells how they are connected" in refused.stderr


def test_a_dry_run_writes_nothing(repdeploy: CommandLine, ckpt: Path, tmp_path: Path) -> None:
    answer = repdeploy("convert", ckpt, "--dry-run")
    assert answer.status == 0
    assert "dry run" in answer.stdout
    assert tree(tmp_path) == ["ckpt.pth"]


def test_float64_weights_and_blocks_only(repdeploy: CommandLine, ckpt: Path, tmp_path: Path) -> None:
    assert repdeploy("convert", ckpt, "--dtype", "float64", "-o", "wide.repdeploy").status == 0
    assert repdeploy("verify", "wide.repdeploy").status == 0
    answer = repdeploy("convert", ckpt, "--gates", "blocks", "--json", "-o", "blocks.repdeploy")
    assert answer.json["manifest"]["verdict"]["grade"] == "blocks only"
    assert {check["gate"] for check in answer.json["manifest"]["verdict"]["checks"]} == {"algebra"}
    assert repdeploy("export", "blocks.repdeploy", "--input-shape", "1x3x65x65").status == 0


def test_families_and_doctor(repdeploy: CommandLine) -> None:
    families = repdeploy("families", "--json")
    assert families.status == 0
    assert "repvgg" in {item["name"] for item in families.json["families"]}
    assert [item["asks"] for item in families.json["families"] if item["name"] == "repghost"] == [["fusion", "shortcut"]]
    assert "3x3-BN + 1x1-BN + BN" in repdeploy("families").stdout
    doctor = repdeploy("doctor", "--json")
    assert doctor.status == 0
    assert {"torch", "onnxruntime", "cuda"} <= {item["name"] for item in doctor.json["tools"]}


def test_help_needs_no_tensor_library() -> None:
    code = "import sys, repdeploy_cli.app; print(sorted({'torch', 'onnx', 'numpy', 'rich.table'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("command", ["inspect", "convert", "verify", "export", "bench", "families", "doctor"])
def test_every_command_has_help(repdeploy: CommandLine, command: str) -> None:
    answer = repdeploy(command, "--help")
    assert answer.status == 0
    assert "Usage: repdeploy" in answer.stdout.replace("python -m repdeploy", "repdeploy")


def test_json_is_one_document_and_progress_stays_off_stdout(repdeploy: CommandLine, ckpt: Path) -> None:
    answer = repdeploy("convert", ckpt, "--json")
    assert answer.json["schema"] == "repdeploy.convert/1"
    assert answer.stderr == ""
    assert "\x1b" not in repdeploy("families", NO_COLOR="1").stdout


def test_pruned_layers_are_listed_and_come_back_as_json(quick: InProcess) -> None:
    """What left, what that saves and what it costs."""
    sample = SAMPLES["resrep"].checkpoint("resrep")
    shown = quick("convert", sample, "-o", "b.repdeploy").stdout
    assert "stage2.block0.conv1     24    7      71%" in shown
    assert "86 channels leave the fused network" in shown
    assert "what pruning costs: the training-time outputs change by" in shown
    pruning = json.loads(quick("convert", sample, "-o", "b.repdeploy", "--json").stdout)["manifest"]["pruning"]
    assert sum(layer["before"] - layer["after"] for layer in pruning["layers"]) == 86
    assert pruning["parameters_after"] == 18_820
    assert "86 channels leave" in quick("convert", sample, "--dry-run").stdout


@pytest.mark.parametrize(("columns", "name"), [(80, "repvgg"), (120, "repvgg"), (80, "repvit"), (80, "repmlp"), (80, "resrep")])
def test_tables_fit_the_terminal(tmp_path: Path, columns: int, name: str) -> None:
    """In a real terminal (a pty): no line is longer than it, and colours are used."""
    ckpt = SAMPLES[name].checkpoint(name)
    leader, follower = pty.openpty()
    subprocess.run(["stty", "cols", str(columns), "rows", "50"], stdin=follower, check=True)
    child = subprocess.Popen(
        [sys.executable, "-m", "repdeploy", "convert", str(ckpt)],
        cwd=tmp_path,
        stdin=follower,
        stdout=follower,
        stderr=subprocess.DEVNULL,
        env={**{k: v for k, v in os.environ.items() if k != "COLUMNS"}, "TERM": "xterm-256color"},
    )
    os.close(follower)
    output = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # the other end closed
            break
        if not piece:
            break
        output += piece
    assert child.wait() == 0
    text = output.decode()
    assert "\x1b[" in text
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "").split("\n")
    assert max(len(line) for line in lines) <= columns
    assert any("verified" in line for line in lines)


def test_an_export_never_replaces_a_foreign_file(repdeploy: CommandLine, ckpt: Path, tmp_path: Path) -> None:
    repdeploy("convert", ckpt, "--input-shape", "1x3x65x65")
    before = sha256(ckpt)
    refused = repdeploy("export", "-o", ckpt)
    assert refused.status == 2
    assert "expected a name that ends in .onnx" in refused.stderr
    assert sha256(ckpt) == before
    assert repdeploy("export", "-o", "nowhere/a.onnx").status == 2
    assert repdeploy("export", "-o", "a.onnx").status == 0
    assert repdeploy("export", "-o", "a.onnx").status == 0


def test_a_kept_artifact_keeps_its_reference(repdeploy: CommandLine, ckpt: Path) -> None:
    repdeploy("convert", ckpt, "--input-shape", "1x3x65x65")
    repdeploy("export", "--input-shape", "1x3x40x40")
    assert repdeploy("convert", ckpt, "--input-shape", "1x3x65x65").status == 0
    answer = repdeploy("verify", "--json")
    assert answer.status == 0
    assert answer.json["skipped"] == []
    assert sum("model.fp32.onnx" in check["subject"] for check in answer.json["checks"]) == 3


def test_two_exports_at_once_leave_a_whole_bundle(repdeploy: CommandLine, ckpt: Path, tmp_path: Path) -> None:
    repdeploy("convert", ckpt, "--input-shape", "1x3x65x65")
    command = [sys.executable, "-m", "repdeploy", "export", "ckpt.repdeploy", "--input-shape"]
    pair = [
        subprocess.Popen([*command, shape], cwd=tmp_path, stdout=subprocess.DEVNULL) for shape in ("1x3x48x48", "1x3x40x40")
    ]
    assert [child.wait() for child in pair] == [0, 0]
    assert repdeploy("verify").status == 0


def test_ctrl_c_leaves_nothing_behind(ckpt: Path, tmp_path: Path) -> None:
    """At several moments of an export, the exporter's own error handling included."""
    CommandLine(tmp_path)("convert", ckpt, "--input-shape", "1x3x65x65")
    before = tree(tmp_path)
    for seconds in (0.3, 2.4, 3.0):
        child = subprocess.Popen(
            [sys.executable, "-m", "repdeploy", "export", "-o", "a.onnx"],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(seconds)
        child.send_signal(signal.SIGINT)
        _, stderr = child.communicate()
        if child.returncode == 0:  # it was faster
            (tmp_path / "a.onnx").unlink()
        else:
            assert child.returncode in (130, -signal.SIGINT), stderr
            assert seconds < 1 or "Traceback" not in stderr
        assert tree(tmp_path) == before


def test_a_reader_that_leaves_and_a_full_disk(ckpt: Path, tmp_path: Path) -> None:
    command = f"{sys.executable} -m repdeploy inspect {ckpt}"
    for redirection, status in (("| head -1; exit ${PIPESTATUS[0]}", (0, 141)), ("> /dev/full", (2,)), (">&-", (0,))):
        run = subprocess.run(["bash", "-c", f"{command} {redirection}"], capture_output=True, text=True, check=False)
        assert run.returncode in status, (redirection, run)
        assert "Traceback" not in run.stderr


def test_a_failure_is_a_json_document_too(repdeploy: CommandLine, tmp_path: Path) -> None:
    answer = repdeploy("convert", "missing.pth", "--json")
    assert answer.status == 2
    assert answer.json["schema"] == "repdeploy.error/1"
    assert answer.json["status"] == 2


@pytest.mark.parametrize(
    "arguments",
    [["a.repdeploy", "b.onnx", "--against", "c.pth"], ["ckpt.repdeploy", "--input-shape", "1x3x65x65"], ["ckpt.pth"]],
)
def test_verify_ignores_nothing(repdeploy: CommandLine, ckpt: Path, arguments: list[str]) -> None:
    repdeploy("convert", ckpt, "--gates", "blocks")
    answer = repdeploy("verify", *arguments)
    assert answer.status == 2, answer
    assert "Traceback" not in answer.stderr


def test_without_arguments_the_help_is_shown(repdeploy: CommandLine) -> None:
    assert "Commands:" in repdeploy().stdout


def test_recorded_images_set_the_exported_size(repdeploy: CommandLine, ckpt: Path, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 67, 71)
    with torch.no_grad():
        np.savez(tmp_path / "expect.npz", input=x.numpy(), output=repvgg(groups=2)(x).numpy())
    assert repdeploy("convert", ckpt, "--expect", "expect.npz", "--json").json["manifest"]["input_shape"] == [1, 3, 67, 71]
