"""How records look in a terminal: results on stdout, progress and errors on stderr."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from repdeploy_cli import options
from repdeploy_cli.terminal import flops_of, number_of, printed, size_of, stderr, stdout, table_of

if TYPE_CHECKING:
    from repdeploy.progress import Progress
    from repdeploy.records import (
        Artifact,
        BlockBranches,
        BlockReport,
        Check,
        Conversion,
        Export,
        Fact,
        FamilyInfo,
        GraphReport,
        Inspection,
        KeptNode,
        Manifest,
        PrunedLayer,
        Pruning,
        Source,
        Tool,
        Verification,
    )  # fmt: skip

MAX_BLOCK_ROWS = 12
"""Longer block tables show their beginning and the last block; --json has them all."""
OPERATORS_NAMED = 6
"""Kinds of operators whose numbers before and after are shown, those that changed most first."""
MAX_FORMULA, LEAST_FORMULA = 40, 10
"""A formula that is longer, or has no room, stands below the table, once."""
DRIFTS_SHOWN = 4
"""Layers of an export in reduced precision whose drift is printed, the worst ones."""
SHORTEST_NAME = 24
"""A block's name is not cut shorter than this."""
BRANCH_COLUMNS = 47
"""Characters of a branch table beside the names of blocks and the formulas."""
COLUMNS_BESIDE = 24
"""Characters of a block table's other columns: parameters, errors, the space between."""


def show_error(message: str, hint: str) -> None:
    """Two lines: what happened and what was expected, what to do."""
    console = stderr()
    console.print(Text.assemble(("error: ", "bold red"), _tidy(message)), soft_wrap=True)
    console.print(Text.assemble(("hint: ", "bold cyan"), _tidy(hint)), soft_wrap=True)


def show_json_error(message: str, hint: str, status: int) -> None:
    """With --json a failure is a document too."""
    if options.as_json():
        import json

        print(
            json.dumps(
                {"schema": "repdeploy.error/1", "error": _tidy(message), "hint": _tidy(hint), "status": status}, indent=1
            )
        )


def chosen(path: Path | None) -> Path:
    """The path that was given, or the newest bundle here, and which one that is."""
    if path is not None:
        return path
    from repdeploy import pipeline

    found = pipeline.newest_bundle()
    if not options.quiet():
        stderr().print(Text(f"taking the newest bundle here: {found}"))
    return found


@contextmanager
def progress() -> Iterator[Progress]:
    """A bar on stderr for what takes longer; nothing where stderr is no terminal or --quiet was given."""
    console = stderr()
    if options.quiet() or not console.is_terminal or console.is_dumb_terminal:
        from repdeploy.progress import silent

        yield silent
        return
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    with Bar(
        TextColumn("{task.description:<40}"), BarColumn(24), TextColumn("{task.completed}/{task.total}"), TimeElapsedColumn(),
        console=console, transient=True,
    ) as bar:  # fmt: skip
        task = bar.add_task("loading", total=1)

        def report(stage: str, done: int, total: int) -> None:
            bar.update(task, description=stage, completed=done, total=total)

        yield report


def show_conversion(conversion: Conversion, *, explain: bool = False) -> None:
    if printed(conversion):
        return
    console, manifest = stdout(), conversion.manifest
    _summary(console, manifest.source, " + ".join(manifest.families), manifest.architecture)
    for note in manifest.notes:
        console.print(Text(f"note: {note}", "yellow"))
    if conversion.already_deployed:
        console.print()
        blocks = f"nothing to fuse: all {len(manifest.blocks)} blocks are in their deploy form already"
        console.print(
            Text("nothing to squeeze: no linear region would get smaller" if manifest.graph else blocks, "bold green")
        )
        if manifest.graph:
            _stays(console, manifest.graph, explain)
        return
    console.print()
    _blocks(console, manifest.blocks)
    _parameters(console, manifest.parameters_before, manifest.parameters_after)
    if manifest.skeleton is None and manifest.copied:
        console.print(f"copied unchanged: {len(manifest.copied)} tensors outside the blocks, for example {manifest.copied[0]}")
    for name, reason in _grouped_by_reason(manifest.dropped):
        console.print(f"left out: {name} ({reason})")
    _norms(console, manifest.norms)
    if manifest.pruning:
        _pruning(console, manifest.pruning)
    if manifest.graph:
        _graph(console, manifest.graph)
        _stays(console, manifest.graph, explain)
    _facts(console, manifest.facts)
    if conversion.bundle is None:
        console.print()
        console.print(Text("dry run: nothing was proved or written", "bold"))
        return
    console.print()
    _verdict(console, manifest)
    console.print()
    console.print(Text.assemble("wrote ", (str(conversion.bundle), "bold")))


def show_inspection(found: Inspection) -> None:
    if printed(found):
        return
    console = stdout()
    families = dict.fromkeys(block.family for block in found.blocks) or {found.family or "": None}
    _summary(console, found.source, " + ".join(families), found.architecture or "")
    for note in found.notes:
        console.print(Text(f"note: {note}", "yellow"))
    if found.source.inert:
        console.print(f"read as inert data, never loaded: {', '.join(found.source.inert)}")
    console.print()
    _blocks(console, found.blocks)
    _parameters(console, found.parameters_before, found.parameters_after)
    if found.already_deployed:
        console.print(Text("every block is in its deploy form already", "bold green"))
    if found.branches:
        _branches(console, found.branches)
    _facts(console, found.facts)
    reasons = [(outcome.family, getattr(outcome, "reason", "")) for outcome in found.skeletons]
    if all(reason for _, reason in reasons):  # no network was recognised: why each that was tried is not it
        for name, reason in reasons:
            console.print(Text(f"not the network {name}: {reason}", "dim"))
    if found.left_alone:
        console.print(f"left alone: {len(found.left_alone)} tensors outside the blocks, for example {found.left_alone[0]}")


def show_verification(verification: Verification) -> int:
    if not printed(verification):
        console = stdout()
        console.print(Text(verification.subject, "bold"))
        console.print(_checks(verification.checks))
        for check in verification.checks:
            if check.failure:
                console.print(Text(f"{check.subject}: {check.failure}", "red"))
        for reason in verification.skipped:
            console.print(Text(f"not checked: {reason}", "yellow"))
        for warning in verification.warnings:
            console.print(Text(f"warning: {warning}", "yellow"))
        passed = sum(check.passed for check in verification.checks)
        style = "bold green" if verification.passed else "bold red"
        console.print(Text(f"{passed} of {len(verification.checks)} checks passed", style))
    return 0 if verification.passed else 4


def show_export(result: Export) -> int:
    if not printed(result):
        console = stdout()
        table = table_of("artifact~", "input", ">opset", ">size", ">error", ">budget")
        for item in result.artifacts:
            strictest = min((check.budget for check in item.checks if check.budget), default=0)
            worst = max((c for c in item.checks if c.budget == strictest), key=lambda check: check.error, default=None)
            table.add_row(
                item.file,
                _input(item.input_shape, item.dynamic),
                str(item.opset or ""),
                size_of(item.bytes),
                number_of(worst.error) if worst else "",
                number_of(worst.budget) if worst else "",
            )
        console.print(table)
        console.print("against the float64 reference:")
        for item in result.artifacts:
            for how in _judged_how(item):
                console.print(Text(f"  {how}"))
        for name in result.reused:
            console.print(f"{name} was current already")
        _norms(console, result.norms)
        for item in result.artifacts:
            _precision(console, item)
        for note in result.notes:
            console.print(note, soft_wrap=True)
        console.print(Text.assemble("in ", (str(result.bundle), "bold")))
    if result.missing:
        show_error(f"not everything was built: {result.missing}", result.hint)
        return 5
    return 0


def show_families(found: tuple[FamilyInfo, ...]) -> None:
    if printed(found, "repdeploy.families/1", "families"):
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for item in found:
        if item.error:
            table.add_row(Text(item.name, "bold"), Text(f"does not load: {item.error}", "red"))
        else:
            networks = ", ".join(item.skeletons) or "block by block"
            if item.architectures:
                networks += f"; official: {_count(item.architectures)}"
            table.add_row(Text(item.name, "bold"), Text(item.title, "bold"))
            table.add_row("", item.source)
            table.add_row("", f"networks: {networks}")
            table.add_row("", f"files: {item.containers}" if item.containers else "files: any")
            if item.asks:
                table.add_row("", f"may ask for: {', '.join(item.asks)}")
        table.add_row("", "")
    console = stdout()
    console.print(table)
    for distribution in dict.fromkeys(item.distribution for item in found):
        names = ", ".join(item.name for item in found if item.distribution == distribution)
        console.print(f"from {distribution}: {names}")
    console.print(
        "Every family also takes eps, stride, padding, dilation and groups with --set, where a file does not tell them."
    )


def show_doctor(found: tuple[Tool, ...]) -> None:
    if printed(found, "repdeploy.doctor/1", "tools"):
        return
    table = table_of("what", "for~", "state", "version~", "how to get it~")
    for item in found:
        table.add_row(
            item.name, item.purpose, Text(item.state, "green" if item.state == "ready" else "yellow"), item.version, item.hint
        )
    stdout().print(table)


def _summary(console: Console, source: Source, family: str, architecture: str) -> None:
    where = f", under {source.where!r}" if source.where else ""
    prefix = f", prefix {source.prefix!r} stripped" if source.prefix else ""
    console.print(Text.assemble((source.file, "bold"), f"  {source.container}, {size_of(source.bytes)}{where}{prefix}"))
    if source.container.startswith("ONNX"):
        console.print(f"{family}: {architecture}")
        return
    weights = {"model": "the model's own weights", "ema": "the EMA weights"}[source.weights]
    if source.has_ema:
        other = "ema" if source.weights == "model" else "model"
        weights += f" (the file also holds the other ones: --weights {other})"
    console.print(f"{family}: {architecture}; {weights}")
    for where, count in source.others:
        if "ema" not in where.lower():
            console.print(
                Text(f"note: {where or 'another table'} ({count} tensors) is in the file too and was not taken", "yellow")
            )


def _verdict(console: Console, manifest: Manifest) -> None:
    verdict = manifest.verdict
    head = "; ".join((f"{'verified' if verdict.passed else 'FAILED'}, {verdict.grade}", *verdict.warnings))
    console.print(Text(head, "bold red" if not verdict.passed else "bold yellow" if verdict.warnings else "bold green"))
    algebra = [check for check in verdict.checks if check.gate == "algebra"]
    others = [check for check in verdict.checks if check.gate != "algebra"]
    rows = others
    if algebra:
        from dataclasses import replace

        worst = max(algebra, key=lambda check: check.error)
        what = "regions" if manifest.graph else "blocks"
        rows = [replace(worst, subject=f"{len(algebra)} {what}, the worst is {worst.subject or '(root)'}"), *others]
    console.print(_checks(rows))
    if verdict.grade == "self-consistent":
        rests = "rests on the assumed facts above" if verdict.assumed else "has not met outputs of yours"
        console.print(
            f"self-consistent: the fusion is proved; the description behind it {rests}.\n"
            "Anchor it with --expect FILE.npz (input and output recorded by your training code)."
        )


def _checks(checks: Iterable[Check]) -> Table:
    table = table_of("gate", "what~", ">error", ">budget", "")
    for check in checks:
        mark = Text("ok", "green") if check.passed else Text("FAILED", "bold red")
        error = "-" if check.failure and check.error == float("inf") else number_of(check.error)
        table.add_row(check.gate, check.subject, error, number_of(check.budget), mark)
    return table


def _blocks(console: Console, blocks: tuple[BlockReport, ...]) -> None:
    """One row per block; formulas that would fill the table stand below it, under a letter."""
    proved = any(block.residual is not None for block in blocks)
    shown = blocks if len(blocks) <= MAX_BLOCK_ROWS else (*blocks[: MAX_BLOCK_ROWS - 2], blocks[-1])
    beside = max(len(_fused(block)) for block in shown) + COLUMNS_BESIDE
    room_for_names = max(console.width - beside - LEAST_FORMULA, SHORTEST_NAME)
    taken = min(max(len(block.name) for block in shown), room_for_names) + beside
    room = min(MAX_FORMULA, max(console.width - taken, LEAST_FORMULA))
    long = dict.fromkeys(block.formula for block in shown if len(block.formula) > room)
    letters = dict(zip(long, ascii_uppercase, strict=False))
    head = "" if all(block.formula in letters for block in shown) else "branches~"
    table = table_of("block", head, "fused", ">parameters", *((">error",) if proved else ()))
    table.columns[1].min_width = len(head.rstrip("~")) or None
    for index, block in enumerate(shown):
        if len(shown) < len(blocks) and index == len(shown) - 1:
            table.add_row(f"... {len(blocks) - len(shown)} more")
        table.add_row(*_block_cells(block, letters.get(block.formula, block.formula), proved, room_for_names))
    console.print(table)
    for formula, letter in letters.items():
        console.print(f"{letter} = {formula}")


def _block_cells(block: BlockReport, formula: str, proved: bool, room: int) -> list[str]:
    error = [f"{block.residual:.0e}"] if proved and block.residual is not None else []
    return [_shortened(block.name or "(root)", room), formula, _fused(block), f"{block.parameters_after:,}", *error]


def _shortened(name: str, room: int) -> str:
    """A long name without its middle, whose ends tell most."""
    if len(name) <= room:
        return name
    head = (room - 3) // 3
    return f"{name[:head]}...{name[len(name) - (room - 3 - head) :]}"


def _fused(block: BlockReport) -> str:
    out, within, height, width = block.kernel
    return f"{height}x{width} {within * block.groups} -> {out}" + (f", g={block.groups}" if block.groups > 1 else "")


def _pruning(console: Console, pruning: Pruning) -> None:
    """Which convolutions lost channels, what that saves, and what zeroing them costs."""
    for note in pruning.notes:
        console.print(Text(f"note: {note}", "yellow"))
    if not pruning.layers:
        console.print("no channel leaves the network")
        return
    console.print()
    table = table_of("pruned", ">width", ">now", ">removed")
    layers = pruning.layers
    shown = layers if len(layers) <= MAX_BLOCK_ROWS else (*layers[: MAX_BLOCK_ROWS - 2], layers[-1])
    for index, layer in enumerate(shown):
        if len(shown) < len(layers) and index == len(shown) - 1:
            table.add_row(f"... {len(layers) - len(shown)} more")
        table.add_row(layer.name, str(layer.before), str(layer.after), _share_gone(layer))
    console.print(table)
    flops, parameters = (
        f"{text(before)} -> {text(after)} ({after / before - 1:+.1%})"
        for before, after, text in (
            (pruning.flops_before, pruning.flops_after, flops_of),
            (pruning.parameters_before, pruning.parameters_after, "{:,}".format),
        )
    )
    console.print(f"{pruning.removed} channels leave the fused network: {flops}, parameters {parameters}")
    if pruning.cost is not None:
        console.print(f"what pruning costs: the training-time outputs change by {number_of(pruning.cost)} (relative)")


def _share_gone(layer: PrunedLayer) -> str:
    gone = 1 - layer.after / layer.before
    return f"{gone:.0%}" if gone >= 0.01 else "<1%"


def _graph(console: Console, graph: GraphReport) -> None:
    """What squeezing a graph did to its operators, and what that saves."""
    before, after = dict(graph.operators_before), dict(graph.operators_after)
    changed = [name for name in before if before[name] != after.get(name, 0)]
    most = sorted(changed, key=lambda name: before[name] - after.get(name, 0), reverse=True)[:OPERATORS_NAMED]
    console.print("operators: " + ", ".join(f"{name} {before[name]} -> {after.get(name, 0)}" for name in most))
    images = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in graph.sampled)
    console.print(
        f"squeezed regions, estimated at {images}: {flops_of(graph.flops_before)} -> {flops_of(graph.flops_after)}, "
        f"{size_of(graph.bytes_before)} -> {size_of(graph.bytes_after)} moved"
    )


def _stays(console: Console, graph: GraphReport, explain: bool) -> None:
    """The linear operators that were not squeezed: how many, or with --explain each one's reason."""
    if not graph.kept:
        return
    if not explain:
        count = (
            f"{len(graph.kept)} linear operators stay as they are"
            if len(graph.kept) > 1
            else "1 linear operator stays as it is"
        )
        console.print(f"{count}; --explain says why")
        return
    groups: dict[tuple[str, str], list[KeptNode]] = {}
    for node in graph.kept:
        groups.setdefault((node.operator, node.reason), []).append(node)
    console.print()
    for (operator, reason), nodes in groups.items():
        console.print(Text.assemble((f"{operator} stays", "bold"), f" ({len(nodes)}x): {reason}"))
        names = [node.name or "(no name)" for node in nodes]
        if nodes[0].flops_before is not None:
            names = [f"{node.name}: {flops_of(node.flops_before or 0)} -> {flops_of(node.flops_after or 0)}" for node in nodes]
        console.print(Padding(", ".join(names), (0, 0, 0, 4)))


def _judged_how(artifact: Artifact) -> list[str]:
    """What judged an artifact, and at which sizes: "model.fp32.onnx in onnxruntime: batch 1, 2, 5"."""
    sizes: dict[str, list[str]] = {}
    for check in artifact.checks:
        how, _, size = check.subject.rpartition(", ")
        sizes.setdefault(how or size, []).extend([size] if how else [])
    shown = []
    for how, found in sizes.items():
        kinds = {size.split(" ")[0] for size in found}
        numbers = ", ".join(size.partition(" ")[2] for size in found)
        shown.append(how + (f": {kinds.pop()} {numbers}" if len(kinds) == 1 else f": {', '.join(found)}" if found else ""))
    return shown


def _precision(console: Console, artifact: Artifact) -> None:
    """Of reduced precision: which layers stay in float32 and why, and where the graph drifts most."""
    for reason in dict.fromkeys(layer.reason for layer in artifact.wide):
        names = [layer.name for layer in artifact.wide if layer.reason == reason]
        listed = ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
        console.print(Text(f"in float32: {listed} ({reason})"), soft_wrap=True)
    if artifact.drift:
        worst = sorted(artifact.drift, key=lambda item: -item.error)[:DRIFTS_SHOWN]
        listed = ", ".join(f"{item.name} {number_of(item.error)}" for item in worst)
        more = f" (of {len(artifact.drift)} layers; --json has them all)" if len(artifact.drift) > len(worst) else ""
        console.print(Text(f"largest drift from float64: {listed}{more}"), soft_wrap=True)


def _norms(console: Console, norms: tuple[tuple[str, str], ...]) -> None:
    """The batch norms that no convolution takes in, each reason once."""
    for reason in dict.fromkeys(reason for _, reason in norms):
        names = [name for name, why in norms if why == reason]
        listed = ", ".join(names) if len(names) <= 4 else f"{', '.join(names[:3])} and {len(names) - 3} more"
        console.print(f"stays a batch norm: {listed} ({reason})")


def _branches(console: Console, blocks: tuple[BlockBranches, ...]) -> None:
    """Per block and branch, then each kind of branch over all blocks."""
    from statistics import median

    table = table_of("block", "branch~", ">share", ">norm", ">closest", ">dead channels")
    shown = blocks[:MAX_BLOCK_ROWS]
    names = min(
        max((len(block.name) for block in shown), default=0), max(console.width - BRANCH_COLUMNS - LEAST_FORMULA, SHORTEST_NAME)
    )
    room = max(console.width - BRANCH_COLUMNS - names, LEAST_FORMULA)
    formulas = dict.fromkeys(branch.formula for block in shown for branch in block.branches)
    letters = dict(zip((formula for formula in formulas if len(formula) > room), ascii_uppercase, strict=False))
    for block in shown:
        for index, branch in enumerate(block.branches):
            others = [(cosine, other) for other, cosine in enumerate(branch.similarity) if other != index]
            cosine, other = max(others, key=lambda item: abs(item[0]), default=(0.0, -1))
            table.add_row(
                _shortened(block.name or "(root)", names) if index == 0 else "",
                f"{index + 1}  {letters.get(branch.formula, branch.formula)}",
                f"{branch.share:.1%}",
                f"{branch.norm:.2f}",
                f"{cosine:+.2f} to {other + 1}" if other >= 0 else "",
                Text("all", "bold red") if branch.is_dead else f"{branch.dead_channels} of {block.channels}",
            )
    console.print()
    console.print(table)
    for formula, letter in letters.items():
        console.print(f"{letter} = {formula}")
    if len(blocks) > MAX_BLOCK_ROWS:
        console.print(f"... {len(blocks) - MAX_BLOCK_ROWS} more; --json has them all")
    summary = table_of("branch of all blocks~", ">blocks", ">median share", "from .. to", ">dead in")
    kinds = dict.fromkeys((index, item.formula) for block in blocks for index, item in enumerate(block.branches))
    for index, formula in sorted(kinds):
        found = [item for block in blocks for item in block.branches[index : index + 1] if item.formula == formula]
        shares, dead = [item.share for item in found], sum(item.is_dead for item in found)
        span = f"{min(shares):.1%} .. {max(shares):.1%}"
        summary.add_row(f"{index + 1}  {formula}", str(len(found)), f"{median(shares):.1%}", span, str(dead))
    console.print()
    console.print(summary)
    silent = sum(block.dead_channels for block in blocks)
    console.print(
        "share: of the fused kernel's squared norm (a block's add up to 100 %); closest: cosine to the most similar branch;\n"
        f"{silent} of {sum(block.channels for block in blocks)} output channels have a fused kernel of zero"
    )


def _facts(console: Console, facts: tuple[Fact, ...]) -> None:
    from repdeploy.records import ORIGINS

    if not facts:
        return
    console.print()
    table = table_of("fact", ">value", "blocks~", "origin~")
    for fact in sorted(facts, key=lambda fact: (fact.name, fact.value)):
        scopes = [scope or "(root)" for scope in fact.scopes]
        where = ", ".join(scopes) if len(scopes) <= 3 else f"{len(scopes)} blocks"
        style = "yellow" if fact.origin == "default" else ""
        table.add_row(fact.name, fact.value, where, Text(ORIGINS[fact.origin], style))
    console.print(table)


def _parameters(console: Console, before: int, after: int) -> None:
    console.print(f"parameters {before:,} -> {after:,} ({after / before - 1:+.1%})")


def _grouped_by_reason(dropped: tuple[tuple[str, str], ...]) -> list[tuple[str, str]]:
    groups: dict[str, list[str]] = {}
    for name, reason in dropped:
        root = name.split(".")[0]
        if root not in groups.setdefault(reason, []):
            groups[reason].append(root)
    return [(", ".join(names), reason) for reason, names in groups.items()]


def _input(shape: tuple[int, ...], dynamic: tuple[str, ...]) -> str:
    names = {0: "batch", 2: "height", 3: "width"}
    parts = [names[index] if names.get(index) in dynamic else str(size) for index, size in enumerate(shape)]
    return "x".join(parts)


def _count(names: tuple[str, ...]) -> str:
    return ", ".join(names) if len(names) <= 4 else f"{names[0]} ... {names[-1]} ({len(names)})"


def _tidy(text: str) -> str:
    return " ".join(text.split())
