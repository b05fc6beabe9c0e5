"""Export end to end: what each option does to the file, what proves it, and what is left behind when it fails."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

import repdeploy
from repdeploy import plugins
from repdeploy.errors import BackendFailed, BackendMissing, InputError, RepDeployError, UsageError, VerificationFailed
from repdeploy.exporters import simplifying, stage
from repdeploy.exporters.interface import Case, Exporter, Missing, Source, Written
from repdeploy.exporters.judging import onnx_checks
from repdeploy.exporters.options import Normalization
from repdeploy.graph import onnx_source
from repdeploy.progress import Progress
from repdeploy.records import Artifact, Check, Export
from sample_models.samples import SAMPLES
from tests.conftest import sha256, tree
from tests.graph.onnx_graphs import Writer, kinds
from tests.networks import repvgg, save

REPOSITORY = Path(__file__).parents[2]
FLOAT = TensorProto.FLOAT
IMAGENET = "0.485,0.456,0.406,0.229,0.224,0.225"
MEAN, DEVIATION = (np.array(part, np.float32).reshape(1, 3, 1, 1) for part in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
GROUP = "repdeploy.exporters"
BUDGETS = {"fp32": 1e-4, "fp16": 1e-2}
TRACED = 17
"""An opset that the TorchScript exporter writes: four times as fast, where the exporter is not what is tested."""


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The networks here are small: one thread runs them faster than several that wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    repdeploy.convert(save(repvgg(), folder / "a.pth"), output=folder / "a.repdeploy", input_shape="1x3x33x31")
    return folder / "a.repdeploy"


@pytest.fixture
def bundle(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "a.repdeploy"))


def images(batch: int = 2, height: int = 33, width: int = 31) -> np.ndarray:
    return np.random.default_rng(batch + height).standard_normal((batch, 3, height, width)).astype(np.float32)


def trained(x: np.ndarray) -> np.ndarray:
    """What the training-time network answers."""
    with torch.no_grad():
        return repvgg().eval().double()(torch.from_numpy(x).double()).numpy()


def softmax(x: np.ndarray) -> np.ndarray:
    return torch.from_numpy(x).softmax(1).numpy()


def ran(path: Path, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {session.get_inputs()[0].name: x})
    return np.asarray(result)


def assert_near(got: np.ndarray, wanted: np.ndarray, budget: float = 1e-4) -> None:
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= budget * np.abs(wanted).max()


def only(result: Export) -> Artifact:
    (artifact,) = result.artifacts
    assert all(check.passed for check in artifact.checks)
    return artifact


def axes(path: Path) -> list[str | int]:
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    return [dim.dim_param or dim.dim_value for dim in dims]


def where(artifact: Artifact) -> list[str]:
    """At which batches and sizes it was checked."""
    return [check.subject.rpartition(", ")[2] for check in artifact.checks]


@pytest.fixture
def untouched(bundle: Path) -> Iterator[Path]:
    """A bundle in which a failed export may not change a thing."""
    before = {name: (bundle / name).read_bytes() for name in tree(bundle)}
    yield bundle
    assert {name: (bundle / name).read_bytes() for name in tree(bundle)} == before


# --- bundles of graphs ---


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32) * 0.5


def classifier(pads: int = 0, opset: int = 17, head: bool = True) -> onnx.ModelProto:
    w = Writer(opset, FLOAT)
    convolved = w.conv("x", weights(6, 3, 3, 3), weights(6), pads=[pads] * 4)
    normed = w.norm(convolved, [weights(6), weights(6), weights(6), np.full(6, 0.7, np.float32)])
    if not head:
        w.node("Relu", [normed], "y")
        return w.model({"x": ["n", 3, 12, 12]}, {"y": ["n", 6, 10 + 2 * pads, 10 + 2 * pads]})
    flat = w.node("Flatten", [w.node("GlobalAveragePool", [w.node("Relu", [normed])])])
    w.node("Gemm", [flat, weights(6, 5), weights(5)], "y")
    return w.model({"x": ["n", 3, 12, 12]}, {"y": ["n", 5]})


def graph_bundle(folder: Path, model: onnx.ModelProto) -> Path:
    onnx.save(model, folder / "g.onnx")
    repdeploy.convert(folder / "g.onnx", output=folder / "g.repdeploy")
    return folder / "g.repdeploy"


def sample_bundle(name: str, folder: Path) -> Path:
    sample = SAMPLES[name]
    repdeploy.convert(
        sample.checkpoint(name), output=folder / "s.repdeploy", set=sample.options, input_shape=(1, 1, sample.side, sample.side)
    )
    return folder / "s.repdeploy"


# --- opsets and options that contradict each other ---


@pytest.mark.parametrize("opset", [11, 13, 17, 18, 20, 22, 23])
def test_the_opset_that_was_asked_for_is_in_the_file(bundle: Path, opset: int) -> None:
    artifact = only(repdeploy.export(bundle, opset=opset))
    versions = {item.domain: item.version for item in onnx.load(bundle / artifact.file).opset_import}
    assert versions[""] == opset == artifact.opset
    assert where(artifact) == ["batch 1", "batch 2", "batch 5"]
    assert_near(ran(bundle / artifact.file, images(3)), trained(images(3)))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"opset": 10}, "opsets 11 to 23"),
        ({"opset": 24}, "opsets 11 to 23"),
        ({"opset": 18, "precision": "bf16"}, "since opset 22"),
        ({"io_dtype": "fp16"}, "--io-dtype fp16"),
        ({"io_dtype": "bf16", "precision": "fp16"}, "--io-dtype bf16"),
        ({"keep_fp32": ["Conv"]}, "--keep-fp32"),
        ({"batches": (1, 2, 4)}, "--min, --opt, --max: only TensorRT engines"),
        ({"input_name": " "}, "--input-name"),
        ({"dynamic": "width"}, "--dynamic width"),
        ({"precision": "int8"}, "--precision int8"),
        ({"fold_normalize": "0.5"}, "as many means as deviations"),
        ({"fold_normalize": "0.5,0.5,0.5"}, "as many means as deviations"),
        ({"fold_normalize": "0.5,0"}, "above zero"),
        ({"fold_normalize": "0.5,-1"}, "above zero"),
        ({"fold_normalize": "imagnet"}, "--fold-normalize imagnet"),
        ({"fold_normalize": "nan,1"}, "--fold-normalize nan"),
        ({"fold_normalize": "0.5,inf"}, "--fold-normalize 0.5,inf"),
        ({"fold_normalize": ""}, "--fold-normalize"),
        ({"fold_normalize": "0.1,0.2,0.5,0.5"}, "2 means, the image has 3 channels"),
        ({"input_name": "output"}, "another value of the graph is called so"),
        ({"to": ["tensort"]}, "no exporter is called 'tensort'"),
        ({"openvino": True, "output": "out.onnx"}, "--output takes the ONNX out of the bundle"),
        ({"precision": "fp16", "keep_fp32": ["Cnov"]}, "no layer and no operator"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(untouched: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        repdeploy.export(untouched, **options)
    assert said in str(caught.value)
    assert caught.value.hint


def test_a_misspelt_exporter_is_told_the_right_name(untouched: Path) -> None:
    with pytest.raises(UsageError) as caught:
        repdeploy.export(untouched, to=["opnvino"])
    assert "did you mean 'openvino'?" in caught.value.hint


@pytest.mark.parametrize("text", ["imagenet", IMAGENET, IMAGENET.replace(",", "/"), "127.5,127.5", "0,255", "-1,1e-3"])
def test_a_recorded_normalisation_reads_back(text: str) -> None:
    assert Normalization.parse(str(Normalization.parse(text))) == Normalization.parse(text)


# --- axes and names ---


def test_by_default_the_batch_is_open(bundle: Path) -> None:
    artifact = only(repdeploy.export(bundle))
    assert (artifact.dynamic, where(artifact)) == (("batch",), ["batch 1", "batch 2", "batch 5"])
    assert axes(bundle / artifact.file) == ["batch", 3, 33, 31]
    assert_near(ran(bundle / artifact.file, images(7)), trained(images(7)))


def test_image_sizes_may_be_open_too(bundle: Path) -> None:
    artifact = only(repdeploy.export(bundle, dynamic="spatial"))
    assert axes(bundle / artifact.file) == ["batch", 3, "height", "width"]
    checked = where(artifact)
    assert {label.split(" of ")[0] for label in checked} == {"batch 1", "batch 2", "batch 5"}
    assert len({label.split(" of ")[1] for label in checked}) == 2
    assert len(checked) == 6
    for batch, height, width in ((1, 33, 31), (3, 40, 64)):
        x = images(batch, height, width)
        assert_near(ran(bundle / artifact.file, x), trained(x))
    assert repdeploy.verify(bundle).passed


def test_every_axis_may_be_fixed(bundle: Path) -> None:
    artifact = only(repdeploy.export(bundle, dynamic="none", input_shape="3x3x32x40", opset=TRACED))
    assert (artifact.dynamic, artifact.input_shape, where(artifact)) == ((), (3, 3, 32, 40), ["batch 3"])
    assert axes(bundle / artifact.file) == [3, 3, 32, 40]
    assert_near(ran(bundle / artifact.file, images(3, 32, 40)), trained(images(3, 32, 40)))
    assert repdeploy.verify(bundle).passed


def test_a_network_of_one_resolution_is_not_exported_with_open_sizes(tmp_path: Path) -> None:
    bundle = sample_bundle("repmlp", tmp_path)
    before = tree(bundle)
    with pytest.raises(InputError, match="holds at 16x16 only") as caught:
        repdeploy.export(bundle, dynamic="spatial")
    assert "once per image size" in caught.value.hint
    assert tree(bundle) == before
    artifact = only(repdeploy.export(bundle, precision="fp16", opset=TRACED))
    said = {item.key: item.value for item in onnx.load(bundle / artifact.file).metadata_props}
    assert said["repdeploy.valid_at"].startswith("16x16 only")


@pytest.mark.parametrize("name", ["fastvit", "replknet"])
def test_samples_go_through_half_precision(name: str, tmp_path: Path) -> None:
    bundle = sample_bundle(name, tmp_path)
    artifact = only(repdeploy.export(bundle, precision="fp16", opset=TRACED))
    assert artifact.drift
    assert max(item.error for item in artifact.drift) < 2e-2
    assert repdeploy.verify(bundle).passed


def test_the_input_has_the_name_that_was_asked_for(bundle: Path) -> None:
    artifact = only(repdeploy.export(bundle, input_name="pixels", precision="fp16", opset=TRACED))
    session = onnxruntime.InferenceSession(str(bundle / artifact.file), providers=["CPUExecutionProvider"])
    assert [item.name for item in session.get_inputs()] == ["pixels"]
    assert [item.name for item in session.get_outputs()] == ["output"]
    assert repdeploy.verify(bundle).passed


# --- ends: softmax, normalisation, types ---


def test_softmax_gives_probabilities(bundle: Path) -> None:
    artifact = only(repdeploy.export(bundle, softmax=True, opset=TRACED))
    got = ran(bundle / artifact.file, images())
    assert np.abs(got.sum(1) - 1).max() < 1e-6
    assert_near(got, softmax(trained(images())))
    assert repdeploy.verify(bundle).passed


def test_softmax_needs_classes(tmp_path: Path) -> None:
    bundle = graph_bundle(tmp_path, classifier(head=False))
    before = tree(bundle)
    with pytest.raises(InputError, match="expected one, BATCHxCLASSES"):
        repdeploy.export(bundle, softmax=True)
    assert tree(bundle) == before


@pytest.mark.parametrize(
    ("pads", "normalize", "left"),
    [
        (0, IMAGENET, []),
        (0, "0.5,0.25", []),
        (1, "0,255", []),
        (1, "0,0,0,0.2,0.3,0.4", []),
        (1, IMAGENET, ["Sub"]),
        (1, "0.5,0.25", ["Sub"]),
    ],
)
def test_a_normalisation_is_folded_where_that_is_exact(tmp_path: Path, pads: int, normalize: str, left: list[str]) -> None:
    model = classifier(pads)
    bundle = graph_bundle(tmp_path, model)
    artifact = only(repdeploy.export(bundle, fold_normalize=normalize))
    assert [kind for kind in kinds(onnx.load(bundle / artifact.file)) if kind in ("Sub", "Mul", "Div", "Add")] == left
    (note,) = artifact.notes
    assert ("exactly" in note) == (not left)
    assert ("subtracts the mean" in note) == bool(left)
    numbers = np.array(Normalization.parse(normalize).mean), np.array(Normalization.parse(normalize).std)
    mean, deviation = (item.reshape(1, -1, 1, 1) for item in numbers)
    raw = (images(2, 12, 12) * deviation + mean).astype(np.float32)
    onnx.save(model, tmp_path / "wanted.onnx")
    wanted = ran(tmp_path / "wanted.onnx", ((raw - mean) / deviation).astype(np.float32))
    assert_near(ran(bundle / artifact.file, raw), wanted)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_network_takes_raw_images(bundle: Path, precision: Any) -> None:
    """RepVGG pads its image: an explicit node subtracts the mean, and nothing but that."""
    artifact = only(repdeploy.export(bundle, fold_normalize="imagenet", softmax=True, precision=precision, opset=TRACED))
    model = onnx.load(bundle / artifact.file)
    assert kinds(model).count("Sub") == 1
    assert not {"Mul", "Div", "BatchNormalization"} & set(kinds(model))
    raw = np.random.default_rng(0).random((2, 3, 33, 31)).astype(np.float32)
    assert_near(ran(bundle / artifact.file, raw), softmax(trained((raw - MEAN) / DEVIATION)), BUDGETS[precision])
    assert repdeploy.verify(bundle).passed


def test_without_folding_the_note_gives_the_reason(tmp_path: Path) -> None:
    """Nothing is folded because that was asked for: this first convolution pads nothing."""
    bundle = graph_bundle(tmp_path, classifier(pads=0))
    artifact = only(repdeploy.export(bundle, fold=False, fold_normalize="imagenet", precision="fp16"))
    assert {"Sub", "Mul"} <= set(kinds(onnx.load(bundle / artifact.file)))
    assert not any("pads its image" in note for note in artifact.notes)


@pytest.mark.parametrize(("precision", "opset"), [("fp16", TRACED), ("bf16", None)])
def test_the_ends_may_be_narrow(bundle: Path, precision: Any, opset: int | None) -> None:
    artifact = only(repdeploy.export(bundle, precision=precision, io_dtype=precision, opset=opset))
    graph = onnx.load(bundle / artifact.file).graph
    kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    assert {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)} == {kind}
    assert repdeploy.verify(bundle).passed


# --- simplifying ---


def test_onnxsim_is_noted(bundle: Path) -> None:
    pytest.importorskip("onnxsim")
    result = repdeploy.export(bundle, simplify=True, opset=TRACED)
    assert any(note.startswith("onnxsim: ") and "verified again" in note for note in only(result).notes)
    assert_near(ran(bundle / "model.fp32.onnx", images()), trained(images()))


def changed(value: float) -> Callable[[onnx.ModelProto], onnx.ModelProto]:
    """A simplifier that spoils one weight."""

    def spoil(model: onnx.ModelProto) -> onnx.ModelProto:
        copy = onnx.ModelProto.FromString(model.SerializeToString())
        tensor = max(copy.graph.initializer, key=lambda item: len(item.dims))
        array = numpy_helper.to_array(tensor).copy()
        array.flat[0] += value
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return copy

    return spoil


def broken(model: onnx.ModelProto) -> onnx.ModelProto:
    raise BackendFailed("onnxsim failed: no idea")


def invalid(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    copy.graph.node[0].input[0] = "nobody"
    return copy


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "spoil", [broken, changed(50.0), changed(float("nan")), invalid], ids=["raises", "wrong", "nan", "invalid"]
)
def test_what_onnxsim_spoils_is_not_taken(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[onnx.ModelProto], onnx.ModelProto], precision: Any
) -> None:
    monkeypatch.setattr(simplifying, "require", lambda: None)
    monkeypatch.setattr(simplifying, "simplified", spoil)
    artifact = only(repdeploy.export(bundle, simplify=True, opset=TRACED, precision=precision))
    assert any("was not taken" in note for note in artifact.notes)
    assert_near(ran(bundle / artifact.file, images()), trained(images()), BUDGETS[precision])


def test_without_onnxsim_the_way_to_it_is_told(untouched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "onnxsim" else real(name, *rest))
    with pytest.raises(BackendMissing, match="onnxsim is not installed") as caught:
        repdeploy.export(untouched, simplify=True)
    assert "pip install repdeploy[simplify]" in caught.value.hint


# --- weights in a file of their own ---


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_large_weights_lie_beside_the_graph(bundle: Path, monkeypatch: pytest.MonkeyPatch, precision: Any) -> None:
    monkeypatch.setattr(onnx_source, "MAX_BYTES", 1000)
    artifact = only(repdeploy.export(bundle, precision=precision, opset=TRACED))
    path, data = bundle / artifact.file, bundle / f"{artifact.file}.data"
    assert artifact.others == ((data.name, sha256(data)),)
    assert artifact.sha256 == sha256(path)
    assert artifact.bytes == path.stat().st_size + data.stat().st_size
    assert_near(ran(path, images()), trained(images()), BUDGETS[precision])
    assert repdeploy.verify(bundle).passed
    assert repdeploy.export(bundle, precision=precision, opset=TRACED).reused == (artifact.file,)
    data.write_bytes(data.read_bytes()[:-4] + b"\0\0\1\0")
    replayed = repdeploy.verify(bundle)
    assert not replayed.passed
    assert any(data.name in check.subject and "changed" in check.failure for check in replayed.checks)
    assert repdeploy.export(bundle, precision=precision, opset=TRACED).reused == ()
    assert repdeploy.verify(bundle).passed


def test_a_graph_with_large_weights_is_exported_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    w = Writer(17, FLOAT)
    normed = w.norm(w.conv("x", weights(16, 3, 5, 5)), [weights(16), weights(16), weights(16), np.ones(16)])
    w.node("Relu", [normed], "y")
    monkeypatch.setattr(onnx_source, "MAX_BYTES", 1000)
    bundle = graph_bundle(tmp_path, w.model({"x": ["n", 3, 12, 12]}, {"y": ["n", 16, 8, 8]}))
    assert (bundle / "model.fp32.onnx.data").is_file()
    assert repdeploy.verify(bundle).passed
    artifact = only(repdeploy.export(bundle, precision="fp16", fold_normalize="imagenet"))
    assert artifact.others == (("model.fp16.onnx.data", sha256(bundle / "model.fp16.onnx.data")),)
    assert repdeploy.verify(bundle).passed


def test_a_data_file_of_somebody_else_is_not_replaced(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_source, "MAX_BYTES", 1000)
    (tmp_path / "out.onnx.data").write_bytes(b"somebody's")
    with pytest.raises(UsageError):
        repdeploy.export(bundle, output=tmp_path / "out.onnx", opset=TRACED)
    assert (tmp_path / "out.onnx.data").read_bytes() == b"somebody's"


def test_a_data_file_that_nothing_reads_any_more_goes(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(onnx_source, "MAX_BYTES", 1000)
        repdeploy.export(bundle, opset=TRACED)
    repdeploy.export(bundle, opset=13)
    assert not list(bundle.glob("*.data"))


# --- the same file everywhere ---


def inside(path: Path) -> Iterator[tuple[str, bytes]]:
    """A file's bytes; of an archive also its entries'."""
    yield path.name, path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield f"{path.name}/{name}", name.encode() + archive.read(name)


def test_every_bundle_gets_the_same_bytes_and_no_path(tmp_path: Path) -> None:
    files: dict[str, list[bytes]] = {}
    for place in ("one", "another_place"):
        folder = tmp_path / place
        folder.mkdir()
        repdeploy.convert(save(repvgg(), folder / "a.pth"), output=folder / "a.repdeploy", input_shape="1x3x33x31")
        for precision in ("fp32", "fp16", "bf16"):
            opset = TRACED if precision == "fp16" else None
            repdeploy.export(folder / "a.repdeploy", precision=precision, opset=opset)  # type: ignore[arg-type]
            path = folder / "a.repdeploy" / f"model.{precision}.onnx"
            files.setdefault(path.name, []).append(path.read_bytes())
    for name, (first, second) in files.items():
        assert first == second, name
    repdeploy.export(folder / "a.repdeploy", torch=True, openvino=importlib.util.find_spec("openvino") is not None)
    for path in sorted((folder / "a.repdeploy").iterdir()):
        for name, content in inside(path):
            for secret in (tmp_path, REPOSITORY, Path.home() / ".", Path(sys.prefix)):
                assert str(secret).encode() not in content, (name, str(secret))


def test_a_file_says_where_it_comes_from(bundle: Path) -> None:
    artifact = only(repdeploy.export(bundle))
    model, manifest = onnx.load(bundle / artifact.file), json.loads((bundle / "manifest.json").read_text())
    said = {item.key.removeprefix("repdeploy."): item.value for item in model.metadata_props}
    assert said["source"] == "a.pth"
    assert said["source_sha256"] == manifest["source"]["sha256"]
    assert said["weights_sha256"] == sha256(bundle / "weights.safetensors")
    assert said["family"] == "repvgg"
    assert {item.key.split(".")[0] for item in model.metadata_props} == {"repdeploy"}
    assert model.producer_name == "repdeploy"
    graph = model.graph
    for item in (*graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        assert (len(item.metadata_props), item.doc_string) == (0, ""), item.name


def test_what_is_current_is_not_made_again(bundle: Path) -> None:
    for options in (
        {"opset": TRACED},
        {"opset": 13},
        {"precision": "fp16", "keep_fp32": ["Gemm"]},
        {"softmax": True, "opset": TRACED},
    ):
        first = repdeploy.export(bundle, **options)  # type: ignore[arg-type]
        again = repdeploy.export(bundle, **options)  # type: ignore[arg-type]
        assert first.reused == (), options
        assert again.reused == (first.artifacts[0].file,), options
        assert again.artifacts == first.artifacts
    assert only(repdeploy.export(bundle, precision="fp16", opset=13)).options == {"opset": "13"}


# --- other targets ---


def test_openvino_writes_both_files(bundle: Path) -> None:
    pytest.importorskip("openvino")
    for precision, stem in (("fp32", "model"), ("fp16", "model.fp16")):
        result = repdeploy.export(bundle, openvino=True, precision=precision, opset=TRACED)  # type: ignore[arg-type]
        graph, ir = result.artifacts
        assert (ir.kind, ir.file, ir.precision) == ("openvino", f"{stem}.xml", precision)
        assert ir.sha256 == sha256(bundle / ir.file)
        assert ir.others == ((f"{stem}.bin", sha256(bundle / f"{stem}.bin")),)
        assert ir.made_from == graph.sha256
        assert any("OpenVINO, float32" in check.subject for check in ir.checks)
        assert all(check.passed for check in ir.checks)
    assert repdeploy.verify(bundle).passed
    weights = bundle / "model.bin"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0x40
    weights.write_bytes(content)
    replayed = repdeploy.verify(bundle)
    assert [check.subject for check in replayed.checks if not check.passed] == ["model.bin"]


ALONE = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("repdeploy", "repdeploy_plugins", "tests", "sample_models"):
            raise ImportError(f"{name} is not installed here")
sys.meta_path.insert(0, Nothing())
import numpy as np, torch
x = torch.from_numpy(np.load("x.npy"))
for name in sys.argv[1:]:
    np.save(name + ".npy", torch.export.load(name).module()(x).detach().float().numpy())
"""


def test_a_torch_program_needs_nothing_but_torch(bundle: Path) -> None:
    x = images(4)
    for precision in ("fp32", "fp16"):
        result = repdeploy.export(bundle, torch=True, precision=precision, opset=TRACED)  # type: ignore[arg-type]
        graph, program = result.artifacts
        assert (program.kind, program.file, program.precision) == ("torch", f"model.{precision}.pt2", precision)
        assert program.made_from == graph.sha256
        assert all(check.passed for check in program.checks)
    np.save(bundle / "x.npy", x)
    command = [sys.executable, "-W", "ignore", "-c", ALONE, "model.fp32.pt2", "model.fp16.pt2"]
    subprocess.run(command, cwd=bundle, check=True, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert_near(np.load(bundle / "model.fp32.pt2.npy"), trained(x))
    assert_near(np.load(bundle / "model.fp16.pt2.npy"), trained(x), 1e-2)
    assert repdeploy.verify(bundle).passed


def test_a_torch_program_has_the_same_ends(bundle: Path) -> None:
    graph, program = repdeploy.export(
        bundle, torch=True, fold_normalize="imagenet", softmax=True, input_name="pixels", opset=TRACED
    ).artifacts
    assert all(check.passed for check in program.checks)
    assert len(program.checks) == len(graph.checks) == 3
    assert repdeploy.verify(bundle).passed


def test_a_torch_program_has_open_image_sizes_too(bundle: Path) -> None:
    """At 33x31 the last map is one pixel wide, which torch takes for a constant: the example has to be larger."""
    graph, program = repdeploy.export(bundle, torch=True, dynamic="spatial", opset=TRACED).artifacts
    assert all(check.passed for check in program.checks)
    assert len(program.checks) == len(graph.checks) == 6


class Copycat(Exporter):
    """Somebody else's format: a copy of the ONNX file."""

    name, title = "copycat", "a copy"

    def missing(self) -> Missing | None:
        return None

    def write(self, source: Source, progress: Progress) -> Written:
        shutil.copy(source.onnx, source.scratch / "copy.onnx")
        (source.scratch / "copy.txt").write_text("beside it")
        checks = onnx_checks(source.scratch / "copy.onnx", source.artifact.precision, source.cases)[0]
        return Written("copy.onnx", source.artifact.precision, tuple(checks), others=("copy.txt",), notes=("copied",))

    def check(self, path: Path, artifact: Artifact, cases: Sequence[Case]) -> list[Check]:
        return onnx_checks(path, artifact.precision, cases)[0]


class Wrong(Copycat):
    name = "wrong"

    def write(self, source: Source, progress: Progress) -> Written:
        (source.scratch / "bad.bin").write_bytes(b"bad")
        return Written("bad.bin", "fp32", (Check("artifact", "bad.bin", 1.0, 1e-4),))


class Crashing(Copycat):
    name = "crashing"

    def write(self, source: Source, progress: Progress) -> Written:
        (source.scratch / "half.bin").write_bytes(b"half")
        raise BackendFailed("it fell over")


class Absent(Copycat):
    name = "absent"

    def missing(self) -> Missing | None:
        return Missing("Absent is not installed", "pip install absent")

    def prepare(self, source: Source) -> tuple[str, ...]:
        return ("what another machine needs",)


COPYCAT, WRONG, CRASHING, ABSENT = Copycat(), Wrong(), Crashing(), Absent()


@pytest.fixture
def outsiders(monkeypatch: pytest.MonkeyPatch) -> None:
    real = plugins.entry_points
    theirs = [EntryPoint(item.name, f"{__name__}:{item.name.upper()}", GROUP) for item in (COPYCAT, WRONG, CRASHING, ABSENT)]
    theirs.append(EntryPoint("nonsense", f"{__name__}:REPOSITORY", GROUP))
    monkeypatch.setattr(plugins, "entry_points", lambda group: [*real(group=group), *(theirs if group == GROUP else [])])


def test_an_outsiders_exporter_is_verified_and_recorded(outsiders: None, bundle: Path) -> None:
    result = repdeploy.export(bundle, to=["copycat"], opset=TRACED)
    graph, copy = result.artifacts
    assert (copy.kind, copy.file, copy.sha256, copy.made_from) == ("copycat", "copy.onnx", graph.sha256, graph.sha256)
    assert copy.others == (("copy.txt", sha256(bundle / "copy.txt")),)
    assert "copied" in result.notes
    replayed = repdeploy.verify(bundle)
    assert replayed.passed
    assert any(check.subject.startswith("copy.onnx") for check in replayed.checks)
    (bundle / "copy.txt").write_text("changed")
    assert not repdeploy.verify(bundle).passed


@pytest.mark.parametrize(("name", "error"), [("wrong", VerificationFailed), ("crashing", BackendFailed)])
def test_an_outsiders_failure_leaves_nothing(outsiders: None, bundle: Path, name: str, error: type[RepDeployError]) -> None:
    repdeploy.export(bundle, opset=TRACED)
    before = {item: (bundle / item).read_bytes() for item in tree(bundle)}
    with pytest.raises(error):
        repdeploy.export(bundle, to=[name], opset=TRACED)
    assert {item: (bundle / item).read_bytes() for item in tree(bundle)} == before


def test_an_absent_target_does_not_stop_the_others(outsiders: None, bundle: Path) -> None:
    result = repdeploy.export(bundle, to=["absent", "copycat"], opset=TRACED)
    assert (result.missing, result.hint) == ("Absent is not installed", "pip install absent")
    assert "what another machine needs" in result.notes
    assert [item.kind for item in result.artifacts] == ["onnx", "copycat"]


def test_a_plugin_that_is_no_exporter_says_so(outsiders: None, untouched: Path) -> None:
    with pytest.raises(UsageError, match=r"is no repdeploy\.exporters\.interface\.Exporter"):
        repdeploy.export(untouched, to=["nonsense"])


# --- failures ---


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("value", "said"), [(float("nan"), "NaN"), (50.0, "error")])
def test_a_wrong_graph_is_never_written(
    untouched: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, value: float, said: str
) -> None:
    monkeypatch.setattr(stage, "folded", changed(value))
    with pytest.raises(VerificationFailed, match=said):
        repdeploy.export(untouched, precision=precision, opset=TRACED)


@pytest.mark.parametrize("target", ["nowhere/m.onnx", "mine.onnx", "folder"])
def test_what_is_somebody_elses_is_not_replaced(untouched: Path, tmp_path: Path, target: str) -> None:
    (tmp_path / "mine.onnx").write_bytes(classifier().SerializeToString())
    (tmp_path / "folder").mkdir()
    before = tree(tmp_path)
    with pytest.raises(UsageError):
        repdeploy.export(untouched, output=tmp_path / target)
    assert tree(tmp_path) == before
    assert (tmp_path / "mine.onnx").read_bytes() == classifier().SerializeToString()


def test_an_output_lies_where_it_was_asked_for(untouched: Path, tmp_path: Path) -> None:
    for _ in range(2):  # what we wrote may be replaced
        artifact = only(repdeploy.export(untouched, output=tmp_path / "out.onnx", opset=TRACED, precision="fp16"))
    assert artifact.file == "out.onnx"
    assert_near(ran(tmp_path / "out.onnx", images()), trained(images()), 1e-2)


@pytest.mark.parametrize(("precision", "opset"), [("fp32", None), ("fp16", TRACED)])
def test_layers_with_equal_weights_share_them_rightly(tmp_path: Path, precision: Any, opset: int | None) -> None:
    """The exporter writes equal tensors once, under the name of one of their layers (pytorch issue 166797)."""
    model = repvgg(blocks=(1, 3, 2, 1))
    twin, zero = dict(model.named_modules())["stage2.2"], torch.zeros_like
    twin.load_state_dict(dict(model.named_modules())["stage2.1"].state_dict())
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d) and name.startswith("stage3."):
            module.bias.data = zero(module.bias.data)
            module.running_mean = zero(module.running_mean)  # every fused bias of this stage is zero
    repdeploy.convert(save(model, tmp_path / "a.pth"), output=tmp_path / "a.repdeploy", input_shape="1x3x33x31")
    artifact = only(repdeploy.export(tmp_path / "a.repdeploy", precision=precision, opset=opset, fold_normalize="0.4,0.3"))
    raw = images()
    with torch.no_grad():
        wanted = model.eval().double()((torch.from_numpy(raw).double() - 0.4) / 0.3).numpy()
    assert_near(ran(tmp_path / "a.repdeploy" / artifact.file, raw), wanted, BUDGETS[precision])
    nodes = [node.name for node in onnx.load(tmp_path / "a.repdeploy" / artifact.file).graph.node]
    assert len(set(nodes)) == len(nodes)


# --- bundles of graphs ---


@pytest.mark.parametrize(("precision", "opset"), [("fp16", 17), ("bf16", 22)])
def test_a_graph_is_cast_and_converted(tmp_path: Path, precision: Any, opset: int) -> None:
    bundle = graph_bundle(tmp_path, classifier())
    artifact = only(repdeploy.export(bundle, precision=precision, softmax=True, fold_normalize="imagenet"))
    assert artifact.opset == opset == onnx.load(bundle / artifact.file).opset_import[0].version
    assert {layer.operator for layer in artifact.wide} == {"GlobalAveragePool", "Softmax"}
    assert repdeploy.verify(bundle).passed
    assert repdeploy.export(bundle, precision=precision, softmax=True, fold_normalize="imagenet").reused == (artifact.file,)


def cancelling() -> onnx.ModelProto:
    """Two large maps that nearly cancel: rounded to half, little of their difference is left."""
    w = Writer(17, FLOAT)
    stem = w.node("Relu", [w.norm(w.conv("x", weights(4, 3, 3, 3)), [weights(4), weights(4), weights(4), np.ones(4)])])
    little = np.random.default_rng(5).standard_normal((4, 4, 1, 1)).astype(np.float32) * 0.05
    kernels = weights(4, 4, 1, 1) * 100, weights(4, 4, 1, 1) * 100 + little
    difference = w.node("Sub", [w.node("Relu", [w.conv(stem, kernel)]) for kernel in kernels])
    w.node("Relu", [w.conv(difference, weights(3, 4, 1, 1))], "y")
    return w.model({"x": ["n", 3, 12, 12]}, {"y": ["n", 3, 10, 10]})


def test_a_graph_that_drifts_keeps_what_costs_most(tmp_path: Path) -> None:
    bundle = graph_bundle(tmp_path, cancelling())
    artifact = only(repdeploy.export(bundle, precision="fp16"))
    assert any("missed its budget" in note for note in artifact.notes)
    assert {"Sub_6", "Conv_2", "Conv_4"} <= {layer.name for layer in artifact.wide}
    assert repdeploy.verify(bundle).passed


def test_what_is_kept_for_its_cost_costs_something(tmp_path: Path) -> None:
    """By the number in its own reason, on whichever set of references shows it."""
    artifact = only(repdeploy.export(graph_bundle(tmp_path, cancelling()), precision="fp16"))
    costs = {layer.name: float(layer.reason.split()[-1]) for layer in artifact.wide if layer.operator == "Conv"}
    assert min(costs.values()) > 5e-3, costs


def test_a_graph_is_current_as_it_was_squeezed(tmp_path: Path) -> None:
    bundle = graph_bundle(tmp_path, classifier())
    before = sha256(bundle / "model.fp32.onnx")
    assert repdeploy.export(bundle).reused == ("model.fp32.onnx",)
    assert sha256(bundle / "model.fp32.onnx") == before


@pytest.mark.parametrize(
    "options",
    [{"opset": 20}, {"softmax": True}, {"fold_normalize": "imagenet"}, {"input_name": "pixels"}, {"simplify": True}],
    ids=str,
)
def test_a_bundle_outlives_an_export_of_its_graph(tmp_path: Path, options: dict[str, Any]) -> None:
    """The squeezed graph is what everything else is made from: an export with other ends may not take its place."""
    if "simplify" in options:
        pytest.importorskip("onnxsim")
    bundle = graph_bundle(tmp_path, classifier())
    artifact = only(repdeploy.export(bundle, **options))
    assert artifact.opset == options.get("opset", 17)
    assert repdeploy.verify(bundle).passed
    assert only(repdeploy.export(bundle, **options)).file == artifact.file
    assert only(repdeploy.export(bundle, precision="fp16")).options == {}
    plain = only(repdeploy.export(bundle))
    onnx.save(classifier(), tmp_path / "wanted.onnx")
    assert_near(ran(bundle / plain.file, images(2, 12, 12)), ran(tmp_path / "wanted.onnx", images(2, 12, 12)))


def test_an_opset_that_onnx_cannot_reach_is_refused(tmp_path: Path) -> None:
    w = Writer(22, FLOAT)
    gelu = w.node("Gelu", [w.norm(w.conv("x", weights(4, 3, 3, 3)), [weights(4), weights(4), weights(4), np.ones(4)])])
    w.node("Relu", [gelu], "y")
    bundle = graph_bundle(tmp_path, w.model({"x": ["n", 3, 12, 12]}, {"y": ["n", 4, 10, 10]}))
    before = tree(bundle)
    with pytest.raises(InputError, match="onnx cannot convert it to 13"):
        repdeploy.export(bundle, opset=13)
    assert tree(bundle) == before


def test_a_graph_that_has_bfloat16_is_not_converted_to_an_older_opset(tmp_path: Path) -> None:
    w = Writer(23, FLOAT)
    normed = w.norm(w.conv("x", weights(4, 3, 3, 3)), [weights(4), weights(4), weights(4), np.ones(4)])
    w.node("RMSNormalization", [normed, weights(10)], "y", axis=-1)
    bundle = graph_bundle(tmp_path, w.model({"x": ["n", 3, 12, 12]}, {"y": ["n", 4, 10, 10]}))
    assert only(repdeploy.export(bundle, precision="bf16")).opset == 23


def test_an_input_that_is_an_output_keeps_its_name_there(tmp_path: Path) -> None:
    """Or --input-name is refused: the output `x` may not vanish."""
    w = Writer(17, FLOAT)
    w.node("Relu", [w.norm(w.conv("x", weights(4, 3, 3, 3)), [weights(4), weights(4), weights(4), np.ones(4)])], "y")
    bundle = graph_bundle(tmp_path, w.model({"x": ["n", 3, 12, 12]}, {"y": ["n", 4, 10, 10], "x": ["n", 3, 12, 12]}))
    try:
        artifact = only(repdeploy.export(bundle, input_name="pixels", precision="fp16"))
    except (UsageError, InputError):
        return
    assert [value.name for value in onnx.load(bundle / artifact.file).graph.output] == ["y", "x"]


def test_a_graph_with_group_normalization_is_cast(tmp_path: Path) -> None:
    w = Writer(22, FLOAT)
    normed = w.norm(w.conv("x", weights(4, 3, 3, 3)), [weights(4), weights(4), weights(4), np.ones(4)])
    w.node("Relu", [w.node("GroupNormalization", [normed, weights(4), weights(4)], num_groups=2)], "y")
    bundle = graph_bundle(tmp_path, w.model({"x": ["n", 3, 12, 12]}, {"y": ["n", 4, 10, 10]}))
    artifact = only(repdeploy.export(bundle, precision="fp16"))
    assert {layer.operator for layer in artifact.wide} == {"GroupNormalization"}


def test_open_sizes_are_a_graphs_own(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="axes of this bundle's graph are its own"):
        repdeploy.export(graph_bundle(tmp_path, classifier()), dynamic="spatial")


@pytest.mark.parametrize("target", ["openvino", "torch"])
def test_a_graph_has_other_targets_too(tmp_path: Path, target: str) -> None:
    if target == "openvino":
        pytest.importorskip("openvino")
    bundle = graph_bundle(tmp_path, classifier())
    artifact = repdeploy.export(bundle, to=[target]).artifacts[-1]
    assert artifact.kind == target
    assert all(check.passed for check in artifact.checks)
    assert repdeploy.verify(bundle).passed


def test_images_of_ones_own_show_what_overflows(bundle: Path, tmp_path: Path) -> None:
    """Images a thousand times as large as the gates' lead beyond float16, which nothing else would show."""
    assert not [
        layer for layer in only(repdeploy.export(bundle, precision="fp16", opset=TRACED)).wide if "65504" in layer.reason
    ]
    np.savez(tmp_path / "sample.npz", input=images() * 1e5)
    artifact = only(
        repdeploy.export(bundle, precision="fp16", sample=tmp_path / "sample.npz", fold_normalize="0.5,0.25", opset=TRACED)
    )
    assert [layer for layer in artifact.wide if "on the sample data; float16 ends at 65504" in layer.reason]
    with pytest.raises(UsageError, match="--sample goes with"):
        repdeploy.export(bundle, sample=tmp_path / "sample.npz")
    with pytest.raises(UsageError, match="there is no file"):
        repdeploy.export(bundle, precision="fp16", sample=tmp_path / "none.npz")
    for wrong in ({"x": images()}, {"input": images()[:, :1]}, {"input": images() * np.nan}):
        np.savez(tmp_path / "wrong.npz", **wrong)
        with pytest.raises(InputError, match="--sample"):
            repdeploy.export(bundle, precision="fp16", sample=tmp_path / "wrong.npz")


# --- what an adversary found ---


def test_a_graph_in_half_precision_keeps_its_own(tmp_path: Path) -> None:
    """Its weights tell the precision: not every exporter writes down the types of what is computed."""
    w = Writer(17, TensorProto.FLOAT16)
    normed = w.norm(w.conv("x", weights(6, 3, 3, 3)), [weights(6), weights(6), weights(6), np.full(6, 0.7, np.float32)])
    w.node("Relu", [normed], "y")
    bundle = graph_bundle(tmp_path, w.model({"x": ["n", 3, 12, 12]}, {"y": ["n", 6, 10, 10]}))
    artifact = only(repdeploy.export(bundle))
    assert (artifact.file, artifact.precision) == ("model.fp16.onnx", "fp16")
    assert repdeploy.verify(bundle).passed
    for options in ({"softmax": True}, {"opset": 20}, {"precision": "bf16"}):
        with pytest.raises(InputError, match="only float32 graphs are changed"):
            repdeploy.export(bundle, **options)


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_converting_again_mends_damaged_references(tmp_path: Path, damage: str) -> None:
    checkpoint = save(repvgg(), tmp_path / "a.pth")
    bundle = repdeploy.convert(checkpoint, output=tmp_path / "a.repdeploy", input_shape="1x3x33x31").bundle
    assert bundle is not None
    repdeploy.export(bundle)
    references = bundle / "references.npz"
    references.write_bytes(references.read_bytes()[:90])
    if damage == "gone":
        references.unlink()
    repdeploy.convert(checkpoint, output=bundle, input_shape="1x3x33x31")
    assert repdeploy.verify(bundle).passed


def test_options_about_the_image_are_about_the_one_whose_batch_is_open(tmp_path: Path) -> None:
    w = Writer(17, FLOAT)
    normed = w.norm(w.conv("b", weights(4, 3, 1, 1)), [weights(4), weights(4), weights(4), np.full(4, 0.7, np.float32)])
    w.node("Add", [normed, w.conv("a", weights(4, 3, 1, 1))], "y")
    bundle = graph_bundle(tmp_path, w.model({"a": [1, 3, 8, 8], "b": ["n", 3, 8, 8]}, {"y": ["n", 4, 8, 8]}))
    artifact = only(repdeploy.export(bundle, fold_normalize="0.5,0.25", input_name="pixels"))
    assert [item.name for item in onnx.load(bundle / artifact.file).graph.input] == ["a", "pixels"]
    assert repdeploy.verify(bundle).passed


def test_the_axes_of_a_graph_are_not_closed_in_silence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--dynamic none"):
        repdeploy.export(graph_bundle(tmp_path, classifier()), dynamic="none")


def test_an_output_outside_of_bundles_that_ends_in_onnx(untouched: Path, tmp_path: Path) -> None:
    for output in (untouched / "model.fp32.onnx", untouched / "other.onnx", tmp_path / "model.txt"):
        with pytest.raises(UsageError, match="-o"):
            repdeploy.export(untouched, output=output)


@pytest.mark.parametrize("text", ["0,1e-42", "100000,1", "nan,1", "0,inf"])
def test_a_normalisation_that_float32_cannot_hold(bundle: Path, text: str) -> None:
    with pytest.raises(UsageError, match="--fold-normalize"):
        repdeploy.export(bundle, fold_normalize=text)


def test_an_exporter_in_c_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The TorchScript exporter shows its graph, local paths and all, past Python's standard output."""
    bundle = sample_bundle("fastvit", tmp_path)
    with pytest.raises(BackendFailed, match="could not be written in opset 11") as caught:
        repdeploy.export(bundle, opset=11)
    assert "newer --opset" in caught.value.hint
    assert capfd.readouterr().out == ""


def test_a_torch_program_of_a_network_with_attention(tmp_path: Path) -> None:
    result = repdeploy.export(sample_bundle("fastvit", tmp_path), torch=True)
    assert all(check.passed for check in result.artifacts[-1].checks)


def test_a_graph_in_half_precision_as_a_torch_program(tmp_path: Path) -> None:
    result = repdeploy.export(graph_bundle(tmp_path, classifier()), precision="fp16", torch=True)
    assert all(check.passed for check in result.artifacts[-1].checks)
    assert any("takes images of 3x12x12" in note for note in result.notes)
