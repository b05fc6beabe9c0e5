"""The whole page, in order: what it is, whether it may be trusted, what changed, what it is worth, how to do it again."""

from __future__ import annotations

import shlex

from repdeploy.measurements import Bench
from repdeploy.page import benchmark, conversion, quantities
from repdeploy.page.document import Command, Document, Node, Paragraph, Section, Tile, Tone, code, pairs
from repdeploy.records import Manifest

WEIGHTS = {"model": "the model's own", "ema": "the moving average (EMA)"}


def document(manifest: Manifest, bench: Bench | None, bundle: str) -> Document:
    """What a bundle's records say. `bundle`: its name, for the commands that are shown."""
    source = manifest.source
    family = " + ".join(manifest.families) or manifest.family
    measured = (benchmark.benchmark(bench), benchmark.environment(bench)) if bench is not None else (benchmark.missing(bundle),)
    sections = (
        conversion.verdict(manifest),
        conversion.network(manifest),
        conversion.artifacts(manifest, bundle),
        *measured,
        _again(manifest, bench, bundle),
    )
    facts = pairs(
        ("source", code(source.file)),
        ("SHA-256", code(source.sha256)),
        ("container", f"{source.container}, {quantities.size(source.bytes)}"),
        ("table", code(source.where)),
        ("weights", WEIGHTS[source.weights] if source.has_ema else ""),
        ("family", family),
        ("architecture", manifest.architecture),
    )
    return Document(source.file, f"{family}: {manifest.architecture}", _tiles(manifest, bench), facts, sections)


def _tiles(manifest: Manifest, bench: Bench | None) -> tuple[Tile, ...]:
    passed = manifest.verdict.passed
    tone: Tone = "bad" if not passed else "warn" if manifest.verdict.warnings else "good"
    before, after = manifest.parameters_before, manifest.parameters_after
    tiles = [
        Tile("verdict", "verified" if passed else "FAILED", manifest.verdict.grade, tone),
        Tile("parameters", quantities.change(before, after), f"{before:,} → {after:,}"),
    ]
    tiles.append(_speedup(bench) if bench is not None else Tile("speed-up", quantities.UNKNOWN, "not measured"))
    return tuple(tiles)


def _speedup(bench: Bench) -> Tile:
    """What the stable rows say; what unstable ones say only where there are no others."""
    compared = [row for row in bench.rows if row.speedup is not None]
    stable = [row for row in compared if row.is_stable]
    ratios = sorted((row.speedup for row in stable or compared if row.speedup is not None), key=lambda item: item.ratio)
    if not ratios:
        return Tile("speed-up", quantities.UNKNOWN, "one network was measured")
    span = quantities.times(ratios[-1].ratio)
    if quantities.times(ratios[0].ratio) != span:
        span = f"{ratios[0].ratio:.2f} to {span}"
    if not stable:
        return Tile("speed-up", span, "every measurement was unstable", "warn")
    faster = sum(item.differs and item.ratio > 1 for item in ratios)
    left_out = f"; {len(compared) - len(stable)} unstable ones left out" if len(stable) < len(compared) else ""
    return Tile("speed-up", span, f"faster in {faster} of {quantities.plural(len(stable), 'measurement')}{left_out}")


def _again(manifest: Manifest, bench: Bench | None, bundle: str) -> Section:
    commands = [manifest.command, *(item.command for item in manifest.artifacts)]
    commands += benchmark.commands(bench, bundle) if bench is not None else []
    commands += [shlex.join(("repdeploy", verb, bundle)) for verb in ("verify", "report")]
    nodes: list[Node] = [Command("\n".join(dict.fromkeys(commands)))]
    if manifest.tools:
        nodes += [Paragraph("It was converted with:"), pairs(*manifest.tools.items())]
    return Section("How to reproduce it", tuple(nodes))
