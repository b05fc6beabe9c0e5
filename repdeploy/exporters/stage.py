"""Export: artifacts into a bundle, each proved (gate 4) before the manifest names it; what is current is not made again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import onnx
import onnx_ir as ir

from repdeploy.bundle import MANIFEST, PARTIAL, Bundle, replacing
from repdeploy.digest import digest
from repdeploy.errors import BackendFailed, InputError, UsageError, VerificationFailed
from repdeploy.exporters import ends, onnx_file, registry, simplifying
from repdeploy.exporters.folding import folded, norms_in
from repdeploy.exporters.interface import Case, Exporter, Source, Written
from repdeploy.exporters.judging import renamed
from repdeploy.exporters.options import BATCHES, Options
from repdeploy.exporters.precision import Proved, require_passed, write_proved
from repdeploy.exporters.sample import sample_images
from repdeploy.exporters.subject import Subject, subject_of
from repdeploy.family import Family
from repdeploy.graph.onnx_source import DATA_SUFFIX
from repdeploy.progress import Progress
from repdeploy.records import Artifact, Export
from repdeploy.vouching import is_intact


def export(
    bundle: Bundle,
    families: Sequence[Family],
    shape: tuple[int, ...],
    options: Options,
    *,
    output: Path | None,
    command: str,
    progress: Progress,
) -> Export:
    """Write ONNX, and from it every target of the options; what a target lacks here is in the answer.

    Raises UsageError where `output` would replace something that is no export of ours, InputError where the network cannot be
    exported as asked, VerificationFailed where an artifact is not the proved network: then it is not written.
    """
    bundle.require_verified()
    targets = [registry.require(name) for name in options.targets]
    if options.simplify:
        simplifying.require()
    if output is not None:
        _may_write(output)
    with bundle.locked():
        subject = subject_of(bundle, families, shape, options)
        folder = bundle.path if output is None else output.parent
        usual = _file_name(bundle, options)
        name = usual if output is None else output.name
        progress("exporting ONNX", 0, 3)
        written = _current(bundle, usual, subject, options)
        reused = (name,) if written is not None and output is None else ()
        if output is not None and written is not None:
            written = None if written.others else _copied(bundle.path / written.file, output, written)
        references = _references(bundle, subject, progress) if targets or written is None else ()
        if written is None:
            replaced = _replaced(bundle, name) if output is None else ()
            written = _write_onnx(bundle, subject, references, folder, name, options, command, progress)
            if output is None:
                bundle.write_manifest(bundle.manifest.with_artifact(written))
        else:
            replaced = ()
        progress("exporting ONNX", 3, 3)
        result = Export(folder, (written,), reused, notes=(*written.notes, *replaced), norms=_norms_left(bundle, folder / name))
        for target in targets:
            result = _add(bundle, subject, references, target, written, result, options, command, progress)
        return result


def _may_write(output: Path) -> None:
    """Raises UsageError where a file of somebody else stands, or no folder."""
    if not output.parent.is_dir():
        raise UsageError(f"there is no folder {output.parent}", hint="make it first, or give another -o")
    if output.suffix != ".onnx" or (output.parent / MANIFEST).is_file():
        raise UsageError(
            f"-o {output}: expected a name that ends in .onnx, outside a bundle",
            hint="leave -o out to write into the bundle",
        )
    for path in (output, output.with_name(output.name + DATA_SUFFIX)):
        if path.is_dir() or (path.exists() and not (output.is_file() and onnx_file.is_ours(output))):
            raise UsageError(f"{path} exists and is no export of ours; it is left as it is", hint="give another name with -o")


def _write_onnx(
    bundle: Bundle,
    subject: Subject,
    references: Sequence[Case],
    folder: Path,
    name: str,
    options: Options,
    command: str,
    progress: Progress,
) -> Artifact:
    """The graph with everything that was asked for, checked under its final name and then moved into place."""
    model = ir.from_proto(subject.graph(options))
    ends.finished(model, options, subject.image)
    cases = ends.cases_with_ends(references, subject.image, subject.output, options)
    sample = _sample(subject, options)
    proto = ir.to_proto(model)
    notes: tuple[str, ...] = ()
    if options.fold and (bundle.manifest.graph is None or options.normalize is not None):
        proto = folded(proto)
    if options.normalize is not None:
        notes += (ends.normalization_note(ir.from_proto(proto), options),)
    provenance = {**subject.provenance, "precision": options.precision, **options.of_graph}
    with _scratch(folder, name) as scratch:
        path = scratch / name
        if options.simplify:
            proved, note = _simplified(proto, path, cases, options, provenance, progress, sample)
            notes += (note,)
        else:
            proved = write_proved(proto, path, cases, options, provenance, progress, sample)
        _into(folder, scratch, (name, *proved.others))
    before = bundle.manifest.artifact(name) if folder == bundle.path else None
    for stale in {item for item, _ in before.others} - set(proved.others) if before is not None else ():
        (folder / stale).unlink(missing_ok=True)
    return Artifact(
        file=name, kind="onnx", precision=options.precision, sha256=digest(folder / name),
        bytes=sum((folder / item).stat().st_size for item in (name, *proved.others)),
        made_from=bundle.manifest.weights_sha256, command=command, input_shape=subject.shape, opset=proved.opset,
        dynamic=subject.dynamic, checks=proved.checks, options=options.of_graph,
        others=tuple((item, digest(folder / item)) for item in proved.others), wide=proved.wide, drift=proved.drift,
        notes=(*notes, *proved.notes),
    )  # fmt: skip


def _references(bundle: Bundle, subject: Subject, progress: Progress) -> tuple[Case, ...]:
    """What the exports are judged by. Raises InputError where nothing was recorded."""
    if cases := subject.cases(progress):
        return cases
    if bundle.manifest.verdict.grade == "blocks only":
        reason, hint = "it was converted with --gates blocks", "convert again without --gates blocks"
    else:
        reason, hint = "an operator of its graph runs in onnxruntime alone", "use the graph as it is"
    raise InputError(f"{bundle.path} recorded nothing that an export could be judged by: {reason}", hint=hint)


def _sample(subject: Subject, options: Options) -> tuple[Case, ...]:
    """The user's own images as the graph takes them; nobody recorded what they lead to."""
    if options.sample is None:
        return ()
    images = sample_images(options.sample, subject.shape)
    cases = [Case("sample", {subject.image: batch}, {}) for batch in images]
    return ends.cases_with_ends(cases, subject.image, subject.output, replace(options, softmax=False))


def _simplified(
    proto: onnx.ModelProto,
    path: Path,
    cases: Sequence[Case],
    options: Options,
    provenance: Mapping[str, str],
    progress: Progress,
    sample: Sequence[Case],
) -> tuple[Proved, str]:
    """What onnxsim makes of a graph where it is still the proved network, else the graph as it was; and which of them."""
    try:
        simple = simplifying.simplified(proto)
        proved = write_proved(simple, path, cases, options, provenance, progress, sample)
    except (BackendFailed, VerificationFailed) as reason:
        proved = write_proved(proto, path, cases, options, provenance, progress, sample)
        return proved, f"what onnxsim made was not taken: {reason}; the graph is written as it was"
    return proved, f"onnxsim: {len(proto.graph.node)} nodes -> {len(simple.graph.node)}, verified again"


def _add(
    bundle: Bundle,
    subject: Subject,
    references: Sequence[Case],
    target: Exporter,
    onnx_artifact: Artifact,
    result: Export,
    options: Options,
    command: str,
    progress: Progress,
) -> Export:
    """One more target from the written ONNX."""
    cases = ends.cases_with_ends(references, subject.image, subject.output, options)
    size = subject.shape[0]
    with _scratch(bundle.path, target.name) as scratch:
        source = Source(
            onnx=bundle.path / onnx_artifact.file, artifact=onnx_artifact, cases=cases, folder=bundle.path, scratch=scratch,
            shapes={options.input_name if name == subject.image and options.input_name else name: shape
                    for name, shape in subject.profiled.items()},
            batches=(options.engine.batches or BATCHES) if "batch" in subject.dynamic else (size, size, size),
            options=options, image=subject.image, module=subject.module,
        )  # fmt: skip
        notes = (*result.notes, *target.prepare(source))
        absent = target.missing()
        if absent is not None:
            missing, hints = (*filter(None, (result.missing,)), absent.what), (*filter(None, (result.hint,)), absent.hint)
            return replace(result, notes=notes, missing="; ".join(missing), hint="; ".join(hints))
        progress(f"writing {target.title}", 0, 1)
        written = target.write(source, progress)
        require_passed(written.file, written.checks)
        artifact = _recorded(bundle, source, target, written, command)
        _into(bundle.path, scratch, (written.file, *written.others))
        bundle.write_manifest(bundle.manifest.with_artifact(artifact))
    return replace(result, artifacts=(*result.artifacts, artifact), notes=(*notes, *written.notes))


def _recorded(bundle: Bundle, source: Source, target: Exporter, written: Written, command: str) -> Artifact:
    files = [source.scratch / name for name in (written.file, *written.others)]
    return Artifact(
        file=written.file, kind=target.name, precision=written.precision, sha256=digest(files[0]),
        bytes=sum(path.stat().st_size for path in files), made_from=source.artifact.sha256, command=command,
        input_shape=source.artifact.input_shape, dynamic=source.artifact.dynamic, checks=written.checks,
        options={**source.options.of_graph, **written.options},
        others=tuple((path.name, digest(path)) for path in files[1:]), notes=written.notes, target=written.target,
    )  # fmt: skip


def _norms_left(bundle: Bundle, path: Path) -> tuple[tuple[str, str], ...]:
    """The batch norms that the written graph still has, and why the network has them."""
    left = norms_in(path)
    return tuple((name, reason) for name, reason in bundle.manifest.norms if name in left)


def _file_name(bundle: Bundle, options: Options) -> str:
    """The name of an export in a bundle. A squeezed graph keeps its own, because everything else is made from it."""
    name = f"model.{options.precision}.onnx"
    if bundle.manifest.graph is None:
        return name
    own = bundle.own_artifact()
    if not options.of_graph and options.precision in ("fp32", own.precision):
        return own.file
    return name if name != own.file else f"model.{options.precision}.export.onnx"


def _copied(source: Path, output: Path, artifact: Artifact) -> Artifact:
    with replacing(output) as temporary:
        shutil.copyfile(source, temporary)
    return replace(artifact, file=output.name, checks=renamed(artifact.checks, artifact.file, output.name))


def _replaced(bundle: Bundle, name: str) -> tuple[str, ...]:
    """What a new file of that name takes the place of, and what was made from it."""
    old = bundle.manifest.artifact(name)
    if old is None or old.made_from == old.sha256:
        return ()
    made = [item.file for item in bundle.manifest.artifacts if item.made_from == old.sha256]
    how = " ".join(
        f"--{key.replace('_', '-')}" + (f" {value}" if value != "True" else "") for key, value in old.options.items()
    )
    shape = "x".join(map(str, old.input_shape))
    still = f"; what was made from that one stays as it is: {', '.join(made)}" if made else ""
    return (f"it takes the place of the {name} for {shape}{f' with {how}' if how else ''}{still}",)


def _current(bundle: Bundle, name: str, subject: Subject, options: Options) -> Artifact | None:
    """The artifact of that name, where it was made from these weights in the same way and is unchanged since."""
    artifact = bundle.manifest.artifact(name)
    if artifact is None or artifact.made_from != bundle.manifest.weights_sha256:
        return None
    if artifact.dynamic != subject.dynamic or artifact.options != options.of_graph:
        return None
    same_shape = artifact.input_shape[1:] == subject.shape[1:] if subject.dynamic else artifact.input_shape == subject.shape
    return artifact if same_shape and is_intact(bundle.path, artifact) else None


@contextmanager
def _scratch(folder: Path, name: str) -> Iterator[Path]:
    """An empty folder beside the target, in which files have their final names until they are proved; it vanishes after."""
    try:
        path = Path(tempfile.mkdtemp(prefix=f".{name}{PARTIAL}", dir=folder))
    except OSError as reason:
        raise UsageError(f"{folder} cannot be written: {reason.strerror}", hint="give another output with -o") from reason
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _into(folder: Path, scratch: Path, names: Sequence[str]) -> None:
    for name in names:
        (scratch / name).replace(folder / name)
