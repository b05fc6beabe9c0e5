"""`repdeploy report`, as a user types it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from repdeploy.bundle import BENCH, write_text
from repdeploy.records import to_json
from tests import measured
from tests.cli.conftest import InProcess
from tests.conftest import sha256, tree
from tests.networks import repvgg, save

BOTH_FORMS = """
import sys
from repdeploy_cli.app import run
for arguments in (["report", "-o", "page.html"], ["report", "--markdown", "-o", "page.md"]):
    assert run(arguments) == 0
print(sorted({"torch", "onnx", "onnxruntime", "openvino", "tensorrt"} & set(sys.modules)))
"""


def test_report_writes_one_page_and_says_where(quick: InProcess, ckpt: Path, tmp_path: Path) -> None:
    assert quick("convert", ckpt, "--input-shape", "1x3x65x65", "-q").status == 0
    before = tree(tmp_path)
    answer = quick("report")
    assert answer.status == 0, answer.stderr
    assert answer.stdout == (
        "wrote ckpt.repdeploy/report.html\nnothing was measured yet: repdeploy bench fills the page's second half\n"
    )
    assert "taking the newest bundle here: ckpt.repdeploy" in answer.stderr
    assert tree(tmp_path) == sorted([*before, "ckpt.repdeploy/report.html"])

    document = quick("report", "--json").json
    assert document == {
        "schema": "repdeploy.report/1", "bundle": "ckpt.repdeploy", "form": "html", "file": "ckpt.repdeploy/report.html",
        "measured": False, "text": "",
    }  # fmt: skip
    assert quick("verify", "ckpt.repdeploy", "-q").status == 0  # the page is no artifact, and disturbs none

    assert quick("report", "ckpt.repdeploy", "-o", "elsewhere.html").status == 0
    assert sha256(tmp_path / "elsewhere.html") == sha256(tmp_path / "ckpt.repdeploy" / "report.html")


def test_markdown_goes_to_stdout(quick: InProcess, ckpt: Path, tmp_path: Path) -> None:
    assert quick("convert", ckpt, "--input-shape", "1x3x65x65", "-q").status == 0
    write_text(tmp_path / "ckpt.repdeploy" / BENCH, to_json(measured.bench(12)))
    before = tree(tmp_path)
    shown = quick("report", "--markdown")
    assert shown.status == 0, shown.stderr
    assert shown.stdout.startswith("# ckpt.pth\n")
    assert "## Benchmark" in shown.stdout
    assert tree(tmp_path) == before
    assert quick("report", "--markdown", "--json").json["text"] + "\n" == shown.stdout
    assert quick("report", "--markdown", "-o", "report.md").stdout == "wrote report.md\n"
    assert (tmp_path / "report.md").read_text(encoding="utf-8") == shown.stdout


def test_a_report_needs_no_tensor_library_and_has_no_hidden_order(quick: InProcess, ckpt: Path, tmp_path: Path) -> None:
    assert quick("convert", ckpt, "--input-shape", "1x3x65x65", "-q").status == 0
    write_text(tmp_path / "ckpt.repdeploy" / BENCH, to_json(measured.bench(12)))
    run = subprocess.run(
        [sys.executable, "-c", BOTH_FORMS], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONHASHSEED": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines()[-1] == "[]"
    assert quick("report").status == 0
    assert sha256(tmp_path / "page.html") == sha256(tmp_path / "ckpt.repdeploy" / "report.html")


def test_what_cannot_be_reported_says_why(quick: InProcess, tmp_path: Path) -> None:
    assert quick("report").status == 2
    assert quick("report", tmp_path / "missing").status == 2
    save(repvgg(), tmp_path / "net.pth")
    assert quick("convert", "net.pth", "--gates", "blocks", "-q").status == 0
    unwritable = quick("report", "-o", "no/such/folder/page.html", "--markdown")
    assert unwritable.status == 2
    assert "cannot be written" in unwritable.stderr
    (tmp_path / "net.repdeploy" / BENCH).write_text("{", encoding="utf-8")
    damaged = quick("report")
    assert damaged.status == 3
    assert "is no benchmark" in damaged.stderr
    (tmp_path / "net.repdeploy" / BENCH).write_text('{"schema": "repdeploy.bench/1", "rows": []}', encoding="utf-8")
    assert "nothing was measured yet" in quick("report").stdout  # of an earlier version: to be measured again
