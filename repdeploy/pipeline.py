"""The verbs of the tool, for Python and the command line alike: flag names are keywords, answers are frozen records.

Tensor libraries are imported by the verb that needs them, behind whatever can start without them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from repdeploy.digest import Digest
from repdeploy.errors import BackendMissing, UsageError
from repdeploy.measurements import Bench, BenchRow, Suite, TrainSteps
from repdeploy.progress import Progress, silent
from repdeploy.records import (
    Conversion,
    Dtype,
    Dynamic,
    Export,
    FamilyInfo,
    Gates,
    Inspection,
    Precision,
    Tool,
    Verification,
)

if TYPE_CHECKING:
    from repdeploy.bundle import Bundle
    from repdeploy.checkpoint import Checkpoint
    from repdeploy.page.stage import Report

PathLike = str | Path
GRAPH_SUFFIX = ".onnx"
USUAL_BATCHES = (1, 8)
"""Of a benchmark: latency, and throughput that a small device still reaches."""
MOST = 1_000_000_000
"""Threads and images per batch; beyond, libraries fail in words of their own."""
SUITE_BATCHES = {"cpu": 4, "cuda": 128}
TRAIN_BATCHES = {"cpu": 16, "cuda": 64}
TRAIN_SIDES = (112, 224)
"""For a suite and for training steps: as the papers have it on a GPU, small enough for a CPU to finish in minutes."""
Shape = str | Sequence[int]


def inspect(
    checkpoint: PathLike,
    *,
    family: str | None = None,
    weights: str = "model",
    arch: str | None = None,
    set: Iterable[str] = (),
    branches: bool = False,
    progress: Progress = silent,
) -> Inspection:
    """What a checkpoint holds, read without executing anything in it; `branches`: how each block's branches share its kernel.

    Raises InputError, UsageError.
    """
    hashing = Digest(Path(checkpoint))
    from repdeploy import inspection, registry

    loaded = _load(checkpoint, family, weights)
    return inspection.inspect(loaded, hashing, registry.families(), family, arch, _several(set), branches, progress)


def convert(
    checkpoint: PathLike,
    *,
    family: str | None = None,
    output: PathLike | None = None,
    weights: str = "model",
    arch: str | None = None,
    set: Iterable[str] = (),
    input_shape: Shape | None = None,
    expect: PathLike | None = None,
    gates: Gates = "all",
    dtype: Dtype = "float32",
    dry_run: bool = False,
    force: bool = False,
    keep_failed: bool = False,
    seed: int = 0,
    model: str | None = None,
    model_args: str | Mapping[str, object] | None = None,
    force_squeeze: bool = False,
    prune_dead: bool = False,
    progress: Progress = silent,
) -> Conversion:
    """Fuse a training checkpoint, or squeeze an ONNX graph; prove the result, write a bundle.

    `model` (package.module:factory, path/to/file.py:factory or timm:NAME) builds the user's own network, called with
    `model_args`, a mapping or its JSON; the checkpoint is loaded into it and its graph is squeezed. `prune_dead`: channels
    that are the same constant everywhere, or that nothing reads, leave the fused network.
    Raises UsageError, InputError and VerificationFailed (repdeploy.errors), each with its hint and exit status.
    """
    _one_of("--gates", gates, ("all", "blocks"))
    _one_of("--dtype", dtype, ("float32", "float64"))
    if not 0 <= seed < 1 << 63:
        raise UsageError(f"--seed {seed}: expected a whole number from 0 to 2^63 - 1")
    path, settings = Path(checkpoint), _several(set)
    is_graph = path.suffix.lower() == GRAPH_SUFFIX
    if is_graph:
        _only_for_checkpoints(
            family=family, arch=arch, set=settings or None, model=model, model_args=model_args,
            weights=None if weights == "model" else weights, dtype=None if dtype == "float32" else dtype,
            prune_dead=prune_dead or None,
        )  # fmt: skip
        _require_file(path)
    elif model is None and (model_args is not None or force_squeeze):
        flag = "--model-args" if model_args is not None else "--force-squeeze"
        raise UsageError(f"{flag} goes with --model or an ONNX file: a checkpoint alone has no graph")
    if model is not None and prune_dead:
        raise UsageError(
            "--prune-dead works on networks that are known here, not on the graph of --model", hint="leave one of them out"
        )
    hashing = Digest(path)
    from repdeploy.bundle import SUFFIX
    from repdeploy.delivery import Request

    command = _command(
        "convert",
        path.name,
        family=family,
        weights=None if weights == "model" else weights,
        arch=arch,
        set=settings,
        input_shape=_joined(input_shape),
        expect=None if expect is None else Path(expect).name,
        gates=None if gates == "all" else gates,
        dtype=None if dtype == "float32" else dtype,
        seed=seed or None,
        model=model,
        model_args=json.dumps(model_args) if isinstance(model_args, Mapping) else model_args,
        force_squeeze=force_squeeze or None,
        prune_dead=prune_dead or None,
    )
    request = Request(
        family=family,
        arch=arch,
        settings=settings,
        input_shape=parse_shape(input_shape),
        expect=Path(expect) if expect is not None else None,
        gates=gates,
        dtype=dtype,
        dry_run=dry_run,
        force=force,
        keep_failed=keep_failed,
        seed=seed,
        force_squeeze=force_squeeze,
        prune_dead=prune_dead,
        command=command,
    )
    target = Path(output) if output is not None else Path(f"{stem(path)}{SUFFIX}")
    if is_graph:
        from repdeploy import graph_fusion

        return graph_fusion.convert(path, hashing, target, request, progress)
    from repdeploy import registry

    loaded = _load(checkpoint, family, weights)
    if model is not None:
        from repdeploy import own_model

        factory = own_model.Factory(model, own_model.arguments(model_args))
        return own_model.convert(loaded, factory, hashing, registry.families(), target, request, progress)
    from repdeploy import fusion

    return fusion.convert(loaded, hashing, registry.families(), target, request, progress)


def verify(
    bundle: PathLike | None = None,
    other: PathLike | None = None,
    *,
    against: PathLike | None = None,
    input_shape: Shape | None = None,
    seed: int = 1,
    progress: Progress = silent,
) -> Verification:
    """Replay a bundle's references against every artifact in it; with `against`, run the gates anew on other images; with
    `other`, compare two artifacts. Raises UsageError, InputError; a check that fails is in the answer."""
    from repdeploy import registry, verification

    shape, families = parse_shape(input_shape), registry.families()
    if other is not None:
        if bundle is None:
            raise UsageError("verify A B compares two artifacts; only one was given")
        if against is not None:
            raise UsageError("--against goes with one bundle, not with two artifacts")
        return verification.compare(Path(bundle), Path(other), families, shape, seed)
    opened = _open(bundle)
    if against is None and shape is not None:
        raise UsageError("--input-shape goes with --against or with two artifacts: a replay uses the recorded images")
    if against is None:
        return verification.replay(opened, families, progress)
    if opened.manifest.graph is not None:
        return verification.squeezed_again(opened, Path(against), shape, seed, progress)
    checkpoint = _load(against, None, opened.manifest.source.weights)
    return verification.again(opened, checkpoint, families, shape, seed, progress)


def export(
    bundle: PathLike | None = None,
    *,
    trt: bool = False,
    openvino: bool = False,
    torch: bool = False,
    to: Sequence[str] = (),
    precision: Precision = "fp32",
    input_shape: Shape | None = None,
    output: PathLike | None = None,
    dynamic: Dynamic = "batch",
    opset: int | None = None,
    fold: bool = True,
    simplify: bool = False,
    input_name: str | None = None,
    fold_normalize: str | None = None,
    softmax: bool = False,
    io_dtype: Precision = "fp32",
    keep_fp32: Sequence[str] = (),
    sample: PathLike | None = None,
    batches: tuple[int, int, int] | None = None,
    timing_cache: PathLike | None = None,
    workspace: int | None = None,
    optimization_level: int | None = None,
    tf32: bool = False,
    hardware_compatible: bool = False,
    version_compatible: bool = False,
    strip_weights: bool = False,
    progress: Progress = silent,
) -> Export:
    """Write the artifacts of a bundle, ONNX by default, and prove each against the float64 reference.

    `to`: exporters by name, of which `trt`, `openvino` and `torch` are short forms. `precision`: of the graph itself, with
    `keep_fp32` (operators, layers, regular expressions) and what float16 cannot hold left in float32; `sample` (.npz, array
    `input`): images that show what that is, beside the gates' own. `dynamic`: the axes that
    stay open. `fold`: squeeze what the blocks leave (norms, scales) where that is exact. `fold_normalize`: means, then
    deviations, that the graph applies to its image. What follows `batches` (smallest, optimal, largest) is TensorRT's.
    What a target lacks on this machine is in the answer (`missing`), with all that another machine needs written.
    Raises UsageError, InputError, VerificationFailed, BackendMissing, BackendFailed.
    """
    _one_of("--dynamic", dynamic, ("batch", "spatial", "none"))
    _one_of("--precision", precision, ("fp32", "fp16", "bf16"))
    _one_of("--io-dtype", io_dtype, ("fp32", "fp16", "bf16"))
    short = {"tensorrt": trt, "openvino": openvino, "torch": torch}
    targets = tuple(dict.fromkeys((*(name for name, asked in short.items() if asked), *_several(to))))
    if targets and output is not None:
        raise UsageError(
            f"--output takes the ONNX out of the bundle, where {', '.join(targets)} needs it", hint="leave one of the two out"
        )
    from repdeploy.exporters.options import EngineOptions, Normalization, Options

    engine = EngineOptions(
        batches=batches,
        timing_cache=Path(timing_cache) if timing_cache is not None else None,
        workspace=workspace,
        level=optimization_level,
        tf32=tf32,
        hardware_compatible=hardware_compatible,
        version_compatible=version_compatible,
        strip_weights=strip_weights,
    )
    if engine != EngineOptions() and "tensorrt" not in targets:
        flag = next(iter(engine.changed), "timing_cache").replace("_", "-")
        flag = "--min, --opt, --max" if flag == "batches" else f"--{flag}"
        raise UsageError(f"{flag}: only TensorRT engines are built with that", hint="give --trt as well, or leave it out")
    options = Options(
        targets=targets,
        precision=precision,
        dynamic=dynamic,
        opset=opset,
        fold=fold,
        simplify=simplify,
        input_name=input_name,
        normalize=Normalization.parse(fold_normalize) if fold_normalize is not None else None,
        softmax=softmax,
        io=io_dtype,
        keep=_several(keep_fp32),
        sample=Path(sample) if sample is not None else None,
        engine=engine,
    )
    shape = parse_shape(input_shape)
    from repdeploy import registry
    from repdeploy.exporters import stage
    from repdeploy.rebuild import require_network

    opened = _open(bundle)
    if opened.manifest.graph is None:
        require_network(opened)
    smallest, optimal, largest = batches or (None, None, None)
    command = _command(
        "export",
        to=targets,
        precision=None if precision == "fp32" else precision,
        input_shape=_joined(input_shape),
        dynamic=None if dynamic == "batch" else dynamic,
        opset=opset,
        no_fold=None if fold else True,
        simplify=simplify or None,
        input_name=input_name,
        fold_normalize=fold_normalize,
        softmax=softmax or None,
        io_dtype=None if io_dtype == "fp32" else io_dtype,
        keep_fp32=_several(keep_fp32),
        sample=None if sample is None else Path(sample).name,
        min=smallest,
        opt=optimal,
        max=largest,
        workspace=workspace,
        optimization_level=optimization_level,
        tf32=tf32 or None,
        hardware_compatible=hardware_compatible or None,
        version_compatible=version_compatible or None,
        strip_weights=strip_weights or None,
    )
    return stage.export(
        opened,
        registry.families(),
        shape or opened.manifest.input_shape,
        options,
        output=Path(output) if output is not None else None,
        command=command,
        progress=progress,
    )


def bench(
    subject: PathLike | None = None,
    other: PathLike | None = None,
    *,
    device: str = "cpu",
    batch: Sequence[int] | None = None,
    input_shape: Shape | None = None,
    threads: int | None = None,
    seconds: float = 4.0,
    runtime: Sequence[str] = (),
    trust_engine: bool = False,
    latency_only: bool = False,
    resume: bool = False,
    baseline: PathLike | None = None,
    progress: Progress = silent,
) -> Bench:
    """Measure training-time against deploy network per runtime and batch size (a bundle), one ONNX file or TensorRT plan alone,
    or one ONNX file against an `other`.

    `batch`: 1 and 8 when left out, or the one that a graph is fixed to. `trust_engine`: load a plan that no manifest vouches
    for; that can run code of whoever built it. `latency_only`: no memory, nothing from inside the networks, no density table.
    `resume`: rows that the bundle's bench.json holds from this machine, with these versions, are not measured again.
    `baseline`: an earlier bench.json, or the bundle it lies in, that the result is compared with. On a machine without torch a
    bundle's compiled files are measured. Rows are written into the bundle as they come.

    Raises UsageError, InputError, BackendMissing when nothing on that device can run, BackendFailed when a named runtime
    crashes.
    """
    _one_of("--device", device, ("cpu", "cuda"))
    if (batch is not None and (not batch or min(batch) < 1)) or not seconds > 0 or (threads is not None and threads < 1):
        raise UsageError("a benchmark needs batch sizes and threads of at least 1, and a positive time")
    if max((threads or 1, *(batch or ()))) > MOST:
        raise UsageError(f"a benchmark takes batch sizes and threads up to {MOST:,}")
    shape = parse_shape(input_shape)
    from repdeploy.benchmark import results, stage
    from repdeploy.benchmark.conditions import cores, environment

    earlier = results.read(Path(baseline)) if baseline is not None else None
    if earlier is not None:
        results.require_same_machine(earlier, environment(cores()))
    path = Path(subject) if subject is not None else newest_bundle()
    second = Path(other) if other is not None else None
    for file in (path, second):
        if file is not None and not file.exists():
            raise UsageError(f"there is no file or bundle {file}", hint="check the path")
    opened, image, own_batch, available = _measurable(path, shape, trust_engine)
    if second is not None:
        for file in (path, second):
            if file.suffix != GRAPH_SUFFIX or not file.is_file():
                raise UsageError(f"{file} is no ONNX file", hint="a bundle is measured alone, two ONNX files beside each other")
    count = threads or cores()
    here = environment(count)
    if own_batch and batch and tuple(batch) != (own_batch,):
        raise UsageError(f"{path.name} is fixed to a batch of {own_batch}", hint=f"leave --batch out, or give {own_batch}")
    network = ""
    if opened is not None:
        network = results.fingerprint(opened)
        if not os.access(opened.path, os.W_OK):
            raise UsageError(f"{opened.path} cannot be written, and a benchmark is kept in its bundle", hint="copy the bundle")
    before = results.stored(opened) if opened is not None else None
    wanted = stage.Wanted(
        path,
        image,
        device,
        tuple(dict.fromkeys(batch or ((own_batch,) if own_batch else USUAL_BATCHES))),
        count,
        seconds,
        tuple(runtime),
        available,
        deep=not latency_only,
        other=second,
        before=results.resumable(before, image, device, count, here, network) if resume else None,
    )

    def keep(row: BenchRow) -> None:
        if opened is not None:
            results.require_same_network(opened, network)
            results.merge(opened, Bench(path.name, (row,), here, subject_sha256=network))

    result = replace(stage.bench(wanted, progress, keep), subject_sha256=network)
    if earlier is not None:
        result = replace(result, baseline=results.compared(earlier, result))
        if earlier.subject != result.subject:
            said = f"the baseline was measured on {earlier.subject}"
            result = replace(result, notes=(*result.notes, said))
    if opened is not None:
        results.require_same_network(opened, network)
        results.merge(opened, result)
    return result


def bench_suite(
    name: str,
    *,
    device: str = "cpu",
    batch: Sequence[int] | None = None,
    threads: int | None = None,
    seconds: float = 4.0,
    runtime: Sequence[str] = (),
    progress: Progress = silent,
) -> Suite:
    """Measure a paper's networks on this device: "repvgg-paper" is RepVGG, table 4.

    `batch`: one; as in the paper on a GPU, 4 on a CPU when left out. `runtime`: torch when left out.

    Raises UsageError, BackendMissing, BackendFailed where no network ran.
    """
    _one_of("--device", device, ("cpu", "cuda"))
    if (batch is not None and (len(batch) != 1 or batch[0] < 1)) or not seconds > 0 or (threads is not None and threads < 1):
        raise UsageError("a suite is measured at one batch size of at least 1, with at least 1 thread and a positive time")
    from repdeploy import suites
    from repdeploy.benchmark import tables
    from repdeploy.benchmark.conditions import cores

    definition = suites.suite(name)
    size = batch[0] if batch else SUITE_BATCHES[device]
    return tables.suite(definition, device, size, threads or cores(), seconds, tuple(runtime), progress)


def train_step(
    models: Sequence[str] = (),
    *,
    device: str = "cpu",
    batch: Sequence[int] | None = None,
    sides: Sequence[int] | None = None,
    threads: int | None = None,
    seconds: float = 10.0,
    progress: Progress = silent,
) -> TrainSteps:
    """Time and memory of one training step per network and resolution: what block kinds cost while they train.

    `models`: `module:factory`, as --model names them; a ResNet-18 of every block kind when left out. `sides`: of square images,
    at least two. `seconds`: of timed steps per resolution.

    Raises UsageError, BackendMissing, BackendFailed where none could be trained.
    """
    _one_of("--device", device, ("cpu", "cuda"))
    taken = tuple(dict.fromkeys(sides or TRAIN_SIDES))
    if batch is not None and (len(batch) != 1 or batch[0] < 1):
        raise UsageError("training steps are measured at one batch size of at least 1")
    if len(taken) < 2 or min(taken) < 1 or not seconds > 0 or (threads is not None and threads < 1):
        raise UsageError(
            "training steps are measured at two resolutions or more, to see what grows with them",
            hint="give --side twice, for example --side 64 --side 128",
        )
    from repdeploy.benchmark import tables
    from repdeploy.benchmark.conditions import cores
    from repdeploy.runtimes import torch_eager
    from repdeploy.training_cost import usual_models

    if (absent := torch_eager.missing(device)) is not None:
        raise BackendMissing(f"nothing here trains on {device}: {absent.what}", hint=absent.hint)
    size = batch[0] if batch else TRAIN_BATCHES[device]
    return tables.train_steps(
        tuple(models) or usual_models(), device, size, sorted(taken), threads or cores(), seconds, progress
    )


def _measurable(
    path: Path, shape: tuple[int, ...] | None, trust_engine: bool
) -> tuple[Bundle | None, tuple[int, ...], int | None, set[str]]:
    """What there is to measure: the bundle, the image, the one batch size a graph is fixed to, what runtimes can be given."""
    from repdeploy.bundle import Bundle
    from repdeploy.runtimes.interface import NETWORK, ONNX
    from repdeploy.vouching import PLAN_SUFFIXES, compiled_files, require_vouched

    available: set[str] = {NETWORK, ONNX}
    with_torch = importlib.util.find_spec("torch") is not None
    if path.is_file() and path.suffix in PLAN_SUFFIXES:
        known = require_vouched(path, trust_engine)
        taken = shape or known.input_shape
        if not taken:
            raise UsageError(f"{path.name} does not say its image size before it is loaded", hint="give it with --input-shape")
        return None, taken[1:], None, {"tensorrt"}
    if path.is_file():
        from repdeploy.graph.file_images import fixed_batch, image_of_file

        batch = fixed_batch(path)
        return None, image_of_file(path, shape), batch, available if with_torch else {ONNX}
    opened = Bundle(path)
    opened.require_verified()
    taken = shape or opened.manifest.input_shape
    available |= set(compiled_files(opened))
    own_batch = None
    if not with_torch:
        available -= {NETWORK, ONNX}  # what is left of a bundle is what was compiled
    elif opened.manifest.graph is not None:
        from repdeploy.graph.file_images import fixed_batch

        own_batch = fixed_batch(opened.squeezed_graph())
    else:
        from repdeploy import registry
        from repdeploy.rebuild import check_image, require_network

        require_network(opened)
        check_image(opened, registry.families(), taken)
    return opened, taken[1:], own_batch, available


def report(bundle: PathLike | None = None, *, output: PathLike | None = None, markdown: bool = False) -> Report:
    """One page that tells all that is recorded in a bundle: report.html in it, or `output`.

    `markdown`: GitHub-flavoured Markdown, in the answer's `text` where there is no `output`. Neither needs a tensor library.

    Raises UsageError, InputError, BackendMissing where an HTML page's libraries are not here.
    """
    from repdeploy.page import stage

    return stage.report(_open(bundle), Path(output) if output is not None else None, markdown)


def families() -> tuple[FamilyInfo, ...]:
    """The installed families, a broken plugin with its error."""
    from repdeploy import registry

    return registry.describe()


def doctor() -> tuple[Tool, ...]:
    """What is installed, what is missing and how to get it."""
    from repdeploy.environment import examine

    return examine()


def profile(smallest: int | None, optimal: int | None, largest: int | None) -> tuple[int, int, int] | None:
    """--min, --opt and --max, with what is not said chosen around the rest; None where nothing is said."""
    if smallest is optimal is largest is None:
        return None
    from repdeploy.exporters.options import BATCHES

    low = smallest if smallest is not None else min(BATCHES[0], optimal or 1, largest or 1)
    high = largest if largest is not None else max(BATCHES[2], optimal or 1, low)
    return low, optimal if optimal is not None else min(max(BATCHES[1], low), high), high


def parse_shape(shape: Shape | None) -> tuple[int, ...] | None:
    """`1x3x224x224` or a sequence -> (batch, channels, height, width). Raises UsageError."""
    if shape is None:
        return None
    try:
        parsed = tuple(int(part) for part in shape.lower().split("x")) if isinstance(shape, str) else tuple(map(int, shape))
    except ValueError:
        parsed = ()
    if len(parsed) != 4 or min(parsed) < 1:
        raise UsageError(f"--input-shape {shape}: expected BATCHxCHANNELSxHEIGHTxWIDTH", hint="for example 1x3x224x224")
    return parsed


def stem(path: Path) -> str:
    """The checkpoint's name without its extensions: best.pth.tar -> best."""
    name = path.name
    for suffix in (".tar", ".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".hdf5", ".h5", GRAPH_SUFFIX):
        name = name.removesuffix(suffix)
    return name or path.name


def newest_bundle() -> Path:
    """The bundle that commands without a path take. Raises UsageError when there is none."""
    from repdeploy.bundle import newest

    return newest(Path())


def _open(bundle: PathLike | None) -> Bundle:
    from repdeploy.bundle import Bundle

    return Bundle(Path(bundle) if bundle is not None else newest_bundle())


def _load(path: PathLike, family: str | None, weights: str) -> Checkpoint:
    from repdeploy import registry
    from repdeploy.checkpoint import load

    if family is not None:
        registry.require(family)
    _one_of("--weights", weights, ("model", "ema"))
    return load(Path(path), weights)


def _only_for_checkpoints(**given: object) -> None:
    """Raises UsageError for options that say something about a checkpoint, where a graph was given."""
    flag = next((name for name, value in given.items() if value is not None), None)
    if flag is not None:
        raise UsageError(
            f"--{flag.replace('_', '-')} is about a checkpoint, and this is an ONNX graph, which says everything itself",
            hint="leave it out",
        )


def _require_file(path: Path) -> None:
    """Raises UsageError, as for a checkpoint."""
    if not path.is_file():
        raise UsageError(f"{path} is a folder" if path.is_dir() else f"there is no file {path}", hint="check the path")


def _several(texts: Iterable[str]) -> tuple[str, ...]:
    return (texts,) if isinstance(texts, str) else tuple(texts)


def _one_of(flag: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{flag} {value}: expected {' or '.join(choices)}")


def _joined(shape: Shape | None) -> str | None:
    parsed = parse_shape(shape)
    return "x".join(map(str, parsed)) if parsed else None


def _command(verb: str, *arguments: str, **options: object) -> str:
    """The command line that does the same again."""
    words = ["repdeploy", verb, *arguments]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        for item in value if isinstance(value, tuple) else (value,):
            if item is True:
                words.append(flag)
            elif item is not None:
                words += [flag, str(item)]
    return shlex.join(words)
