"""What a target machine with TensorRT is given. The engine itself needs NVIDIA's library and a GPU."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

import repdeploy
from repdeploy.exporters.tensorrt_engine import trtexec_line, write_build_script
from tests.conftest import REFERENCE
from tests.networks import repvgg, save

LISTINGS = REFERENCE.parent / "tensorrt"


def test_the_build_script_is_python_and_stands_alone(tmp_path: Path) -> None:
    path = write_build_script(tmp_path, "model.fp32.onnx", {"input": (3, 224, 224)}, (1, 4, 16), "fp32")
    text = path.read_text()
    tree = ast.parse(text)
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported == {"sys", "pathlib", "numpy", "tensorrt", "cuda"}
    assert "@" not in text.replace("@staticmethod", "")
    assert "MIN_BATCH, OPT_BATCH, MAX_BATCH = 1, 4, 16" in text
    assert len(text.splitlines()) <= 75


def test_every_tensorrt_name_exists_in_both_majors(tmp_path: Path) -> None:
    """Names only: that the calls give right numbers can be seen on a machine with TensorRT alone."""
    if not LISTINGS.is_dir():
        pytest.skip("the listings of the TensorRT bindings (shared/tensorrt) are not beside this checkout")
    tree = ast.parse(write_build_script(tmp_path, "m.onnx", {"input": (3, 8, 8)}, (1, 2, 3), "fp32").read_text())
    chains = set()
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id == "trt" and parts:
            chains.add(tuple(reversed(parts)))
    owners = {
        "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
        "profile": "IOptimizationProfile", "context": "IExecutionContext",
    }  # fmt: skip
    methods = {
        (owners[node.value.id], node.attr)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in owners
    }
    assert len(chains) >= 8
    assert len(methods) >= 12
    for name in ("api-10.14.json", "api-11.4.json"):
        classes = json.loads((LISTINGS / name).read_text())["classes"]
        for chain in (chain for chain in chains if chain[0] != "__version__"):
            assert chain[0] in classes, (name, chain)
            assert len(chain) == 1 or chain[1] in classes[chain[0]], (name, chain)
        for owner, method in methods:
            assert method in classes[owner], (name, owner, method)


def test_the_trtexec_line_is_strongly_typed() -> None:
    line = trtexec_line("m.onnx", {"input": (3, 8, 9)}, (1, 2, 3))
    assert "--minShapes=input:1x3x8x9 --optShapes=input:2x3x8x9 --maxShapes=input:3x3x8x9 --stronglyTyped --noTF32" in line


def test_the_script_finds_its_references_in_the_bundle(tmp_path: Path) -> None:
    """The array it will compare with is there, whichever image size the export was for."""
    import numpy as np

    repdeploy.convert(save(repvgg(), tmp_path / "a.pth"), output=tmp_path / "a.repdeploy")
    repdeploy.export(tmp_path / "a.repdeploy", trt=True, input_shape="1x3x96x64")
    text = (tmp_path / "a.repdeploy" / "build_engine.py").read_text()
    assert "(3, 96, 64)" in text
    with np.load(tmp_path / "a.repdeploy" / "references.npz") as references:
        assert [key for key in references if key.startswith("input") and references[key].shape[1:] == (3, 96, 64)]
