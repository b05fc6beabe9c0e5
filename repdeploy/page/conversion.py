"""What a manifest has to say: what was proved, what became of the network, which files there are."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace

from repdeploy.page import quantities
from repdeploy.page.document import (
    Cell,
    Command,
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
from repdeploy.page.labels import distinct, grouped, some
from repdeploy.records import (
    ORIGINS,
    Artifact,
    BlockReport,
    Check,
    Fact,
    Grade,
    GraphReport,
    Manifest,
    Pruning,
    WideLayer,
)  # fmt: skip

GRADES: dict[Grade, str] = {
    "anchored": (
        "Anchored: the network was also held against something outside this tool, and agreed with it: outputs recorded by the "
        "training code, the user's own model, or the original graph. So both are shown: that fusing changed nothing, and that "
        "the network is described here as it was trained."
    ),
    "self-consistent": (
        "Self-consistent: it is proved that the deploy network computes what the training-time network computes, as that is "
        "described here. The description itself (strides, padding, the epsilon of batch norms, activations) has not met an "
        "output of the training code. Record one and convert again with --expect FILE.npz to anchor it."
    ),
    "blocks only": (
        "Blocks only: every fused block is proved to compute what its branches computed. The network around the blocks was not "
        "run, so nothing is said about the whole."
    ),
}
GATES = {
    "algebra": "each block by itself, branch by branch and as one convolution, in float64",
    "network": "the whole network before and after, in float64",
    "stored": "the stored numbers are the exact result rounded once, bit for bit",
    "rounding": "in float32 the deploy network strays from the exact outputs no more than the training-time network may",
    "anchor": "outputs that were recorded, or computed, outside this tool",
    "roads": "two independent ways to the kernels, by the checkpoint's keys and by the graph",
    "artifact": "an exported file, as a runtime computes it, against the exact outputs",
}
FEW = 12
"""Longer tables are folded away."""


def verdict(manifest: Manifest) -> Section:
    """Whether the deploy network may be trusted, how that is known, and what it rests on."""
    found = manifest.verdict
    nodes: list[Node] = [_judgement(manifest), *(Notice("Warning", (text,)) for text in found.warnings)]
    algebra = [check for check in found.checks if check.gate == "algebra"]
    shown = [check for check in found.checks if check.gate != "algebra"]
    if algebra:
        worst = max(algebra, key=lambda check: (not check.passed, check.error))
        what = quantities.plural(len(algebra), "region" if manifest.graph else "block")
        shown = [replace(worst, subject=f"{what}, the worst is {worst.subject or '(root)'}"), *shown]
    if shown:
        nodes.append(checks_table(shown, "Checks"))
        present = dict.fromkeys(check.gate for check in shown)
        nodes.append(
            Fold(
                "What the gates mean",
                (pairs(*((gate, GATES.get(gate, "")) for gate in present), *_measures(shown)),),
            )
        )
    if len(algebra) > 1:
        nodes.append(Fold(f"All {len(algebra)} checks of the algebra", (checks_table(algebra, "Checks of the algebra"),)))
    if found.assumed and found.grade != "anchored":
        values = grouped((fact.value, fact.name) for fact in found.assumed)
        named = ", ".join(f"{name} {' or '.join(sorted(set(given)))}" for name, given in sorted(values.items()))
        nodes.append(Notice("Assumed, not read from the file", (named,), "state what differs with --set and convert again"))
    if manifest.facts:
        facts = _facts(manifest.facts)
        nodes.append(facts if len(facts.rows) <= FEW else Fold("Facts that tensors do not tell", (facts,)))
    nodes += [Paragraph(f"Note: {note}", "quiet") for note in manifest.notes]
    return Section("Verdict", tuple(nodes))


def network(manifest: Manifest) -> Section:
    """The network before and after: blocks, parameters, what was pruned, and of a graph its operators."""
    before, after = manifest.parameters_before, manifest.parameters_after
    nodes: list[Node] = [
        pairs(
            ("parameters", f"{before:,} → {after:,} ({quantities.change(before, after)})"),
            ("fused blocks", f"{len(manifest.blocks):,}"),
            ("image", quantities.sizes(manifest.input_shape)),
            ("skeleton", manifest.skeleton or ""),
            ("tensors copied unchanged", f"{len(manifest.copied):,}" if manifest.copied else ""),
        )
    ]
    if manifest.blocks:
        nodes.append(_kinds(manifest.blocks))
        every = _blocks(manifest.blocks)
        nodes.append(every if len(manifest.blocks) <= FEW else Fold(f"All {len(manifest.blocks)} blocks", (every,)))
    for heading, named in (("Left out", manifest.dropped), ("Stay batch norms", manifest.norms)):
        if named:
            nodes.append(Listing(tuple(f"{heading}: {some(names)} ({reason})" for reason, names in grouped(named).items())))
    if manifest.pruning:
        nodes += _pruned(manifest.pruning)
    if manifest.graph:
        nodes += _graph(manifest.graph)
    return Section("The network before and after", tuple(nodes))


def artifacts(manifest: Manifest, bundle: str) -> Section:
    """Every exported file, what was proved about it and how to make it again."""
    if not manifest.artifacts:
        command = Command(shlex.join(("repdeploy", "export", bundle)))
        return Section("Artifacts", (Paragraph("Nothing was exported yet. This writes and proves an ONNX file:"), command))
    rows = []
    for item in manifest.artifacts:
        strict = _strictest(item.checks)
        rows.append((
            code(item.file), item.kind, item.precision, _input(item), str(item.opset or ""), quantities.size(item.bytes),
            code(item.sha256[:12]), *_error_cells(strict),
        ))  # fmt: skip
    columns = ("file", "kind", "precision", "input", ">opset", ">size", "SHA-256", ">error", ">budget", "of budget")
    return Section("Artifacts", (table("Artifacts", columns, rows), *(_artifact(item) for item in manifest.artifacts)))


def checks_table(checks: Sequence[Check], title: str) -> Table:
    """`share of budget` is a bar, so that a check that is about to fail stands out."""
    rows = (
        (
            Cell("passed", "good") if check.passed else Cell("FAILED", "bad"),
            check.gate,
            check.subject or "(root)",
            *_error_cells(check),
            check.failure,
            check.detail,
        )
        for check in checks
    )
    return table(title, ("result", "gate", "what", ">error", ">budget", "of budget", "failure", "detail"), rows)


def _judgement(manifest: Manifest) -> Notice:
    found = manifest.verdict
    if found.passed:
        return Notice(f"{_agreement(manifest)}.", (GRADES[found.grade],), tone="good")
    first = next(iter(found.failures), None)
    reasons = (f"Gate “{first.gate}”, {first.subject}: {first.failure or 'the error exceeds its budget'}.",) if first else ()
    return Notice("Not verified.", reasons, "do not deploy this network; convert it again and look at the gates", tone="bad")


def _agreement(manifest: Manifest) -> str:
    """What the gates showed, in one sentence."""
    if manifest.verdict.grade == "blocks only":
        return "Every fused block computes what its branches computed"
    if manifest.graph:
        return "The squeezed graph computes what the original graph computes"
    zeroed = ", with the channels that training gave up at zero" if manifest.pruning and manifest.pruning.removed else ""
    return f"The deploy network computes what the trained network computes{zeroed}"


def _measures(checks: Sequence[Check]) -> tuple[tuple[str, str], ...]:
    measures = grouped((check.gate, check.measure) for check in checks)
    return tuple(("error of " + distinct(gates), measure) for measure, gates in measures.items())


def _error_cells(check: Check | None) -> tuple[Cell | str, ...]:
    if check is None:
        return "", "", ""
    share = check.error / check.budget if check.budget else None
    used = Cell("exact") if share is None and check.passed else Cell(quantities.UNKNOWN)
    if share is not None:
        used = Cell(quantities.percent(share), "" if check.passed else "bad", share=min(share, 1.0))
    return quantities.error(check.error), quantities.error(check.budget), used


def _facts(facts: Sequence[Fact]) -> Table:
    rows = []
    for fact in sorted(facts, key=lambda fact: (fact.name, fact.value)):
        tone: Tone = "warn" if fact.origin == "default" else ""
        where = some([scope or "(root)" for scope in fact.scopes])
        rows.append((fact.name, fact.value, where, Cell(ORIGINS.get(fact.origin, fact.origin), tone)))
    return table("Facts that tensors do not tell", ("fact", "value", "blocks", "origin"), rows)


def _kinds(blocks: Sequence[BlockReport]) -> Table:
    """Blocks of one formula and kernel size in one row."""
    kinds: dict[tuple[str, str], list[BlockReport]] = {}
    for block in blocks:
        kinds.setdefault((block.formula, quantities.sizes(block.kernel[2:])), []).append(block)
    rows = []
    for (formula, kernel), members in kinds.items():
        before, after = (
            sum(getattr(block, f"parameters_{when}") for block in members) for when in ("before", "after")
        )  # fmt: skip
        rows.append((
            str(len(members)), code(formula), f"one {kernel} convolution", f"{before:,}", f"{after:,}",
            quantities.change(before, after),
        ))  # fmt: skip
    columns = (">blocks", "branches before", "after", ">parameters before", ">after", ">change")
    return table("Blocks by what they were made of", columns, rows)


def _blocks(blocks: Sequence[BlockReport]) -> Table:
    rows = (
        (
            code(block.name or "(root)"), code(block.formula), quantities.sizes(block.kernel[2:]),
            f"{block.kernel[1] * block.groups} → {block.kernel[0]}", str(block.groups), f"{block.parameters_before:,}",
            f"{block.parameters_after:,}", "" if block.residual is None else quantities.error(block.residual),
        )
        for block in blocks
    )  # fmt: skip
    columns = (
        "block", "branches before", "kernel", ">channels", ">groups", ">parameters before", ">after", ">error (float64)"
    )  # fmt: skip
    return table("Every block", columns, rows)


def _pruned(pruning: Pruning) -> Iterator[Node]:
    if not pruning.layers:
        yield Paragraph("No channel leaves the network.")
    else:
        yield Paragraph(
            f"{quantities.plural(pruning.removed, 'channel')} left the fused network: "
            f"{quantities.flops(pruning.flops_before)} → {quantities.flops(pruning.flops_after)} "
            f"({quantities.change(pruning.flops_before, pruning.flops_after)}), parameters {pruning.parameters_before:,} → "
            f"{pruning.parameters_after:,} ({quantities.change(pruning.parameters_before, pruning.parameters_after)})."
        )
        rows = (
            (code(layer.name), str(layer.before), str(layer.after), quantities.change(layer.before, layer.after))
            for layer in pruning.layers
        )
        pruned = table("Pruned layers", ("pruned", ">width", ">now", ">change"), rows)
        yield pruned if len(pruning.layers) <= FEW else Fold(f"All {len(pruning.layers)} pruned layers", (pruned,))
    if pruning.cost is not None:
        yield Paragraph(f"What pruning costs: the training-time outputs change by {quantities.error(pruning.cost)} (relative).")
    yield from (Paragraph(f"Note: {note}", "quiet") for note in pruning.notes)


def _graph(graph: GraphReport) -> Iterator[Node]:
    before, after = dict(graph.operators_before), dict(graph.operators_after)
    images = ", ".join(f"{name} {quantities.sizes(shape)}" for name, shape in graph.sampled)
    yield Paragraph(
        f"Squeezed regions, estimated at {images}: {quantities.flops(graph.flops_before)} → "
        f"{quantities.flops(graph.flops_after)}, {quantities.size(graph.bytes_before)} → {quantities.size(graph.bytes_after)} "
        "moved."
    )
    names = sorted(before | after, key=lambda name: (after.get(name, 0) - before.get(name, 0), name))
    rows = ((code(name), str(before.get(name, 0)), str(after.get(name, 0))) for name in names)
    yield table("Operators", ("operator", ">before", ">after"), rows)
    if graph.kept:
        kept = (
            (
                code(node.name or "(no name)"), node.operator, node.reason,
                "" if node.flops_before is None else quantities.flops(node.flops_before),
                "" if node.flops_after is None else quantities.flops(node.flops_after),
            )
            for node in graph.kept
        )  # fmt: skip
        columns = ("operator", "kind", "why it stays", ">before", ">squeezed")
        stays = quantities.plural(len(graph.kept), "linear operator")
        yield Fold(f"Not squeezed: {stays}", (table("Not squeezed", columns, kept),))


def _artifact(item: Artifact) -> Fold:
    nodes: list[Node] = [Paragraph("Made by:"), Command(item.command)]
    if item.checks:
        nodes.append(checks_table(item.checks, f"Checks of {item.file}"))
    nodes.append(
        pairs(
            ("SHA-256", code(item.sha256)),
            ("made from", code(item.made_from)),
            ("for", item.target),
            *((name, value) for name, value in item.options.items()),
            *((f"belongs to it: {name}", code(sha256)) for name, sha256 in item.others),
        )
    )
    nodes += _wide(item.wide)
    if item.drift:
        drift = sorted(item.drift, key=lambda layer: -layer.error)
        rows = ((code(layer.name), quantities.error(layer.error)) for layer in drift)
        nodes.append(
            Fold(
                f"How far {quantities.plural(len(drift), 'layer')} strayed from float64",
                (table("Drift", ("layer", ">drift"), rows),),
            )
        )
    nodes += [Paragraph(f"Note: {note}", "quiet") for note in item.notes]
    return Fold(f"{item.file}: how it was made and checked", tuple(nodes))


def _wide(layers: Sequence[WideLayer]) -> Iterator[Node]:
    if layers:
        rows = ((code(layer.name), layer.operator, layer.reason) for layer in layers)
        yield table("Layers that stay in float32", ("stays in float32", "kind", "why"), rows)


def _strictest(checks: Sequence[Check]) -> Check | None:
    """Of the checks with the smallest budget the worst one; a failed one before all others."""
    least = min((check.budget for check in checks if check.budget), default=None)
    judged = [check for check in checks if check.budget == least or not check.passed]
    return max(judged, key=lambda check: (not check.passed, check.error), default=None)


def _input(item: Artifact) -> str:
    """The input's shape, open axes by their names."""
    open_axes = {0: "batch", 2: "height", 3: "width"}
    return quantities.sizes(
        open_axes[axis] if open_axes.get(axis) in item.dynamic else size for axis, size in enumerate(item.input_shape)
    )
