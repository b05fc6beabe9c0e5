"""What a benchmark has to say: how much faster, how sure that is, and why, or why not."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence

from repdeploy.measurements import (
    MIN_EFFECT,
    Bench,
    BenchRow,
    Comparison,
    Density,
    Memory,
    Profile,
    Roofline,
    Timing,
    Watched,
)  # fmt: skip
from repdeploy.page import quantities
from repdeploy.page.document import (
    Cell,
    Command,
    Figure,
    Fold,
    Listing,
    Node,
    Notice,
    Paragraph,
    Section,
    Table,
    Tone,
    code,
    pairs,
    table,
)
from repdeploy.page.labels import distinct, row_label
from repdeploy.page.pictures import Densities, Latencies, Roof, Speedups, has_place

ABOVE_PEAK = (
    "Operations are those of the direct algorithm, so a fast one (Winograd, FFT) can lie above the peak of matrix products."
)


def missing(bundle: str) -> Section:
    """The section of a bundle that was never measured."""
    return Section(
        "Benchmark",
        (
            Paragraph("Nothing was measured yet. This times both networks in every runtime here and explains the result:"),
            Command(shlex.join(("repdeploy", "bench", bundle))),
        ),
    )


def benchmark(bench: Bench) -> Section:
    """Everything that was measured, the answer first, the evidence behind it."""
    nodes: list[Node] = [*_latency(bench), *_findings(bench), *_memory(bench), *_kernels(bench), *_layers(bench)]
    nodes += [*_density(bench), *_roofline(bench), *_absent(bench), *_baseline(bench), *_doubts(bench)]
    return Section("Benchmark", tuple(nodes))


def environment(bench: Bench) -> Section:
    return Section("Where it was measured", (pairs(*bench.environment.items()),))


def commands(bench: Bench, bundle: str) -> Iterator[str]:
    """Per device the command line that measures the same again, as far as the rows tell."""
    for device in dict.fromkeys(row.device for row in bench.rows):
        rows = [row for row in bench.rows if row.device == device]
        timings = [timing for row in rows for timing in row.timings]
        words = ["repdeploy", "bench", bundle, "--device", device]
        words += [word for batch in dict.fromkeys(row.batch for row in rows) for word in ("--batch", str(batch))]
        threads = {str(timing.threads) for timing in timings}
        images = {"x".join(map(str, (1, *timing.input_shape[1:]))) for timing in timings}
        for flag, values in (("--threads", threads), ("--input-shape", images)):
            words += [flag, *values] if len(values) == 1 else []
        yield shlex.join(words)


def _latency(bench: Bench) -> Iterator[Node]:
    measured = [row for row in bench.rows if row.timings]
    if not measured:
        return
    timings = [timing for row in measured for timing in row.timings]
    runs = sorted({len(timing.seconds) for timing in timings})
    shown = f"{runs[0]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    yield Paragraph(
        f"Images {distinct(quantities.sizes(timing.input_shape[1:]) for timing in timings)}; "
        f"{distinct(timing.precision for timing in timings)}; {distinct(timing.device for timing in timings)}, "
        f"{distinct(timing.threads for timing in timings)} threads. Medians of {shown} runs per network, the networks of a row "
        "interleaved, every run kept."
    )
    yield _speeds(measured)
    compared = tuple(row for row in measured if row.speedup is not None)
    if compared:
        yield Figure(
            Speedups(compared),
            f"Right of the line the {_after(measured)} network is faster. The bar is the bootstrap interval (95 %) of the "
            f"ratio of medians; where it holds 1, or the effect is below {MIN_EFFECT:.0%}, there is no difference. "
            "A hollow mark is an unstable row.",
        )
    yield Figure(
        Latencies(tuple(measured)),
        "Every timed run is one thin line; the box holds the middle half of the runs, the thick line is the median.",
    )
    yield Fold("Percentiles and conditions of every timing", (_timings(measured),))


def _speeds(rows: Sequence[BenchRow]) -> Table:
    cells = []
    for row in rows:
        first, last = row.timings[0], row.timings[-1]
        before = quantities.seconds(first.median) if last is not first else ""
        cells.append((
            row_label(row, rows), before, quantities.seconds(last.median), *_speedup(row),
            quantities.number(last.images_per_second), "" if row.drift is None else quantities.error(row.drift),
            "" if row.is_stable else Cell("unstable", "warn"),
        ))  # fmt: skip
    columns = (
        "runtime", f">{_before(rows)}", f">{_after(rows)}", ">speed-up", "95 % interval", "", ">images/s",
        ">error of low precision", "stability",
    )  # fmt: skip
    return table("Latency and speed-up", columns, cells)


def _before(rows: Sequence[BenchRow]) -> str:
    """What the network is called that the other one is held against."""
    return distinct(row.timings[0].network for row in rows if len(row.timings) > 1)


def _after(rows: Sequence[BenchRow]) -> str:
    return distinct(row.timings[-1].network for row in rows)


def _speedup(row: BenchRow) -> tuple[Cell | str, ...]:
    if row.speedup is None:
        return "", "", ""
    said: tuple[str, Tone] = ("too noisy to tell" if row.speedup.is_undecided else "no difference", "quiet")
    if row.speedup.differs:
        said = ("faster", "good") if row.speedup.ratio > 1 else ("slower", "bad")
    interval = f"{row.speedup.low:.2f} to {row.speedup.high:.2f}"
    return Cell(quantities.times(row.speedup.ratio), "strong"), interval, Cell(*said)


def _timings(rows: Sequence[BenchRow]) -> Table:
    listed = [(row_label(row, rows), timing) for row in rows for timing in row.timings]
    shares = dict.fromkeys(share for _, timing in listed for share in timing.percentiles)
    cells = (
        (
            label, timing.network, *(_percentile(timing, share) for share in shares), quantities.percent(timing.spread),
            str(len(timing.seconds)), str(timing.warmup_runs), "yes" if timing.steady else Cell("no", "warn"),
            timing.precision, str(timing.threads), timing.layout, timing.l2 if timing.device == "cuda" else "",
            quantities.seconds(sorted(timing.enqueue)[len(timing.enqueue) // 2]) if timing.enqueue else "",
        )
        for label, timing in listed
    )  # fmt: skip
    columns = (
        "runtime", "network", *(f">{share}" for share in shares), ">spread", ">runs", ">warm-up", "steady", "precision",
        ">threads", "layout", "L2", ">enqueue",
    )  # fmt: skip
    return table("Percentiles and conditions", columns, cells)


def _percentile(timing: Timing, share: str) -> str:
    found = timing.percentiles.get(share)
    return "" if found is None else quantities.seconds(found)


def _findings(bench: Bench) -> Iterator[Node]:
    """One notice per kind and remedy, with the evidence from every row; the same evidence once."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for row in bench.rows:
        for item in row.findings:
            where = f"{row_label(row, bench.rows)}, {item.network}"
            found.setdefault((item.kind, item.remedy), {}).setdefault(item.evidence, []).append(where)
    if found:
        notices = (
            Notice(kind, tuple(f"{'; '.join(where)}: {said}" for said, where in evidence.items()), remedy)
            for (kind, remedy), evidence in found.items()
        )
        yield Section("What holds it back, and what helps", tuple(notices))


def _memory(bench: Bench) -> Iterator[Node]:
    def bytes_of(count: int | None) -> str:
        return "" if count is None else quantities.size(count)

    def cells(row: BenchRow, memory: Memory) -> tuple[Cell | str, ...]:
        return (
            row_label(row, bench.rows), memory.network, bytes_of(memory.weights), bytes_of(memory.live),
            code(memory.live_at) if memory.live_at else "", bytes_of(memory.resident), bytes_of(memory.allocated),
        )  # fmt: skip

    rows = [cells(row, memory) for row in bench.rows for memory in row.memory]
    if rows:
        columns = ("runtime", "network", ">weights", ">live activations", "at", ">resident", ">allocated")
        explained = (
            "Live activations: the exact peak of activations that must exist at once, and the operator that runs then. "
            "Resident: growth of the process over loading and running. Allocated: the peak of the device's allocator."
        )
        yield Section("Memory before and after", (table("Memory", columns, rows), Paragraph(explained, "quiet")))


def _profiles(bench: Bench) -> list[tuple[BenchRow, Profile]]:
    return [(row, profile) for row in bench.rows for profile in row.profiles]


def _kernels(bench: Bench) -> Iterator[Node]:
    rows = [
        (
            row_label(row, bench.rows), profile.network, f"{len(profile.of_3x3())} of {len(profile.convolutions)}",
            _part(profile.share_3x3_flops), _part(profile.share_3x3_time), _part(profile.share_reorder_time),
        )
        for row, profile in _profiles(bench)
    ]  # fmt: skip
    if rows:
        columns = (
            "runtime", "network", ">convolutions that are 3x3", "3x3 of all FLOPs", "3x3 of all time", "reorders of all time",
        )  # fmt: skip
        yield Section("Share of 3x3 convolutions", (table("Share of 3x3 convolutions", columns, rows),))


def _part(share: float) -> Cell:
    return Cell(quantities.percent(share), share=min(share, 1.0))


def _layers(bench: Bench) -> Iterator[Node]:
    profiles = _profiles(bench)
    if profiles:
        folds = (
            Fold(
                f"{row_label(row, bench.rows)}, {profile.network}: "
                f"{quantities.plural(len(profile.convolutions), 'convolution')}, {quantities.seconds(profile.seconds)}",
                (Paragraph(f"Known from {profile.source}."), _convolutions(profile, bench.roof_of(row)), *_rest(profile)),
            )
            for row, profile in profiles
        )
        yield Section("Every convolution", (Paragraph("As each runtime really ran it, in its order."), *folds))


def _convolutions(profile: Profile, roofline: Roofline | None) -> Table:
    rows = (
        (
            code(layer.name),
            Cell(quantities.sizes(layer.kernel) + (" depthwise" if layer.is_depthwise else ""), _of_3x3(layer.kernel)),
            str(layer.groups), quantities.sizes(dict.fromkeys(layer.stride)), quantities.sizes(layer.input_shape),
            quantities.sizes(layer.output_shape), quantities.number(layer.flops / 1e9) if layer.flops else "",
            quantities.seconds(layer.seconds), quantities.percent(layer.seconds / (profile.seconds or 1.0)),
            quantities.number(layer.gflops) if layer.flops else "",
            quantities.percent(layer.gflops / roofline.gflops) if roofline and layer.flops else "", code(layer.implementation),
        )
        for layer in profile.convolutions
    )  # fmt: skip
    columns = (
        "convolution", "kernel", ">groups", ">stride", ">input", ">output", ">GFLOP", ">time", ">of all time", ">GFLOP/s",
        ">of peak", "implementation",
    )  # fmt: skip
    return table(f"Convolutions of the {profile.network} network", columns, rows)


def _of_3x3(kernel: tuple[int, ...]) -> Tone:
    return "strong" if kernel == (3, 3) else ""


def _rest(profile: Profile) -> Iterator[Node]:
    """What ran beside the convolutions, by kind and implementation."""
    found: dict[tuple[str, str], list[float]] = {}
    for layer in profile.layers:
        if layer.kind != "convolution":
            found.setdefault((layer.kind, layer.implementation), []).append(layer.seconds)
    if found:
        rows = (
            (kind, code(name), str(len(took)), quantities.seconds(sum(took)), _part(sum(took) / (profile.seconds or 1.0)))
            for (kind, name), took in sorted(found.items(), key=lambda item: -sum(item[1]))
        )
        yield table("Other operators", ("beside them", "implementation", ">times", ">time", "of all time"), rows)


def _density(bench: Bench) -> Iterator[Node]:
    for device in dict.fromkeys(item.device for item in bench.density):
        yield _density_of(device, tuple(item for item in bench.density if item.device == device), bench)


def _density_of(device: str, tables: tuple[Density, ...], bench: Bench) -> Section:
    rows = [
        (
            density.runtime, density.precision, quantities.sizes((cell.kernel, cell.kernel)), quantities.seconds(cell.seconds),
            quantities.number(cell.gflops), _part(cell.share), code(cell.implementation), cell.note,
        )
        for density in tables
        for cell in density.cells
    ]  # fmt: skip
    columns = ("runtime", "precision", "kernel", ">time", ">GFLOP/s", "of peak", "implementation", "note")
    roof = bench.roof(device)
    return Section(
        f"Computational density by kernel size{_on(device, bench)}",
        (
            Paragraph(f"One convolution at equal channels, stride 1: {distinct(map(_setting, tables))}. {ABOVE_PEAK}"),
            Figure(
                Densities(tables, roof.gflops if roof else None),
                "How many operations per second this device makes of each kernel size. Dashed: the measured peak.",
            ),
            table("Density", columns, rows),
        ),
    )


def _on(device: str, bench: Bench) -> str:
    """The device, where there are several."""
    return f" on {device}" if len({row.device for row in bench.rows}) > 1 else ""


def _setting(density: Density) -> str:
    side = quantities.sizes((density.side, density.side))
    return f"{density.channels} channels, {side} pixels, batch {density.batch} ({density.device})"


def _roofline(bench: Bench) -> Iterator[Node]:
    for roof in bench.rooflines:
        yield _roofline_of(roof, bench)


def _roofline_of(roof: Roofline, bench: Bench) -> Section:
    nodes: list[Node] = [
        pairs(
            ("best matrix product", f"{quantities.number(roof.gflops)} GFLOP/s ({roof.gflops_by})"),
            ("best copy", f"{quantities.number(roof.bandwidth / 1e9)} GB/s ({roof.bandwidth_by})"),
            ("they meet at", f"{quantities.number(roof.gflops * 1e9 / roof.bandwidth)} FLOP/byte"),
        )
    ]
    shown = tuple(
        (row_label(row, bench.rows), row.profiles[-1])
        for row in bench.rows
        if row.device == roof.device and row.profiles and any(map(has_place, row.profiles[-1].convolutions))
    )
    if shown:
        caption = (
            "One mark per convolution of the deploy network. Below the slope memory is the limit, below the flat line "
            f"arithmetic is. {ABOVE_PEAK}"
        )
        nodes.append(Figure(Roof(roof, shown), caption))
    return Section(f"What this device reaches at best{_on(roof.device, bench)}", tuple(nodes))


def _absent(bench: Bench) -> Iterator[Node]:
    absent: dict[tuple[str, str, str, str], list[str]] = {}
    for row in bench.rows:
        if row.missing:
            absent.setdefault((row.runtime, row.device, row.missing, row.hint), []).append(str(row.batch))
    if absent:
        rows = (
            (runtime, device, ", ".join(batches), Cell(why, "warn"), code(hint) if hint else "")
            for (runtime, device, why, hint), batches in absent.items()
        )
        columns = ("runtime", "device", ">batch", "what is missing", "what to do")
        yield Section("Not measured", (table("Not measured", columns, rows),))


def _baseline(bench: Bench) -> Iterator[Node]:
    def judged(item: Comparison) -> Cell:
        tones: dict[str, Tone] = {"slower": "bad", "faster": "good", "not judged: unstable": "warn"}
        return Cell(item.verdict, tones.get(item.verdict, "quiet"))

    if bench.baseline:
        rows = (
            (
                item.runtime, item.device, str(item.batch), item.network, Cell(quantities.times(item.ratio.ratio), "strong"),
                f"{item.ratio.low:.2f} to {item.ratio.high:.2f}", judged(item),
            )
            for item in bench.baseline
        )  # fmt: skip
        columns = ("runtime", "device", ">batch", "network", ">time, new over old", "95 % interval", "")
        yield Section("Beside the baseline", (table("Beside the baseline", columns, rows),))


def _doubts(bench: Bench) -> Iterator[Node]:
    warnings = tuple(f"{row_label(row, bench.rows)}: {warning}" for row in bench.rows for warning in row.warnings)
    watched = [(row_label(row, bench.rows), row.watched) for row in bench.rows if row.watched is not None]
    nodes: list[Node] = [Listing((*warnings, *bench.notes))] if warnings or bench.notes else []
    if watched:
        columns = ("runtime", ">clock", "throttled", ">other load per core", "other processes on the GPU")
        rows = ((label, *_seen(item)) for label, item in watched)
        nodes.append(Fold("What the machine did meanwhile", (table("What the machine did", columns, rows),)))
    if nodes:
        yield Section("Doubts", tuple(nodes))


def _seen(watched: Watched) -> tuple[Cell | str, ...]:
    clocks = sorted({f"{clock:,.0f}" for clock in watched.clock_mhz}, key=lambda text: (len(text), text))
    return (
        f"{' to '.join(clocks)} MHz" if clocks else "",
        Cell(", ".join(watched.throttled), "warn"),
        "" if watched.load is None else f"{watched.load:.2f}",
        Cell(", ".join(watched.foreign), "warn"),
    )
