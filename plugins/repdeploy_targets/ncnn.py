"""ncnn, by way of pnnx: a `.param` text that names the layers and a `.bin` with the weights, for phones and small boards.

pnnx is given the proved ONNX file, not a trace of the module: of the sample bundles it makes the same bytes from opset 17 to 25
and from open and fixed batches, and what `--fold-normalize`, `--softmax` and `--input-name` asked for is in that file alone.
It has two conditions. The weights have to be inside the file (external data ends pnnx by a signal), and in float32 (it passes
convolutions in float16 by), so that `_readable` widens a graph in float16: what was rounded once stays what it is.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from repdeploy.errors import BackendFailed, UsageError
from repdeploy.exporters.interface import Case, Exporter, Feeds, Missing, Source, Written
from repdeploy.progress import Progress
from repdeploy.records import Artifact, Check
from repdeploy.runtimes.interface import Job

if TYPE_CHECKING:
    import onnx

MAGIC = "7767517"
"""The first line of every .param."""
MODEL = "model.onnx"
LARGEST = 2**31 - 1
"""Bytes of an ONNX file that holds its weights itself: a limit of protobuf."""
PACKAGES = ("pnnx", "ncnn")
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
TAKES_ONE = "ncnn is written for networks with one input and one output"
ELSEWHERE = "ncnn's tensors have at most four axes beside the batch; --to openvino or tensorrt may take this network"
HALF = ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic", "use_bf16_storage")
"""Options of a net that let it compute in less than float32. Winograd stays on: with it the sample models are off by 2e-6 at
most, and by 2e-7 without it, where 1e-4 is allowed."""
WARNING = "[W:onnxruntime:pnnx"
"""In lines about the machine that pnnx runs on, between those about the network."""
ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


class Ncnn(Exporter):
    """Judged twice: in float32 arithmetic, and as ncnn computes where its options are left alone, in half precision where the
    CPU has it. The first decides about an artifact in fp32, both about one in fp16."""

    name = "ncnn"
    title = "ncnn (pnnx)"

    def missing(self) -> Missing | None:
        return _missing(PACKAGES)

    def write(self, source: Source, progress: Progress) -> Written:
        """Raises UsageError for bf16, several inputs or outputs; BackendFailed where pnnx or ncnn do not take the network, or
        make another one of it. Then no file is left."""
        precision = source.options.precision
        if precision == "bf16":
            raise UsageError("ncnn stores float32 or float16", hint="give --precision fp32 or --precision fp16")
        sizes = _sizes(source)
        param, weights = (f"model.{precision}.ncnn.{kind}" for kind in ("param", "bin"))
        with tempfile.TemporaryDirectory(prefix="pnnx-", dir=source.scratch) as made:
            folder = Path(made)
            progress("running pnnx", 0, 2)
            said = _run_pnnx(folder, source, sizes, (param, weights))
            _require_layers(folder / param, said)
            if len(sizes) == 1:
                _state_size(folder / param, sizes[0][1:])
            progress("verifying ncnn", 1, 2)
            checks, verdict = _judge(folder / param, precision, source.cases)
            failed = next((check for check in checks if not check.passed), None)
            if failed is not None:
                how = failed.failure or f"error {failed.error:.3g}, budget {failed.budget:.3g}"
                raise BackendFailed(
                    f"what pnnx made of {source.onnx.name} is another network: {failed.subject}: {how}; it was not written",
                    hint=ELSEWHERE if precision == "fp32" else "float32 may hold what float16 does not: give --precision fp32",
                )
            for name in (param, weights):
                (folder / name).replace(source.scratch / name)
            progress("verifying ncnn", 2, 2)
        return Written(param, precision, tuple(checks), (weights,), (*_notes(source), verdict))

    def check(self, path: Path, artifact: Artifact, cases: Sequence[Case]) -> list[Check]:
        """What decides about the artifact, and what else passes."""
        return _judge(path, artifact.precision, cases)[0]


@dataclass(frozen=True, slots=True)
class NcnnCpu:
    """ncnn in float32 arithmetic; a file in fp16 as ncnn computes by itself, in half precision where the CPU has it."""

    name: str = "ncnn"
    device: str = "cpu"
    precision: str = "float32"
    layout: str = "NCHW"
    by_default: bool = True
    needs: str = "ncnn"

    def missing(self) -> Missing | None:
        return _missing(("ncnn",))

    @contextmanager
    def open(self, job: Job) -> Iterator[NcnnSession]:
        made = job.compiled.get(self.needs)
        if made is None:
            raise BackendFailed("ncnn runs files of its own, and there are none", hint="repdeploy export --to ncnn writes them")
        yield NcnnSession(made.path, job.threads, exact=made.precision != "fp16")


EXPORTER = Ncnn()
RUNTIME = NcnnCpu()


class NcnnSession:
    """A `.param` with the `.bin` beside it, on the CPU; `threads`: 0 for ncnn's own choice; `exact`: in float32 arithmetic.

    Raises BackendFailed where ncnn does not take the files, or an image of another size than they state.
    """

    def __init__(self, param: Path, threads: int = 0, *, exact: bool = True) -> None:
        import ncnn

        self._ncnn: Any = ncnn
        self._name = param.name
        self._size = _stated_size(_layers(param))
        _require_layers(param)
        self._net: Any = ncnn.Net()
        self._net.opt.use_vulkan_compute = False
        if threads:
            self._net.opt.num_threads = threads
        for option in HALF if exact else ():
            setattr(self._net.opt, option, False)
        for load, path in ((self._net.load_param, param), (self._net.load_model, param.with_suffix(".bin"))):
            if not path.is_file() or load(str(path)) != 0:
                raise BackendFailed(f"ncnn does not load {path.name}", hint="export with --to ncnn again")
        inputs, outputs = self._net.input_names(), self._net.output_names()
        if len(inputs) != 1 or len(outputs) != 1:
            raise BackendFailed(f"{TAKES_ONE}; {self._name} has {len(inputs)} and {len(outputs)}")
        self._input, self._output = inputs[0], outputs[0]

    def run(self, x: np.ndarray) -> np.ndarray:
        """(batch, ...) float32 in and out: every image by itself, since ncnn knows no batch."""
        return np.stack([np.array(self._once(image)) for image in self._images(x)])

    def timer(self, x: Feeds | np.ndarray) -> Callable[[], float]:
        images = self._images(next(iter(x.values())) if isinstance(x, dict) else x)

        def once() -> float:
            start = time.perf_counter()
            for image in images:
                self._once(image)
            return time.perf_counter() - start

        return once

    def _images(self, x: np.ndarray) -> list[Any]:
        size = x.shape[1:]
        if x.dtype != np.float32 or not len(x) or self._size not in ((), size):
            raise BackendFailed(
                f"{self._name} takes {_by(self._size) or 'images'} in float32, this is {x.dtype} of {_by(x.shape)}",
                hint=f"export with --input-shape 1x{_by(size)}",
            )
        # a Mat does not keep the array alive that it was made of: the clone has to be made while `image` names it
        return [self._ncnn.Mat(image).clone() for image in np.ascontiguousarray(x)]

    def _once(self, image: Any) -> Any:
        with self._net.create_extractor() as extractor:
            status, result = extractor.input(self._input, image), None
            if status == 0:  # extracting without an input ends the process
                status, result = extractor.extract(self._output)
        if status != 0 or result is None or result.empty():
            raise BackendFailed(f"ncnn failed on {self._name} (status {status})", hint=ELSEWHERE)
        return result


def _missing(packages: Sequence[str]) -> Missing | None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    if not absent:
        return None
    return Missing(f"{' and '.join(absent)} {'are' if len(absent) > 1 else 'is'} not installed", "pip install repdeploy[ncnn]")


def _sizes(source: Source) -> list[tuple[int, ...]]:
    """Of the input, with the batch that pnnx is told: one, or two where heights and widths stay open."""
    ends = {(len(case.feeds), len(case.wanted)) for case in source.cases}
    if ends != {(1, 1)}:
        inputs, outputs = max(ends, default=(0, 0))
        raise UsageError(f"{TAKES_ONE}; this one has {inputs} inputs and {outputs} outputs", hint=ELSEWHERE)
    is_open = "batch" in source.artifact.dynamic
    shapes = [next(iter(case.feeds.values())).shape for case in source.cases]
    return list(dict.fromkeys((1 if is_open else shape[0], *shape[1:]) for shape in shapes))


def _run_pnnx(folder: Path, source: Source, sizes: Sequence[tuple[int, ...]], names: tuple[str, str]) -> str:
    """Run it in a folder of its own, which it fills with files; returns what it said. Raises BackendFailed."""
    import onnx
    import pnnx

    model = _readable(onnx.load(source.onnx))
    if model.ByteSize() > LARGEST:
        raise BackendFailed("pnnx reads ONNX files of 2 GiB at most", hint=ELSEWHERE)
    onnx.save(model, folder / MODEL)
    # both sizes have to run: what is the same in both may become a constant, the rest stays open
    shapes = [f"inputshape{index or ''}=[{','.join(map(str, size))}]f32" for index, size in zip((0, 2), sizes, strict=False)]
    half = int(source.options.precision == "fp16")
    command = [pnnx.EXEC_PATH, MODEL, *shapes, f"fp16={half}", f"ncnnparam={names[0]}", f"ncnnbin={names[1]}"]
    try:
        run = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError as reason:
        raise BackendFailed(f"pnnx does not start: {reason.strerror}", hint="pip install --force-reinstall pnnx") from reason
    said = ESCAPES.sub("", (run.stdout + run.stderr).decode(errors="replace"))
    if run.returncode != 0 or not all((folder / name).is_file() for name in names):
        end = f"was ended by signal {-run.returncode}" if run.returncode < 0 else f"ended with status {run.returncode}"
        words = [line.strip() for line in said.splitlines() if line.strip() and WARNING not in line]
        last = " / ".join(words[-2:])[:300]
        hint = "this network takes one image size in ncnn: leave --dynamic spatial out" if len(sizes) > 1 else ELSEWHERE
        raise BackendFailed(f"pnnx {end} on {source.onnx.name}, its last words: {last or 'none'}", hint=hint)
    return said


def _readable(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in float32, without the casts that then do nothing; a float32 graph comes back as it was."""
    from onnx import TensorProto, numpy_helper, shape_inference

    def widen(tensor: onnx.TensorProto) -> None:
        if tensor.data_type == TensorProto.FLOAT16:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))

    graph = model.graph
    casts = {node.output[0]: node for node in graph.node if node.op_type == "Cast"}
    targets = [item for node in casts.values() for item in node.attribute if item.name == "to"]
    tensors = [*graph.initializer, *(item.t for node in graph.node for item in node.attribute if item.HasField("t"))]
    ends = [value.type.tensor_type for value in (*graph.input, *graph.output)]
    found = {*(item.i for item in targets), *(item.data_type for item in tensors), *(item.elem_type for item in ends)}
    if TensorProto.FLOAT16 not in found:
        return model
    for tensor in tensors:
        widen(tensor)
    for end in ends:
        end.elem_type = TensorProto.FLOAT if end.elem_type == TensorProto.FLOAT16 else end.elem_type
    for target in targets:
        target.i = TensorProto.FLOAT if target.i == TensorProto.FLOAT16 else target.i
    del graph.value_info[:]
    known = shape_inference.infer_shapes(model).graph
    types = {item.name: item.type.tensor_type.elem_type for item in (*known.input, *known.value_info, *known.output)}
    types |= {item.name: item.data_type for item in graph.initializer}
    for name, node in casts.items():
        if types.get(node.input[0]) == types.get(name) == TensorProto.FLOAT:
            node.op_type = "Identity"
            del node.attribute[:]
    return model


def _layers(param: Path) -> list[list[str]]:
    """Every layer's words: type, name, numbers of inputs and outputs, their names, parameters. Raises BackendFailed."""
    try:
        magic, counts, *lines = param.read_text(encoding="utf-8").splitlines()
        layers = [line.split() for line in lines]
        intact = magic.strip() == MAGIC and len(layers) == int(counts.split()[0]) and all(len(words) >= 4 for words in layers)
    except (OSError, ValueError, IndexError):  # a UnicodeDecodeError is a ValueError
        intact = False
    if not intact:
        raise BackendFailed(f"{param.name} is damaged, or no .param of ncnn", hint="export with --to ncnn again")
    return layers


def _require_layers(param: Path, said: str = "") -> None:
    """pnnx writes down what it cannot convert under a name of its own, with its parameters in its output, and calls that a
    success. Raises BackendFailed."""
    import ncnn

    for kind, name, *_ in _layers(param):
        if ncnn.layer_to_index(kind) < 0:
            stated = re.findall(rf"^ignore {re.escape(f'{kind} {name}')} param (\S+)", said, re.MULTILINE)
            raise BackendFailed(f"ncnn has no layer for {kind}({', '.join(stated)}) of this network", hint=ELSEWHERE)


def _state_size(param: Path, size: tuple[int, ...]) -> None:
    """Write the image's size onto the Input layer, as older converters did: ncnn computes the same with and without, but on an
    image of another size it may read past its memory, and nothing else in the files says which size was proved."""
    lines = param.read_text(encoding="utf-8").splitlines()
    keys = {1: (0,), 2: (1, 0), 3: (2, 1, 0), 4: (2, 11, 1, 0)}.get(len(size), ())
    stated = " ".join(f"{key}={side}" for key, side in zip(keys, size, strict=False))
    lines = [f"{line} {stated}".rstrip() if line.split()[0] == "Input" else line for line in lines]
    param.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _stated_size(layers: Sequence[Sequence[str]]) -> tuple[int, ...]:
    """(channels, height, width) of the Input layer; empty where it states none."""
    words = next((words for words in layers if words[0] == "Input"), ())
    found = dict(word.split("=", 1) for word in words if "=" in word)
    sides = [found.get(key, "") for key in ("2", "11", "1", "0")]
    return tuple(int(side) for side in sides if side.isdigit())


def _judge(param: Path, precision: str, cases: Sequence[Case]) -> tuple[list[Check], str]:
    """What decides about the artifact together with what else passes, and all of it in words. Raises BackendFailed."""
    exact = _checks(param, precision, cases, exact=True)
    try:
        usual = _checks(param, "fp16", cases, exact=False)
        bad = next((check for check in usual if not check.passed), None)
        failed = "" if bad is None else f"{bad.subject}: {bad.failure or f'error {bad.error:.0e}'}"
    except BackendFailed as reason:
        if precision == "fp16":
            raise
        usual, failed = [], str(reason)
    in_float = f"{param.name} passes in float32 (worst {_worst(exact):.0e})"
    if failed and precision == "fp32":
        return exact, f"{in_float}, not at ncnn's defaults ({failed}): switch {', '.join(HALF)} off"
    return [*exact, *usual], f"{in_float} and at ncnn's defaults (worst {_worst(usual):.0e})"


def _checks(param: Path, precision: str, cases: Sequence[Case], *, exact: bool) -> list[Check]:
    from repdeploy.exporters.judging import judged

    session = NcnnSession(param, exact=exact)
    output = next((name for case in cases for name in case.wanted), "")  # ncnn has names of its own

    def run(feeds: Feeds) -> dict[str, np.ndarray]:
        (x,) = feeds.values()
        return {output: session.run(x)}

    return judged(run, cases, precision, f"{param.name} in ncnn, {'in float32' if exact else 'at its defaults'}")


def _worst(checks: Sequence[Check]) -> float:
    return max((check.error for check in checks), default=0.0)


def _notes(source: Source) -> Iterator[str]:
    import ncnn
    import pnnx

    if "batch" in source.artifact.dynamic or source.artifact.input_shape[:1] > (1,):
        yield "ncnn has no batch: images are run one by one"
    kept = [layer.name for layer in source.artifact.wide if layer.operator in WEIGHTED]
    if kept:
        yield f"ncnn stores the weights of every layer in float16, of those kept in float32 as well: {', '.join(kept)}"
    yield f"written by pnnx {pnnx.__version__}, checked in ncnn {ncnn.__version__}: an older ncnn may not read it"


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
