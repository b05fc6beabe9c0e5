"""The ncnn plugin: what pnnx writes is the proved network, the same bytes every time, or nothing is left of it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto
from repdeploy_targets.ncnn import EXPORTER, RUNTIME, Ncnn, NcnnCpu, NcnnSession

import repdeploy
from repdeploy.bundle import Bundle
from repdeploy.errors import BackendFailed, UsageError
from repdeploy.exporters.interface import Case, Source, Written
from repdeploy.exporters.options import Options
from repdeploy.exporters.subject import subject_of
from repdeploy.progress import silent
from repdeploy.records import Artifact, Precision
from repdeploy.registry import families
from repdeploy.runtimes.interface import Job, Runtime
from repdeploy.vouching import Compiled
from sample_models import digits
from tests.conftest import sha256, tree
from tests.graph.onnx_graphs import Writer, run_whole
from tests.networks import repvgg, save

SAMPLES = Path(digits.__file__).parent / "checkpoints"
installed = pytest.mark.skipif(EXPORTER.missing() is not None, reason="needs pnnx and ncnn")


def source_of(folder: Path, model: onnx.ModelProto, cases: tuple[Case, ...], **changes: Any) -> Source:
    """What an exporter is given, in a folder of its own. `changes`: of the artifact, and `precision`."""
    precision: Precision = changes.pop("precision", "fp32")
    (folder / "scratch").mkdir(parents=True)
    path = folder / f"model.{precision}.onnx"
    onnx.save(model, path)
    shape = next(iter(cases[0].feeds.values())).shape
    artifact = Artifact(path.name, "onnx", precision, "", 0, "", "", input_shape=shape)
    return Source(
        onnx=path, artifact=replace(artifact, **changes), cases=cases, folder=folder, scratch=folder / "scratch",
        shapes={}, batches=(1, 4, 16), options=Options(precision=precision),
    )  # fmt: skip


def converted(checkpoint: Path, folder: Path, shape: tuple[int, ...], **options: Any) -> Source:
    """A checkpoint's network, as `export` would hand it on."""
    made = repdeploy.convert(checkpoint, output=folder / "bundle.repdeploy", input_shape=shape)
    assert made.bundle is not None
    chosen = Options(**options)
    subject = subject_of(Bundle(made.bundle), families(), shape, chosen)
    source = source_of(folder / "export", subject.graph(chosen), subject.cases(silent), dynamic=subject.dynamic)
    return replace(source, options=chosen)


def graph(
    build: Callable[[Writer, str], str], shape: tuple[int, ...], elem: int = TensorProto.FLOAT
) -> tuple[onnx.ModelProto, tuple[Case, ...]]:
    """A graph node by node, and what it gives in float64 on noise. Inputs and outputs have the type of `elem`."""
    writer = Writer(17, elem)
    writer.node("Identity", [build(writer, "the image")], "classes")
    feeds = {"the image": np.random.default_rng(0).normal(size=shape).astype(np.float32)}
    wanted = run_whole(writer.model({"the image": shape}, {"classes": 2}), feeds)
    return writer.model({"the image": shape}, {"classes": wanted["classes"].shape}), (Case("set 1 of 1", feeds, wanted),)


def small(writer: Writer, x: str) -> str:
    """A dilated, a grouped and a wide convolution, a gate, a mean and a classifier: four channels at most."""
    noise = np.random.default_rng(1).normal
    x = writer.conv(x, noise(size=(4, 2, 3, 3)), noise(size=4), pads=[2] * 4, dilations=[2, 2])
    x = writer.node("Relu", [writer.conv(x, noise(size=(4, 2, 3, 3)), strides=[2, 2], group=2)])
    x = writer.conv(x, noise(size=(4, 1, 7, 7)) / 7, pads=[3] * 4, group=4)
    gate = writer.node("Sigmoid", [writer.conv(writer.node("GlobalAveragePool", [x]), noise(size=(4, 4, 1, 1)))])
    x = writer.node("Flatten", [writer.node("GlobalAveragePool", [writer.node("Mul", [x, gate])])])
    return writer.node("Gemm", [x, noise(size=(4, 5)), noise(size=5)])


def six_axes(writer: Writer, x: str) -> str:
    """Tiles of an image, as RepMLP cuts them."""
    x = writer.node("Reshape", [x, np.array([1, 2, 3, 4, 3, 4])])
    x = writer.node("Transpose", [x], perm=[0, 2, 4, 1, 3, 5])
    return writer.node("Reshape", [x, np.array([9, 32])])


def written(source: Source) -> tuple[Written, Path]:
    found = EXPORTER.write(source, silent)
    assert tree(source.scratch) == sorted([found.file, *found.others])
    assert all(check.passed for check in found.checks)
    return found, source.scratch / found.file


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A small RepVGG with an open batch."""
    folder = tmp_path_factory.mktemp("repvgg")
    return converted(save(repvgg(), folder / "net.pth"), folder, (1, 3, 32, 48))


@installed
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_network_and_its_bytes(network: Source, tmp_path: Path, precision: Precision) -> None:
    source = replace(network, scratch=tmp_path, options=Options(precision=precision))
    found, param = written(source)
    assert (found.file, found.others) == (f"model.{precision}.ncnn.param", (f"model.{precision}.ncnn.bin",))
    assert found.precision == precision
    assert {check.budget for check in found.checks} == ({1e-4, 1e-2} if precision == "fp32" else {1e-2})
    assert any("images are run one by one" in note for note in found.notes)
    assert any("passes in float32" in note and "at ncnn's defaults" in note for note in found.notes)
    first = {path.name: sha256(path) for path in source.scratch.iterdir()}
    for path in source.scratch.iterdir():
        data = path.read_bytes()
        assert not any(part.encode() in data for part in (str(tmp_path), str(network.folder), "model.onnx", "/tmp/", "pnnx-"))
        path.unlink()
    written(source)
    assert {path.name: sha256(path) for path in source.scratch.iterdir()} == first
    weights = param.with_suffix(".bin").stat().st_size
    floats = sum(int(np.prod(item.dims)) for item in onnx.load(source.onnx).graph.initializer)
    assert weights > 3.9 * floats if precision == "fp32" else weights < 2.5 * floats
    artifact = replace(source.artifact, kind="ncnn", precision=precision)
    assert EXPORTER.check(param, artifact, source.cases) == list(found.checks)


@installed
@pytest.mark.parametrize("name", ["mobileone_digits.pth", "fastvit_digits.pth"])
def test_sample_families(tmp_path: Path, name: str) -> None:
    """Depthwise stages with gates; softmax attention and 7x7 kernels."""
    found, _ = written(converted(SAMPLES / name, tmp_path, (1, 1, 64, 64)))
    assert max(check.error for check in found.checks if check.budget < 1e-3) < 1e-5


@installed
def test_open_image_sizes(tmp_path: Path) -> None:
    source = converted(save(repvgg(), tmp_path / "net.pth"), tmp_path, (1, 3, 32, 48), dynamic="spatial")
    found, param = written(source)
    sizes = {case.feeds["input"].shape[2:] for case in source.cases}
    assert len(sizes) == 2
    assert len(found.checks) == 2 * len(source.cases)
    assert NcnnSession(param).run(np.ones((1, 3, 80, 64), np.float32)).shape == (1, 5)


@installed
def test_what_the_graph_holds(tmp_path: Path) -> None:
    """A fixed batch, names of its own, and layers that no family has together."""
    model, cases = graph(small, (3, 2, 17, 15))
    found, param = written(source_of(tmp_path, model, cases))
    assert "2=2" in param.read_text().splitlines()[2]
    assert len(found.checks) == 2


@installed
@pytest.mark.parametrize("is_cast", [False, True])
def test_a_graph_in_float16(tmp_path: Path, is_cast: bool) -> None:
    """pnnx reads no float16: it is given the same values in float32."""

    def narrow(writer: Writer, x: str) -> str:
        x = writer.node("Cast", [x], to=TensorProto.FLOAT16) if is_cast else x
        half = writer.node("Relu", [writer.conv(x, np.random.default_rng(1).normal(size=(4, 2, 3, 3)))])
        wide = writer.node("Cast", [writer.node("Flatten", [half])], to=TensorProto.FLOAT)
        return writer.node("Softmax", [wide], axis=1) if is_cast else writer.node("Cast", [wide], to=TensorProto.FLOAT16)

    model, cases = graph(narrow, (1, 2, 8, 9), TensorProto.FLOAT16)
    if is_cast:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    onnx.checker.check_model(model, full_check=True)
    found, _ = written(source_of(tmp_path, model, cases, precision="fp16"))
    assert max(check.error for check in found.checks) < 2e-3


@installed
def test_bfloat16_is_refused(tmp_path: Path) -> None:
    model, cases = graph(small, (1, 2, 17, 15))
    with pytest.raises(UsageError, match="ncnn stores float32 or float16") as refusal:
        EXPORTER.write(source_of(tmp_path, model, cases, precision="bf16"), silent)
    assert "--precision fp16" in refusal.value.hint


@installed
def test_several_inputs_are_refused(tmp_path: Path) -> None:
    model, (case,) = graph(small, (1, 2, 17, 15))
    cases = (replace(case, feeds={**case.feeds, "mask": np.ones((1, 1), np.float32)}),)
    with pytest.raises(UsageError, match="one input and one output; this one has 2 inputs and 1 outputs"):
        EXPORTER.write(source_of(tmp_path, model, cases), silent)


@installed
def test_what_ncnn_has_no_layer_for_leaves_nothing(tmp_path: Path) -> None:
    model, cases = graph(six_axes, (1, 2, 12, 12))
    source = source_of(tmp_path, model, cases)
    with pytest.raises(BackendFailed, match="ncnn"):
        EXPORTER.write(source, silent)
    assert tree(source.scratch) == []


@installed
def test_another_network_leaves_nothing(tmp_path: Path) -> None:
    """Whatever pnnx made: it is held against the references."""
    model, (case,) = graph(small, (1, 2, 17, 15))
    source = source_of(tmp_path, model, (replace(case, wanted={"classes": case.wanted["classes"] * 1.001}),))
    with pytest.raises(BackendFailed, match=r"is another network: model\.fp32\.ncnn\.param in ncnn, in float32.* error"):
        EXPORTER.write(source, silent)
    assert tree(source.scratch) == []


@installed
def test_pnnx_fails_in_its_own_words(tmp_path: Path) -> None:
    model, cases = graph(small, (1, 2, 17, 15))
    model.graph.node[0].op_type = "Convolute"
    source = source_of(tmp_path, model, cases)
    with pytest.raises(
        BackendFailed, match=r"pnnx (was ended by signal|ended with status) \d+ .*last words: .*Convolute"
    ) as failure:
        EXPORTER.write(source, silent)
    assert "\x1b" not in str(failure.value)
    assert tree(source.scratch) == []


@installed
def test_defaults_that_miss_are_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half precision beyond its budget says nothing against an artifact in float32, and all against one in float16."""
    run = NcnnSession.run

    def coarse(self: NcnnSession, x: np.ndarray) -> np.ndarray:
        return run(self, x) * (1 if not self._net.opt.use_fp16_storage else 1.1)

    monkeypatch.setattr(NcnnSession, "run", coarse)
    model, cases = graph(small, (1, 2, 17, 15))
    found, _ = written(source_of(tmp_path / "wide", model, cases))
    assert len(found.checks) == 1
    assert "passes in float32" in found.notes[-1]
    assert "not at ncnn's defaults" in found.notes[-1]
    assert "use_fp16_storage" in found.notes[-1]
    with pytest.raises(BackendFailed, match="at its defaults") as failure:
        EXPORTER.write(source_of(tmp_path / "half", model, cases, precision="fp16"), silent)
    assert "fp32" in failure.value.hint


@installed
def test_damage_is_seen(tmp_path: Path) -> None:
    model, cases = graph(small, (1, 2, 17, 15))
    source = source_of(tmp_path, model, cases)
    _, param = written(source)
    weights, text = param.with_suffix(".bin"), param.read_text()
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4])
    with pytest.raises(BackendFailed, match=r"ncnn does not load model\.fp32\.ncnn\.bin"):
        EXPORTER.check(param, source.artifact, cases)
    weights.write_bytes(
        whole[:32] + bytes([whole[32] ^ 0xFF, whole[33] ^ 0xFF, whole[34] ^ 0xFF, whole[35] ^ 0x43]) + whole[36:]
    )
    assert not all(check.passed for check in EXPORTER.check(param, source.artifact, cases))
    weights.unlink()
    with pytest.raises(BackendFailed, match=r"ncnn does not load model\.fp32\.ncnn\.bin"):
        EXPORTER.check(param, source.artifact, cases)
    weights.write_bytes(whole)
    for damaged in (text[: len(text) // 2], text.replace("7767517", "1"), "", text.replace("\n", " ")):
        param.write_text(damaged)
        with pytest.raises(BackendFailed, match=r"damaged"):
            EXPORTER.check(param, source.artifact, cases)
    param.write_text(text.replace("Pooling  ", "Pooling2 "))
    with pytest.raises(BackendFailed, match="has no layer for Pooling2"):
        EXPORTER.check(param, source.artifact, cases)
    param.write_text(text)
    assert all(check.passed for check in EXPORTER.check(param, source.artifact, cases))


@installed
def test_the_runtime(tmp_path: Path) -> None:
    model, cases = graph(small, (3, 2, 17, 15))
    _, param = written(source_of(tmp_path, model, cases))
    images, wanted = cases[0].feeds["the image"], cases[0].wanted["classes"]
    job = Job((2, 17, 15), threads=1, compiled={"ncnn": Compiled(param, "fp32")})
    with RUNTIME.open(job) as session:
        assert np.abs(session.run(images) - wanted).max() <= 1e-5 * np.abs(wanted).max()
        assert session.timer(images)() > 0
        assert session.timer({"the image": images})() > 0
        for other in (images[:, :, :16], images.astype(np.float64), images[:0]):
            with pytest.raises(BackendFailed, match=r"takes 2x17x15 in float32"):
                session.timer(other)
    with pytest.raises(BackendFailed, match="there are none"), RUNTIME.open(replace(job, compiled={})):
        pass
    assert (RUNTIME.name, RUNTIME.device, RUNTIME.precision, RUNTIME.needs) == ("ncnn", "cpu", "float32", EXPORTER.name)
    assert isinstance(RUNTIME, Runtime)


@pytest.mark.parametrize(
    ("absent", "said"),
    [
        (("pnnx", "ncnn"), "pnnx and ncnn are not installed"),
        (("pnnx",), "pnnx is not installed"),
        (("ncnn",), "ncnn is not installed"),
        ((), ""),
    ],
)
def test_absent_packages(monkeypatch: pytest.MonkeyPatch, absent: tuple[str, ...], said: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in absent else object())
    for item, needed in ((Ncnn(), absent), (NcnnCpu(), tuple(name for name in absent if name == "ncnn"))):
        missing = item.missing()
        if not needed:
            assert missing is None
            continue
        assert missing is not None
        assert missing.hint == "pip install repdeploy[ncnn]"
        assert missing.what == (said if needed == absent else "ncnn is not installed")
