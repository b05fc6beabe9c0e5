"""TensorRT engines from a typed ONNX: built here where there is a GPU, and prepared for the machine that has one.

One path for 10.x and 11.x: the network is strongly typed, so its precision is the graph's and no precision flag is set. What
was built is read back through the inspector, run, and held against the float64 references.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from repdeploy.bundle import replacing, write_text
from repdeploy.digest import digest
from repdeploy.errors import BackendFailed, UsageError, words
from repdeploy.exporters.interface import Case, Exporter, Missing, Source, Written
from repdeploy.exporters.judging import judged
from repdeploy.exporters.options import EngineOptions
from repdeploy.gates import PRECISION_BUDGETS
from repdeploy.graph.model_proof import PRECISIONS
from repdeploy.graph.onnx_source import read_onnx
from repdeploy.progress import Progress
from repdeploy.records import Artifact, Check
from repdeploy.runtimes import cuda_memory, tensorrt_cuda
from repdeploy.runtimes.tensorrt_cuda import EngineSession, quiet_logger

SCRIPT = "build_engine.py"
MIB = 1 << 20

Shapes = Mapping[str, tuple[int, ...]]
"""Of every input by name, without the batch."""


class TensorRtEngine(Exporter):
    name, title = "tensorrt", "TensorRT engine"

    def missing(self) -> Missing | None:
        absent = tensorrt_cuda.missing()
        if absent is None:
            return None
        lacking = [absent.what]
        if (device := cuda_memory.missing()) is not None and device.what not in lacking:
            lacking.append(device.what)
        return Missing("; ".join(lacking), f"copy the bundle to a machine that has both and run: python {SCRIPT}")

    def prepare(self, source: Source) -> tuple[str, ...]:
        precision = _precision(source)
        write_build_script(source, precision)
        line = trtexec_line(source.onnx.name, _profiled_inputs(source), source.batches, source.options.engine)
        whole = ", with its weights" if source.options.engine.strip_weights else ""
        return (f"{SCRIPT} builds, runs and checks the engine on the target machine{whole}", f"or: {line}")

    def write(self, source: Source, progress: Progress) -> Written:
        precision, options = _precision(source), source.options.engine
        where = "ampere+" if options.hardware_compatible else cuda_memory.architecture()
        stripped = ".stripped" if options.strip_weights else ""
        path = source.scratch / f"model.{precision}.{where}.trt{tensorrt_cuda.version()}{stripped}.plan"
        path.write_bytes(build(source.onnx, _profiled_inputs(source), source.batches, options, progress))
        weights = source.onnx if options.strip_weights else None
        session = EngineSession(path, weights=weights, host_code=options.version_compatible)
        try:
            _require_types(session, source)
            checks = _checks(session, path, precision, source.cases)
        finally:
            session.close()
        return Written(
            path.name, precision, tuple(checks), notes=_told(session), target=f"TensorRT {tensorrt_cuda.version()}, {where}",
            options=options.changed,
        )  # fmt: skip

    def check(self, path: Path, artifact: Artifact, cases: Sequence[Case]) -> list[Check]:
        weights = _made_from(path.parent, artifact) if "strip_weights" in artifact.options else None
        session = EngineSession(path, weights=weights, host_code="version_compatible" in artifact.options)
        try:
            return _checks(session, path, artifact.precision, cases)
        finally:
            session.close()


EXPORTER = TensorRtEngine()


def build(onnx: Path, shapes: Shapes, batches: tuple[int, int, int], options: EngineOptions, progress: Progress) -> bytes:
    """A serialised engine; `shapes`: of the inputs with open sizes.

    Raises BackendFailed with TensorRT's own words, UsageError for a timing cache of another machine.
    """
    import tensorrt as trt

    logger = quiet_logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        said = "; ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
        raise BackendFailed(f"TensorRT {tensorrt_cuda.version()} does not take {onnx.name}: {words(said, 400)}")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    (config.set_flag if options.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace * MIB)
    if options.level is not None:
        config.builder_optimization_level = options.level
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
    if shapes:
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, *((batch, *shape) for batch in batches))
        config.add_optimization_profile(profile)
    _read_cache(config, options.timing_cache)
    monitor = _monitor(trt, progress)
    config.progress_monitor = monitor
    plan = builder.build_serialized_network(network, config)
    if monitor.cancelled:
        raise KeyboardInterrupt
    if plan is None:
        raise BackendFailed(f"TensorRT could not build the engine{logger.because()}", hint="try a larger --workspace")
    if options.timing_cache is not None:
        with replacing(options.timing_cache) as temporary:
            temporary.write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def write_build_script(source: Source, precision: str) -> Path:
    """A self-contained script beside the ONNX: build, run, compare. Needs TensorRT and cuda-python, not this package."""
    text = files("repdeploy.exporters").joinpath("build_engine.py.in").read_text(encoding="utf-8")
    options = source.options
    mean, std = (options.normalize.mean, options.normalize.std) if options.normalize is not None else ((), ())
    values = {
        "ONNX": source.onnx.name,
        "BUDGET": f"{PRECISION_BUDGETS[precision]:g}",
        "SHAPES": dict(source.shapes),
        "PROFILED": sorted(_profiled_inputs(source)),
        "PRECISION": precision,
        "BATCHES": ", ".join(map(str, source.batches)),
        "RENAMED": (source.image, options.input_name or source.image),
        "MEAN": mean,
        "STD": std,
        "SOFTMAX": options.softmax,
        "TF32": "set" if options.engine.tf32 else "clear",
    }
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    write_text(source.folder / SCRIPT, text.rstrip("\n"))
    return source.folder / SCRIPT


def trtexec_line(onnx: str, shapes: Shapes, batches: Sequence[int], options: EngineOptions) -> str:
    """The same build with NVIDIA's own tool."""
    bounds = "".join(
        " "
        + shlex.quote(
            f"--{bound}Shapes=" + ",".join(f"{name}:{'x'.join(map(str, (batch, *shape)))}" for name, shape in shapes.items())
        )
        for bound, batch in zip(("min", "opt", "max"), batches, strict=True)
        if shapes  # trtexec refuses them for a graph whose sizes are fixed
    )
    flags = {
        "--noTF32": not options.tf32,
        f"--memPoolSize=workspace:{options.workspace}M": options.workspace is not None,
        f"--builderOptimizationLevel={options.level}": options.level is not None,
        "--hardwareCompatibilityLevel=ampere+": options.hardware_compatible,
        "--versionCompatible": options.version_compatible,
        "--stripWeights": options.strip_weights,
    }
    chosen = " ".join(flag for flag, wanted in flags.items() if wanted)
    return (
        f"trtexec --onnx={onnx}{bounds} --stronglyTyped {chosen}{' ' if chosen else ''}"
        "--profilingVerbosity=detailed --saveEngine=model.plan"
    )


def _made_from(folder: Path, artifact: Artifact) -> Path:
    """The graph whose weights a plan lacks. Raises BackendFailed where it is there no more."""
    found = next((path for path in sorted(folder.glob("*.onnx")) if digest(path) == artifact.made_from), None)
    if found is None:
        raise BackendFailed(
            f"{artifact.file} has no weights of its own, and the graph it was made from is there no more",
            hint="build it again with repdeploy export --trt --strip-weights",
        )
    return found


def _profiled_inputs(source: Source) -> Shapes:
    """Of a graph whose sizes are all fixed there is nothing to profile."""
    return source.shapes if source.artifact.dynamic else {}


def _precision(source: Source) -> str:
    """The budget's name: TF32 rounds inside, whatever the graph says."""
    return "tf32" if source.options.engine.tf32 and source.artifact.precision == "fp32" else source.artifact.precision


def _read_cache(config: Any, path: Path | None) -> None:
    if path is None:
        return
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        raise UsageError(
            f"--timing-cache {path}: it was written by another TensorRT version or for another GPU", hint="give another file"
        )


def _monitor(trt: Any, progress: Progress) -> Any:
    """TensorRT's phases as our progress; the outermost one is told."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return self._tell(phase_name, step + 1)

        def phase_finish(self, phase_name: str) -> None:
            self._steps.pop(phase_name, None)

        def _tell(self, phase: str, done: int) -> bool:
            """Whether to go on: an exception must not leave through TensorRT's own frames."""
            if phase == next(iter(self._steps), None):
                try:
                    progress("building the TensorRT engine", min(done, self._steps[phase]), self._steps[phase])
                except KeyboardInterrupt:
                    self.cancelled = True
            return not self.cancelled

    return Monitor()


def _checks(session: EngineSession, path: Path, precision: str, cases: Sequence[Case]) -> list[Check]:
    """At the smallest, optimal and largest batch of the profile. Raises UsageError where no reference fits it."""
    of_size = [case for case in cases if _fits(session, case, from_axis=1)]
    fitting = [case for case in _profiled(session, of_size) if _fits(session, case)] if of_size else []
    if not fitting:
        raise UsageError("no recorded reference fits the engine's profile", hint="let --min, --opt and --max include 1, 2 or 5")
    return judged(session.run_all, fitting, precision, f"{path.name} in TensorRT")


def _profiled(session: EngineSession, cases: Sequence[Case]) -> list[Case]:
    """Where everything has the batch in front, the largest case at each batch of the profile; else the cases as they are."""
    largest = max(cases, key=lambda case: len(next(iter(case.feeds.values()))))
    size = len(next(iter(largest.feeds.values())))
    arrays = (*largest.feeds.values(), *largest.wanted.values())
    if len(session.inputs) > 1 or any(array.ndim == 0 or len(array) != size for array in arrays):
        return list(cases)
    found = []
    for batch in dict.fromkeys(shape[0] for shape in session.profile(session.inputs[0])):
        rows = np.arange(batch) % size
        sides = ({name: array[rows] for name, array in side.items()} for side in (largest.feeds, largest.wanted))
        found.append(Case(f"batch {batch}", *sides))
    return found


def _fits(session: EngineSession, case: Case, from_axis: int = 0) -> bool:
    """Whether an engine takes the inputs of a case; `from_axis` 1: at some batch."""
    for name, array in case.feeds.items():
        low, _, high = session.profile(name)
        bounds = list(zip(low, array.shape, high, strict=False))[from_axis:]
        if len(low) != array.ndim or not all(least <= size <= most for least, size, most in bounds):
            return False
    return True


def _require_types(session: EngineSession, source: Source) -> None:
    """Raises BackendFailed where the built engine has other types than its graph: inputs, outputs, layers."""
    model = read_onnx(source.onnx).model
    ports = {value.name or "": value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    for name in (*session.inputs, *session.outputs):
        wanted = ports.get(name)
        if wanted is not None and session.types[name] != np.dtype(wanted.numpy()):
            raise BackendFailed(f"the engine's {name} is {session.types[name]}, the graph's is {wanted.name.lower()}")
    there = {PRECISIONS[value.dtype] for node in model.graph for value in node.outputs if value.dtype in PRECISIONS}
    there |= {PRECISIONS[dtype] for dtype in ports.values() if dtype in PRECISIONS}
    quantized = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph)
    for layer in session.layers():
        foreign = set(layer.types) - there - ({"int8", "fp8", "int4"} if quantized else set())
        if foreign:
            raise BackendFailed(f"the engine computes {layer.name} in {', '.join(sorted(foreign))}, which its graph has not")
    made = {name for layer in session.layers() for name in layer.types}
    precision = source.artifact.precision
    if made and precision in ("fp16", "bf16") and precision not in made:
        raise BackendFailed(f"no layer of the engine computes in {precision}")


def _told(session: EngineSession) -> tuple[str, ...]:
    counts: dict[str, int] = {}
    for layer in session.layers():
        for name in set(layer.types):
            counts[name] = counts.get(name, 0) + 1
    shown = ", ".join(f"{count} with {name}" for name, count in sorted(counts.items()))
    return (f"the inspector finds {len(session.layers())} layers" + (f": {shown}" if shown else ""),)
