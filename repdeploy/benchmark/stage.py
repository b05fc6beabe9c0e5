"""Measure every runtime in processes of its own: latency, memory, what ran inside, density; then say what it means."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from repdeploy.benchmark import diagnosis
from repdeploy.benchmark.children import Answered, asked
from repdeploy.benchmark.conditions import busy_now, cores, environment
from repdeploy.benchmark.subject import Measured, networks_of, with_graphs
from repdeploy.bundle import Bundle
from repdeploy.digest import digest
from repdeploy.errors import BackendFailed, BackendMissing, RepDeployError, UsageError, words
from repdeploy.measurements import PEAK_PRECISION, Bench, BenchRow, Density, Memory, Profile, Roofline, read_json
from repdeploy.progress import Progress
from repdeploy.runtimes import RUNTIMES, Missing, Profiling, Runtime
from repdeploy.runtimes.interface import NETWORK, ONNX
from repdeploy.vouching import compiled_files

WIDE_SPREAD = 0.20
"""The middle half of the runs, relative to the median, above which a row is called noisy."""
BUSY = 0.25
"""The share of all cores in others' use from which a row is called disturbed."""
CLOCK_SWING = 0.10
"""How far clocks may move while a row is measured."""
ROOFLINE_SECONDS = 3.0

OnRow = Callable[[BenchRow], None]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure and how. `available`: what there is of the subject for runtimes to run (`Runtime.needs`); `only`:
    runtimes asked for by name; `deep`: also memory, what ran inside, and the density of this device."""

    subject: Path
    image: tuple[int, ...]
    device: str
    batches: tuple[int, ...]
    threads: int
    seconds: float
    only: tuple[str, ...] = ()
    available: Collection[str] = (NETWORK, ONNX)
    deep: bool = True
    other: Path | None = None
    """A second ONNX file, measured beside the first."""
    before: Bench | None = None
    """What an earlier benchmark measured under the same conditions, and is not measured again."""

    def done(self, runtime: str, batch: int) -> BenchRow | None:
        """A row of the earlier benchmark."""
        rows = self.before.rows if self.before is not None else ()
        deep_enough = (row for row in rows if row.memory or not self.deep)
        return next((row for row in deep_enough if (row.runtime, row.batch) == (runtime, batch)), None)


def bench(wanted: Wanted, progress: Progress, on_row: OnRow) -> Bench:
    """Measure a bundle (both networks) or a file (just that). A runtime that is missing or fails is a row that says so.

    `on_row` gets every row as soon as it is complete. Raises BackendMissing when nothing on that device can run, BackendFailed
    when a runtime asked for by name crashes.
    """
    chosen = _chosen(wanted)
    busy = busy_now()
    rows: list[BenchRow] = []
    run = _Run(wanted, progress, steps=_steps(wanted, chosen))
    with tempfile.TemporaryDirectory() as scratch:
        roof = run.roofline([runtime for runtime in chosen if _absent(runtime, wanted) is None])
        for runtime in chosen:
            absent = _absent(runtime, wanted)
            if absent is not None:
                rows += [
                    BenchRow(runtime.name, wanted.device, batch, missing=absent.what, hint=absent.hint)
                    for batch in wanted.batches
                ]
                continue
            rows += (kept := run.kept(runtime))
            for row in run.rows(runtime, [row.batch for row in kept], Path(scratch)):
                its_roof = roof if row.timings and row.timings[-1].precision == PEAK_PRECISION else None
                judged = replace(row, warnings=_doubts(row))
                rows.append(replace(judged, findings=diagnosis.findings(judged, its_roof, cores())))
                run.notes += _disturbed(judged)
                on_row(rows[-1])
        density = run.densities(chosen, rows, roof)
    rows = diagnosis.with_layouts(rows)
    progress("measuring", run.steps, run.steps)
    _require_some(rows, wanted)
    notes = list(run.notes)
    old = sum(len(run.kept(runtime)) for runtime in chosen)
    if old:
        notes.append(f"{old} of {len(rows)} rows were measured before (--resume)")
    broken = [item for item in RUNTIMES.installed() if item.value is None]
    notes += [f"the runtime {item.name} of {item.distribution} does not load: {item.error}" for item in broken]
    if busy > BUSY:
        notes.insert(0, f"the machine was busy before the benchmark began: {busy:.0%} of all cores in use")
    return Bench(
        wanted.subject.name if wanted.other is None else f"{wanted.subject.name} and {wanted.other.name}",
        tuple(rows),
        environment(wanted.threads),
        tuple(dict.fromkeys(notes)),
        () if roof is None else (roof,),
        tuple(density),
    )


def chosen_runtimes(device: str, only: Sequence[str]) -> list[Runtime]:
    """Those asked for by name, in that order, else those that a benchmark measures by itself. Raises UsageError."""
    installed = {item.name: item for item in RUNTIMES.working() if item.device == device}
    unknown = [name for name in only if name not in installed]
    if unknown:
        raise UsageError(
            f"no runtime for {device} is called {', '.join(unknown)}", hint=f"runtimes for {device}: {', '.join(installed)}"
        )
    if only:
        return [installed[name] for name in dict.fromkeys(only)]
    return [item for item in installed.values() if item.by_default]


def _chosen(wanted: Wanted) -> list[Runtime]:
    chosen = chosen_runtimes(wanted.device, wanted.only)
    fed = [item for item in chosen if item.needs in wanted.available]
    return chosen if wanted.only or not fed else fed


def _absent(runtime: Runtime, wanted: Wanted) -> Missing | None:
    absent = runtime.missing()
    if absent is None and runtime.needs not in wanted.available:
        written = runtime.needs in (NETWORK, ONNX)
        if written and find_spec("torch") is None and wanted.subject.is_dir():
            return Missing(f"torch is not installed, and {runtime.name} needs it to be given this network", "pip install torch")
        return Missing(
            f"there is no {runtime.needs} of {wanted.subject.name}",
            "measure the bundle it was made from" if written else f"repdeploy export --to {runtime.needs} writes it",
        )
    return absent


def _steps(wanted: Wanted, chosen: Sequence[Runtime]) -> int:
    per_runtime = len(wanted.batches) + (3 if wanted.deep else 0)
    return per_runtime * len(chosen) + (1 if wanted.deep else 0)


@dataclass(slots=True)
class _Run:
    """One benchmark on its way."""

    wanted: Wanted
    progress: Progress
    steps: int
    step: int = 0
    notes: list[str] = field(default_factory=list)
    _live: dict[tuple[str, int], tuple[int, str]] = field(default_factory=dict)

    def kept(self, runtime: Runtime) -> list[BenchRow]:
        """The rows of one runtime that were measured before."""
        artifact = self._artifact(runtime)
        rows = (self.wanted.done(runtime.name, batch) for batch in self.wanted.batches)
        return [row for row in rows if row is not None and row.artifact == artifact]

    def _artifact(self, runtime: Runtime) -> str:
        """The sha256 of the compiled file that a runtime runs; "" of one that runs a network or a graph."""
        if runtime.needs in (NETWORK, ONNX) or self.wanted.subject.is_file():
            return ""
        found = compiled_files(Bundle(self.wanted.subject)).get(runtime.needs)
        return digest(found.path) if found is not None else ""

    def rows(self, runtime: Runtime, kept: Sequence[int], scratch: Path) -> Iterator[BenchRow]:
        """Every other batch size of one runtime, with memory and what ran inside."""
        wanted = self.wanted
        batches = [batch for batch in wanted.batches if batch not in kept]
        if not batches:
            self._next(f"{runtime.name} was measured before", len(wanted.batches) + 2 * wanted.deep)
            return
        try:
            networks = self._networks(runtime, scratch)
        except RepDeployError as reason:  # its graph cannot be written
            yield from self._all_failed(runtime, batches, reason)
            return
        timed = list(self._timed(runtime, networks, batches))
        inside = self._inside(runtime, networks, [row.batch for row in timed if row.timings]) if wanted.deep else {}
        for row in timed:
            found = inside.get(row.batch, [])
            yield replace(
                row,
                artifact=self._artifact(runtime),
                memory=tuple(self._memory(item, row.batch, memory) for item, memory, _ in found),
                profiles=tuple(profile for _, _, profile in found if profile is not None),
            )

    def _networks(self, runtime: Runtime, scratch: Path) -> tuple[Measured, ...]:
        networks = networks_of(self.wanted.subject, runtime.needs, self.wanted.other)
        if ONNX not in self.wanted.available or runtime.needs not in (NETWORK, ONNX):
            return networks
        if runtime.needs == ONNX or self.wanted.deep:
            self.progress("writing both networks as graphs", self.step, self.steps)
            networks = with_graphs(networks, self.wanted.image, scratch)
        return networks

    def _timed(self, runtime: Runtime, networks: Sequence[Measured], batches: Sequence[int]) -> Iterator[BenchRow]:
        done: list[int] = []
        try:
            for answer in self._ask("time", runtime, networks, batches, f"measuring {runtime.name}", len(self.wanted.batches)):
                row = replace(read_json(BenchRow, answer.record), watched=answer.watch.seen())
                if row.missing and self.wanted.only:
                    raise BackendFailed(row.missing.removeprefix("failed: "), hint=row.hint)
                done.append(row.batch)
                yield row
        except RepDeployError as reason:
            if self.wanted.only:
                raise BackendFailed(f"{runtime.name} on {runtime.device} failed: {reason}", hint=reason.hint) from reason
            yield from self._all_failed(runtime, [batch for batch in batches if batch not in done], reason)

    def _all_failed(self, runtime: Runtime, batches: Sequence[int], reason: RepDeployError) -> Iterator[BenchRow]:
        if self.wanted.only:
            raise BackendFailed(f"{runtime.name} on {runtime.device} failed: {reason}", hint=reason.hint)
        for batch in batches:
            said = f"failed: {words(reason)}"
            yield BenchRow(runtime.name, runtime.device, batch, missing=said, hint=reason.hint)

    def _inside(
        self, runtime: Runtime, networks: Sequence[Measured], batches: Sequence[int]
    ) -> dict[int, list[tuple[Measured, Memory, Profile | None]]]:
        found: dict[int, list[tuple[Measured, Memory, Profile | None]]] = {}
        if not batches:
            self._next("", 2)
            return found
        variables = runtime.profile_environment if isinstance(runtime, Profiling) else {}
        for item in networks:
            doing = f"looking into {item.name} in {runtime.name}"
            try:
                for answer in self._ask("look inside", runtime, [item], sorted(batches), doing, 2 // len(networks), variables):
                    record = answer.record
                    profile = read_json(Profile, record["profile"]) if record["profile"] is not None else None
                    found.setdefault(record["batch"], []).append((item, read_json(Memory, record["memory"]), profile))
                    if record["why"] and isinstance(runtime, Profiling):
                        self.notes.append(record["why"])
            except RepDeployError as reason:
                self.notes.append(f"{doing} failed: {reason}")
        return found

    def _memory(self, item: Measured, batch: int, memory: Memory) -> Memory:
        """What the graph itself tells beside what was measured."""
        if not item.graph or find_spec("torch") is None:
            return memory
        if (item.graph, batch) not in self._live:
            self._live[item.graph, batch] = _peak(item, batch, self.wanted.image)
        live, at = self._live[item.graph, batch]
        return replace(memory, weights=_weights(item), live=live or None, live_at=at)

    def roofline(self, working: Sequence[Runtime]) -> Roofline | None:
        """What this device reaches at best in float32; None where it is not asked for or cannot be measured."""
        if not self.wanted.deep or not working:
            return None
        if self.wanted.before is not None and (known := self.wanted.before.roof(self.wanted.device)) is not None:
            self._next("", 1)
            return known
        request = {
            "task": "roofline", "device": self.wanted.device, "threads": self.wanted.threads, "precision": PEAK_PRECISION,
            "seconds": ROOFLINE_SECONDS,
        }  # fmt: skip
        self.progress("measuring what this device reaches at best", self.step, self.steps)
        try:
            for answer in asked(request):
                self._next("", 1)
                return read_json(Roofline, answer.record)
        except RepDeployError as reason:
            self.notes.append(f"no roofline: {reason}")
        return None

    def densities(self, chosen: Sequence[Runtime], rows: Sequence[BenchRow], roof: Roofline | None) -> list[Density]:
        """The density table of every runtime that measured something in float32."""
        found = list(self.wanted.before.density) if self.wanted.before is not None else []
        known = {item.runtime for item in found}
        if find_spec("torch") is None:
            return found
        for runtime in chosen if self.wanted.deep and roof is not None else ():
            measured = any(row.timings for row in rows if row.runtime == runtime.name)
            fit = measured and runtime.needs in (NETWORK, ONNX) and runtime.precision == PEAK_PRECISION
            if not fit or runtime.name in known:
                self._next("", 1)
                continue
            assert roof is not None
            request = {
                "task": "density", "device": runtime.device, "runtime": runtime.name, "threads": self.wanted.threads,
                "peak": roof.gflops,
            }  # fmt: skip
            self.progress(f"measuring kernel sizes in {runtime.name}", self.step, self.steps)
            variables = runtime.profile_environment if isinstance(runtime, Profiling) else {}
            try:
                found += [read_json(Density, answer.record) for answer in asked(request, variables)]
            except RepDeployError as reason:
                self.notes.append(f"no density table of {runtime.name}: {reason}")
            self._next("", 1)
        return found

    def _ask(
        self, task: str, runtime: Runtime, networks: Sequence[Measured], batches: Sequence[int], doing: str, steps: int,
        variables: Mapping[str, str] | None = None,
    ) -> Iterator[Answered]:  # fmt: skip
        wanted = self.wanted
        request: dict[str, Any] = {
            "task": task, "runtime": runtime.name, "device": runtime.device, "networks": [asdict(item) for item in networks],
            "image": wanted.image, "batches": list(batches), "threads": wanted.threads, "seconds": wanted.seconds,
        }  # fmt: skip
        before = self.step
        self.progress(doing, self.step, self.steps)
        try:
            for answer in asked(request, variables):
                yield answer
                if self.step < before + steps:
                    self._next(doing, 1)
        finally:
            self.step = before + steps

    def _next(self, doing: str, steps: int) -> None:
        self.step = min(self.steps, self.step + steps)
        self.progress(doing or "measuring", self.step, self.steps)


def _peak(item: Measured, batch: int, image: tuple[int, ...]) -> tuple[int, str]:
    from repdeploy.benchmark.subject import job_of
    from repdeploy.graph.liveness import peak
    from repdeploy.graph.onnx_source import read_onnx

    model = read_onnx(Path(item.graph)).model
    job = job_of(item, image, 1)
    feeds = job.feeds(batch) if job.feeds is not None else None
    names = [value.name for value in model.graph.inputs if value.name not in model.graph.initializers]
    shapes = {name: array.shape for name, array in feeds.items()} if feeds is not None else {str(names[0]): (batch, *image)}
    try:
        found = peak(model, shapes)
    except RepDeployError:  # sizes that only data decides
        return 0, ""
    return found.bytes, found.at


def _weights(item: Measured) -> int:
    """Bytes of the stored floating point tensors: an exported training-time graph holds constants that no checkpoint has."""
    from repdeploy.graph.onnx_source import read_onnx

    if item.source == "training twin":
        tensors = Bundle(Path(item.path)).manifest.training.values()
        return sum(4 * math.prod(tensor.shape) for tensor in tensors if "float" in tensor.dtype)
    stored = read_onnx(Path(item.graph)).model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in stored if value.const_value is not None)


def _require_some(rows: Sequence[BenchRow], wanted: Wanted) -> None:
    if any(row.timings for row in rows):
        return
    looked_for = "; ".join(dict.fromkeys(f"{row.runtime}: {row.missing}" for row in rows))
    hint = next((row.hint for row in rows if row.hint), "")
    if any(row.missing.startswith("failed") for row in rows):
        raise BackendFailed(f"no runtime could run this network on {wanted.device}: {looked_for}", hint=hint)
    elsewhere = "; or measure with --device cpu" if hint and wanted.device != "cpu" else ""
    raise BackendMissing(f"nothing here runs on {wanted.device}: {looked_for}", hint=f"{hint}{elsewhere}")


def _disturbed(row: BenchRow) -> Iterator[str]:
    """Profiles that do not fit the times beside them."""
    for profile in row.profiles:
        if not row.fits(profile):
            run = next(timing.median for timing in row.timings if timing.network == profile.network)
            yield (
                f"{row.runtime}, batch {row.batch}, {profile.network}: its layers took {profile.seconds * 1e3:.3g} ms, "
                f"a run takes {run * 1e3:.3g} ms: the profile does not account for the run, so nothing is concluded from it"
            )


def _doubts(row: BenchRow) -> tuple[str, ...]:
    """What makes the numbers of a row doubtful."""
    doubts = []
    for timing in row.timings:
        if timing.spread > WIDE_SPREAD:
            doubts.append(f"{timing.network}: the middle half of the runs spreads over {timing.spread:.0%} of the median")
        if not timing.steady:
            doubts.append(f"{timing.network}: did not become steady during warm-up")
    watched = row.watched
    if watched is not None and row.timings:
        if watched.load is not None and watched.load > BUSY:
            doubts.append(f"other processes used {watched.load:.0%} of all cores meanwhile")
        if watched.clock_mhz and watched.clock_mhz[1] > (1 + CLOCK_SWING) * watched.clock_mhz[0]:
            doubts.append(f"clocks moved between {watched.clock_mhz[0]:,.0f} and {watched.clock_mhz[1]:,.0f} MHz")
        doubts += [f"throttled: {what}" for what in watched.throttled]
        if watched.foreign:
            doubts.append(f"others were on the GPU: {', '.join(watched.foreign[:3])}")
    return tuple(doubts)
