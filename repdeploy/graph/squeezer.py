"""Squeeze a model: read, choose, prove, rewrite, and again until nothing more can be squeezed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir
from torch import Tensor

from repdeploy.algebra import FILL_TOLERANCE
from repdeploy.errors import CannotSqueeze, VerificationFailed, words
from repdeploy.graph.interpreter import CannotInterpret
from repdeploy.graph.known import Known
from repdeploy.graph.readings import Readings
from repdeploy.graph.region_proof import region_check
from repdeploy.graph.regions import Kept, Region, choose
from repdeploy.graph.rewrite import Placed, rewrite, roots_of
from repdeploy.graph.sample_inputs import plans
from repdeploy.progress import Progress, each, silent
from repdeploy.records import BlockReport, Check

GRAPH = "graph"
"""What stands in place of a family's name."""
SHOWN = 100
"""Leaves of an expression that is written out as a formula."""
ROUNDS = 8
"""Rounds of squeezing at most; the second one finds something only where chains are very long."""


@dataclass(frozen=True, slots=True)
class SqueezedRegion:
    """A region that was squeezed, and what stands in its place."""

    region: Region
    placed: Placed
    check: Check
    report: BlockReport

    @property
    def is_exact(self) -> bool:
        """Whether its border values agree in float64, as they do unless an exporter folded norms in float32."""
        return self.region.tolerance <= FILL_TOLERANCE


@dataclass(frozen=True, slots=True)
class Squeezed:
    """What `squeeze` did to a model: the regions in the order of the graph, and the linear operators that stay."""

    regions: tuple[SqueezedRegion, ...]
    kept: tuple[Kept, ...]


def squeeze(
    model: ir.Model,
    feeds: Mapping[str, tuple[int, ...]] | None = None,
    *,
    force: bool = False,
    convolve_float64: bool = True,
    seed: int = 0,
    progress: Progress = silent,
) -> Squeezed:
    """Squeeze every linear region of a model that pays, in place.

    `feeds`: input shapes for the estimates, where the file leaves sizes open; usual ones when left out. `force`,
    `convolve_float64` as `choose` takes them. Raises VerificationFailed where a region's convolution is not its nodes: then
    nothing was changed in this round.
    """
    shapes = feeds if feeds is not None else plans(model.graph, None)[0].shapes
    found: list[SqueezedRegion] = []
    kept: list[Kept] = []
    unproved: list[Kept] = []
    origins: dict[str, Mapping[str, int]] = {}
    exact: dict[str, Tensor] = {}  # a later round squeezes what an earlier one computed, not what it rounded
    for _ in range(ROUNDS):
        unproved.clear()
        known = Known(model, exact=exact)
        is_fixed = all(known.sizes(value) == shapes.get(value.name or "") for value in model.graph.inputs)
        sizes = known if is_fixed else Known(model, shapes)
        readings = Readings.read(model.graph, known)
        regions, kept = choose(model.graph, known, sizes, readings, force=force, convolve_float64=convolve_float64)
        if not regions:
            break
        checks: dict[Region, Check] = {}
        for region in each(progress, "proving regions", regions):
            try:
                check = region_check(known, region, region.output.name or "", seed)
            except (CannotInterpret, CannotSqueeze, RuntimeError) as reason:  # torch's own, of a size that does not fit
                unproved.append(Kept(_last(region), f"it could not be proved: {words(reason, 200)}"))
                continue
            checks[region] = check
            if not check.passed:
                raise VerificationFailed(
                    f"region {check.subject} ({region.reading.expression}) is not its convolution: "
                    f"{check.failure or f'error {check.error:.3g}, budget {check.budget:.3g}'}",
                    hint="please report this with the ONNX file; nothing was written",
                )
        regions = list(checks)
        if not regions:
            break
        before = {region: _as_stored(roots_of(region, known), origins) for region in regions}
        placed = rewrite(model, known, regions, reserved=exact)
        origins |= {key: before[region] for region, item in placed.items() for key in item.stored}
        exact.update((key, tensor) for item in placed.values() for key, tensor in item.stored.items())
        found += [_reported(region, placed[region], checks[region], before[region]) for region in reversed(regions)]
    found = [item for item in found if set(item.placed.stored) <= set(model.graph.initializers)]
    reasons = (*unproved, *(item for item in kept if item.node not in {other.node for other in unproved}))
    ours = {item.placed.name for item in found}
    return Squeezed(tuple(found), tuple(item for item in reasons if item.node.name not in ours))


def _as_stored(roots: Mapping[str, int], origins: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """A region's roots in the model as it was given, where an earlier round has put kernels of its own among them."""
    return {key: count for root, own in roots.items() for key, count in origins.get(root, {root: own}).items()}


def _last(region: Region) -> ir.Node:
    producer = region.output.producer()
    assert producer is not None
    return producer


def _reported(region: Region, placed: Placed, check: Check, roots: Mapping[str, int]) -> SqueezedRegion:
    conv = region.conv
    weight = tuple(conv.weight.shape)
    report = BlockReport(
        name=placed.name,
        family=GRAPH,
        formula=repr(region.reading.expression) if region.reading.leaves <= SHOWN else f"{region.reading.leaves} linear maps",
        kernel=weight,
        groups=conv.groups,
        parameters_before=sum(roots.values()),
        parameters_after=sum(tensor.numel() for tensor in placed.stored.values()),
        source_keys=tuple(roots),
        deploy_keys=tuple(placed.stored),
        residual=check.error,
    )
    return SqueezedRegion(region, placed, replace(check, subject=placed.name), report)
