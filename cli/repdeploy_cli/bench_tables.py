"""How measurements look in a terminal: latency first, then why it is what it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.text import Text

from repdeploy_cli.terminal import flops_of, printed, size_of, stdout, table_of, time_of

if TYPE_CHECKING:
    from repdeploy.measurements import (
        Bench,
        BenchRow,
        Interval,
        Memory,
        Profile,
        RanLayer,
        Roofline,
        Suite,
        SuiteRow,
        TrainStep,
        TrainSteps,
    )

VERDICTS = {"slower": "red", "faster": "green", "not judged: unstable": "yellow"}
WIDE = 100
"""Columns of a terminal that has room for the tail of latencies too."""
MOST_KERNELS = 3
"""Names of kernels shown per network, those that took most time."""
MEASURES = {"saved": "saved for backward", "allocated": "allocator peak"}
TOO_UNSTABLE, SLOWER = 7, 8
"""Exit statuses of `bench` (design section 4)."""


def show_bench(result: Bench, *, layers: bool = False, strict: bool = False) -> int:
    """Returns the exit status: 7 where --strict finds a row unstable, 8 where a baseline was faster, else 0."""
    status = _status(result, strict)
    if printed(result):
        return status
    console = stdout()
    measured = [row for row in result.rows if row.timings]
    first = measured[0].timings[0]
    image = "x".join(map(str, first.input_shape[1:]))
    console.print(
        Text.assemble(
            (result.subject, "bold"),
            f"  on {first.device}, images {image}, {first.precision}, {first.threads} threads, caches {first.l2}",
        )
    )
    _latency(console, measured)
    for row in result.rows:
        for line in _remarks(row):
            console.print(line)
    _memory(console, measured)
    _inside(console, measured, result)
    if layers:
        for row in measured:
            for profile in row.profiles:
                _layers(console, row, profile, result.roof_of(row))
    _density(console, result)
    _findings(console, measured)
    _baseline(console, result)
    for note in result.notes:
        console.print(Text(f"note: {note}", "yellow"))
    if status == TOO_UNSTABLE:
        console.print(Text("too unstable (--strict): see the warnings above", "bold red"))
    return status


def _status(result: Bench, strict: bool) -> int:
    if strict and not all(row.is_stable for row in result.rows):
        return TOO_UNSTABLE
    return SLOWER if any(item.is_slower for item in result.baseline) else 0


def _latency(console: Console, rows: list[BenchRow]) -> None:
    names = max((tuple(timing.network for timing in row.timings) for row in rows), key=len)
    both = len(names) == 2
    with_tail = console.width >= WIDE and all("p90" in row.timings[-1].percentiles for row in rows)
    tail = (">p90",) if with_tail else ()
    columns = (
        (*(f">{name.removesuffix('-time')}" for name in names), *tail, ">speed-up", "95 %") if both else (">latency", *tail)
    )
    table = table_of("runtime", ">batch", *columns, ">images/s")
    for row in rows:
        last = row.timings[-1]
        cells: list[str | Text] = [time_of(timing.median) for timing in row.timings]
        cells = ["", *cells] if both and len(cells) == 1 else cells
        cells += [time_of(last.percentiles["p90"])] if with_tail else []
        if both:
            cells += _ratio(row.speedup) if row.speedup is not None else ["", ""]
        table.add_row(row.runtime, str(row.batch), *cells, f"{last.images_per_second:,.0f}")
    console.print(table)
    runs = sorted({len(timing.seconds) for row in rows for timing in row.timings})
    many = f"{runs[0]}{f' to {runs[-1]}' if runs[-1] > runs[0] else ''}"
    how = "interleaved runs per network" if both else "runs"
    console.print(f"medians of {many} {how}, all kept{f'; p90 of {names[-1]}' if both and with_tail else ''}")


def _ratio(ratio: Interval) -> list[str | Text]:
    style = "" if not ratio.differs else "green" if ratio.ratio > 1 else "red"
    return [Text(f"{ratio.ratio:.2f}x", style), f"{ratio.low:.2f}..{ratio.high:.2f}"]


def _remarks(row: BenchRow) -> Iterator[Text | str]:
    where = f"{row.runtime}, batch {row.batch}"
    if row.speedup is not None and not row.speedup.differs:
        none = "no difference (the interval includes 1, or the effect is under 1 %)"
        yield f"{where}: {'too noisy to tell a difference' if row.speedup.is_undecided else none}"
    if row.drift is not None:
        yield f"{where}: computes in {row.timings[-1].precision}, {row.drift:.1e} of the largest output beside float32"
    for warning in row.warnings:
        yield Text(f"warning: {where}, {warning}", "yellow")
    if row.missing:
        failed = row.missing.startswith("failed")
        name = where if failed else f"{row.runtime} on {row.device}"
        yield Text(f"{name}: {row.missing}" + (f"; {row.hint}" if row.hint else ""), "yellow")


def _memory(console: Console, rows: list[BenchRow]) -> None:
    rows = [row for row in rows if row.memory]
    if not rows:
        return
    on_device = any(item.allocated is not None for row in rows for item in row.memory)
    third = "allocated" if on_device else "resident"
    table = table_of("memory", ">batch", ">weights", ">live activations", f">{third}")
    for row in rows:
        cells = [_change(row.memory, name) for name in ("weights", "live", third)]
        table.add_row(row.runtime, str(row.batch), *cells)
    console.print()
    console.print(table)
    what = "of the allocator" if on_device else "of what the process grew by"
    console.print(f"live: the exact peak of activations, from the graph as exported; {third}: the peak {what}")


def _change(memory: tuple[Memory, ...], field: str) -> str:
    found = [getattr(item, field) for item in memory]
    return " -> ".join("?" if value is None else size_of(value) for value in found)


def _inside(console: Console, rows: list[BenchRow], result: Bench) -> None:
    rows = [row for row in rows if row.profiles]
    if not rows:
        return
    columns = ("convolutions", ">batch", ">count", ">3x3: FLOPs", ">time", ">GFLOP/s", "kernels~")
    table = table_of(*columns)
    for row in rows:
        profile, roof = row.profiles[-1], result.roof_of(row)
        large = profile.of_3x3()
        seconds = sum(layer.seconds for layer in large)
        rate = sum(layer.flops for layer in large) / seconds / 1e9 if seconds else 0.0
        of_peak = f" ({rate / roof.gflops:.0%})" if roof is not None and rate else ""
        table.add_row(
            row.runtime, str(row.batch), str(len(profile.convolutions)), f"{profile.share_3x3_flops:.0%}",
            f"{profile.share_3x3_time:.0%}", f"{rate:,.0f}{of_peak}" if rate else "", ", ".join(_kernels(profile.convolutions)),
        )  # fmt: skip
    console.print()
    console.print(table)
    console.print(f"inside the {rows[0].profiles[-1].network} network; every convolution: --layers, --json or report")


def _kernels(layers: Iterable[RanLayer]) -> list[str]:
    taken: dict[str, float] = {}
    for layer in layers:
        taken[layer.implementation] = taken.get(layer.implementation, 0.0) + layer.seconds
    names = sorted(taken, key=lambda name: -taken[name])
    return names[:MOST_KERNELS] + ([f"{len(names) - MOST_KERNELS} more"] if len(names) > MOST_KERNELS else [])


def _layers(console: Console, row: BenchRow, profile: Profile, roof: Roofline | None) -> None:
    wide = console.width >= WIDE
    extra = (">map", ">FLOPs") if wide else ()
    table = table_of("layer~", ">kernel", ">channels", *extra, ">time", ">GFLOP/s", ">of peak", "kernel that ran~")
    for layer in profile.layers:
        if layer.kind == "convolution":
            groups = "" if layer.groups == 1 else " dw" if layer.is_depthwise else f" g{layer.groups}"
            sizes = ("x".join(map(str, layer.output_shape[2:])), flops_of(layer.flops)) if wide else ()
            table.add_row(
                layer.name, "x".join(map(str, layer.kernel)) + groups, f"{layer.inputs} -> {layer.outputs}", *sizes,
                time_of(layer.seconds), f"{layer.gflops:,.0f}", f"{layer.gflops / roof.gflops:.0%}" if roof is not None else "",
                layer.implementation,
            )  # fmt: skip
    rest = sum(layer.seconds for layer in profile.layers if layer.kind != "convolution")
    console.print()
    console.print(Text(f"{profile.network} in {row.runtime}, batch {row.batch} ({profile.source})", "bold"))
    console.print(table)
    console.print(f"everything else: {time_of(rest)} ({rest / profile.seconds if profile.seconds else 0:.0%})")


def _density(console: Console, result: Bench) -> None:
    if not result.density:
        return
    sizes = [cell.kernel for cell in result.density[0].cells]
    table = table_of("GFLOP/s by kernel size", *(f">{size}x{size}" for size in sizes))
    for item in result.density:
        cells = [f"{cell.gflops:,.0f} ({cell.share:.0%}){'*' if cell.note else ''}" for cell in item.cells]
        table.add_row(f"{item.runtime}, {item.channels} channels", *cells)
    console.print()
    console.print(table)
    roof = result.roof(result.density[0].device)
    if roof is not None:
        first = result.density[0]
        console.print(
            f"batch {first.batch}, {first.side}x{first.side}; at best this device reaches {roof.gflops:,.0f} GFLOP/s "
            f"({roof.gflops_by}) and copies {roof.bandwidth / 1e9:,.0f} GB/s ({roof.bandwidth_by})",
        )
    notes = dict.fromkeys(cell.note for item in result.density for cell in item.cells if cell.note)
    for note in notes:
        console.print(f"* {note}")


def _findings(console: Console, rows: list[BenchRow]) -> None:
    found = [(row, finding) for row in rows for finding in row.findings]
    if not found:
        return
    console.print()
    console.print(Text("what holds it back", "bold"))
    for row, finding in found:
        console.print(Text.assemble((f"{row.runtime}, batch {row.batch}, {finding.kind}: ", "cyan"), finding.evidence))
        console.print(Padding(Text(finding.remedy, "green"), (0, 0, 0, 4), expand=False))


def _baseline(console: Console, result: Bench) -> None:
    if not result.baseline:
        return
    table = table_of("against the baseline", ">batch", "network", ">time", "95 %", "")
    for item in result.baseline:
        said = Text(item.verdict, VERDICTS.get(item.verdict, ""))
        table.add_row(
            item.runtime, str(item.batch), item.network, f"{item.ratio.ratio:.2f}x",
            f"{item.ratio.low:.2f}..{item.ratio.high:.2f}", said,
        )  # fmt: skip
    console.print()
    console.print(table)


def show_suite(result: Suite) -> int:
    if printed(result):
        return 0
    console = stdout()
    first = next(row.timing for row in result.rows if row.timing is not None)
    image = "x".join(map(str, first.input_shape[1:]))
    console.print(
        Text.assemble(
            (result.name, "bold"),
            f"  on {first.device}, batch {first.batch}, images {image}, {first.precision}, {first.threads} threads, images/s",
        )
    )
    wide = console.width >= WIDE
    runtimes = dict.fromkeys(row.runtime for row in result.rows)
    sizes = (">parameters", ">FLOPs") if wide else ()
    table = table_of("network", *sizes, *(f">{name}" for name in runtimes), ">paper")
    by_network: dict[str, list[SuiteRow]] = {}
    for row in result.rows:
        by_network.setdefault(row.network, []).append(row)
    for name, rows in by_network.items():
        cells = (f"{rows[0].parameters / 1e6:.2f}M", flops_of(rows[0].flops)) if wide else ()
        table.add_row(name, *cells, *map(_speed, rows), "" if rows[0].paper is None else f"{rows[0].paper:,.0f}")
    console.print(table)
    console.print("in brackets: GFLOP/s, additions and multiplications apart; ?: not steady during warm-up")
    console.print(f"paper: {result.paper_conditions}")
    ratios = table_of("times as fast", "as", "runtime", ">measured", "95 %", ">paper", *(("where~",) if wide else ()))
    for item in result.ratios:
        measured = ["-", ""] if item.measured is None else _ratio(item.measured)
        where = (item.source,) if wide else ()
        ratios.add_row(item.network, item.reference, item.runtime, *measured, f"{item.paper:.2f}x", *where)
    console.print()
    console.print(ratios)
    for row in result.rows:
        if row.missing:
            console.print(Text(f"{row.network} in {row.runtime}: {row.missing}", "yellow"))
    for note in result.notes:
        console.print(f"note: {note}")
    return 0


def _speed(row: SuiteRow) -> Text | str:
    if row.timing is None:
        return Text("-", "yellow")
    speed = row.timing.images_per_second
    return f"{speed:,.1f} ({speed * row.flops / 1e9:,.0f}){'' if row.timing.steady else '?'}"


def show_train_steps(result: TrainSteps) -> int:
    if printed(result):
        return 0
    console = stdout()
    threads = result.environment.get("threads", "?")
    console.print(
        Text.assemble(
            ("training steps", "bold"),
            f"  on {result.rows[0].device}, float32, {threads} threads, interleaved",
        )
    )
    with_device = any(row.allocated is not None for row in result.rows)
    table = table_of(
        "network", ">images", ">step", ">images/s", ">saved for backward", *((">allocator peak",) if with_device else ())
    )
    for row in result.rows:
        images = f"{row.batch}x{row.side}x{row.side}"
        if row.missing:
            table.add_row(_trained(row), images, Text("-", "yellow"), "", "")
            continue
        peak = (size_of(row.allocated or 0),) if with_device else ()
        table.add_row(_trained(row), images, time_of(row.median), f"{row.batch / row.median:,.1f}", size_of(row.saved), *peak)
    console.print(table)
    for row in result.rows:
        if row.missing:
            console.print(Text(f"{_trained(row)}, {row.side}x{row.side}: {row.missing}", "yellow"))
    _extra(console, result)
    _gains(console, result)
    for note in result.notes:
        console.print(note)
    return 0


def _trained(row: TrainStep) -> str:
    return f"{row.block} {row.network}" if row.block else row.network


def _extra(console: Console, result: TrainSteps) -> None:
    if not result.extra:
        return
    sides = result.extra[0].sides
    table = table_of("beyond plain", "bytes", *(f">{side}x{side}" for side in sides), "grows~")
    for item in result.extra:
        said = "" if item.is_flat is None else "hardly" if item.is_flat else "with the image"
        grows = f"{said} (pixels to the power {item.exponent:.2f})" if item.exponent is not None else ""
        sizes = (f"{'-' if extra < 0 else ''}{size_of(abs(extra))}" for extra in item.extra)
        table.add_row(f"{item.block} {item.network}", MEASURES[item.measure], *sizes, grows)
    console.print()
    console.print(table)


def _gains(console: Console, result: TrainSteps) -> None:
    if not result.gains:
        return
    table = table_of("OREPA beside DBB", ">images", "bytes", ">extra saved", ">paper", ">faster", "95 %", ">paper ")
    for item in result.gains:
        low, high = item.paper_saved
        slow, fast = item.paper_faster
        table.add_row(
            item.network, f"{item.batch}x{item.side}x{item.side}", MEASURES[item.measure],
            "?" if item.saved is None else f"{item.saved:.0%}", f"{low:.0%} to {high:.0%}",
            *(["-", ""] if item.faster is None else _ratio(item.faster)), f"{slow} to {fast}x",
        )  # fmt: skip
    console.print()
    console.print(table)
    for item in result.gains:
        if item.break_even is not None and item.measure == "saved":
            console.print(f"{item.side}x{item.side}: OREPA takes less than DBB from {item.break_even:.1f} images per step on")
