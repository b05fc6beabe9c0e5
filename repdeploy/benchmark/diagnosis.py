"""Why a network is not faster: one sentence each, with its evidence and what to do, and only where the evidence is there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from repdeploy.measurements import BenchRow, Finding, Profile, RanLayer, Roofline, quantile

REORDER_SHARE = 0.10
FALLBACK_SHARE = 0.10
FALLBACKS = frozenset(("gemm", "ref"))
"""How oneDNN calls, between colons ("x64:gemm:jit"), what it falls back to where it has no kernel for a convolution."""
LARGE_KERNEL = 7
LAUNCH_SHARE = 0.80
MEMORY_SHARE = 0.50
"""Of the time, in layers below the ridge of the roofline, from which a network is called memory-bound."""
NEAR_BANDWIDTH = 0.40
"""Of the copy bandwidth, that such layers must really reach: else something else holds them up."""
MOST_BANDWIDTH = 1.20
"""Of the copy bandwidth: what moves data faster has it in a cache, so memory is not what holds it up."""
UNTOLD_SHARE = 0.30
"""Of the time, in layers whose operations are not counted, above which nothing is said about too few of them."""
FEW_FLOPS = 0.10
"""Of the run, that the operations would take at the device's peak, below which there is too little to compute."""
ALIKE_FLOPS = 0.95
GAIN = 1.05
FUSED = (("training-time", "deploy"), ("original", "squeezed"))
"""Networks of which one was made from the other by fusing."""
LAYOUT_GAIN = 1.10
LAYOUT = "layout"
REORDER_REMEDIES = {
    "torch": "measure torch-channels-last: a layout that a kernel takes needs no change",
    "onnxruntime": "measure openvino, which lays out a whole network at once",
}


def findings(row: BenchRow, roof: Roofline | None, cores: int) -> tuple[Finding, ...]:
    """What explains one row. `roof`: of its precision; `cores`: those that this process may use."""
    if not row.timings:
        return ()
    found = list(_threads(row, cores))
    last = row.timings[-1]
    if last.enqueue:
        found += _launches(row)
    profile = next((item for item in row.profiles if item.network == last.network), None)
    if profile is not None and row.is_stable and row.fits(profile):
        found += _reorders(row, profile)
        found += _fallbacks(row, profile)
        if roof is not None:
            found += _memory(row, profile, roof)
            found += _few_flops(row, profile, roof)
    if row.is_stable and all(row.fits(item) for item in row.profiles):
        found += _alike(row)
    return tuple(found)


def with_layouts(rows: Sequence[BenchRow]) -> list[BenchRow]:
    """Advice on the layout of activations: only where both were measured, and differ."""
    advised = [replace(row, findings=tuple(item for item in row.findings if item.kind != LAYOUT)) for row in rows]
    for index, row in enumerate(advised):
        other = next((item for item in advised if item.runtime == f"{row.runtime}-channels-last" and _pair(row, item)), None)
        if other is None or not (row.is_stable and other.is_stable):
            continue
        here, there = row.timings[-1], other.timings[-1]
        gain = here.median / there.median
        if max(gain, 1 / gain) < LAYOUT_GAIN or _overlap(here.seconds, there.seconds):
            continue
        layers = _largest_gain(row, other)
        if gain > 1:
            advice = Finding(
                LAYOUT, here.network,
                f"in channels_last it takes {_ms(there.median)} instead of {_ms(here.median)} ({gain:.1f}x){layers}",
                f"call model.to(memory_format=torch.channels_last) and give images in it, or deploy {other.runtime}",
            )  # fmt: skip
            advised[index] = replace(row, findings=(*row.findings, advice))
        else:
            at = advised.index(other)
            advice = Finding(
                LAYOUT, there.network,
                f"in channels_last the network takes {_ms(there.median)}, in NCHW {_ms(here.median)} ({1 / gain:.1f}x slower)",
                "stay in NCHW on this device",
            )  # fmt: skip
            advised[at] = replace(other, findings=(*other.findings, advice))
    return advised


def _threads(row: BenchRow, cores: int) -> Iterable[Finding]:
    timing = row.timings[-1]
    if timing.device == "cpu" and timing.threads > cores:
        yield Finding(
            "oversubscribed", timing.network,
            f"{timing.threads} threads share {cores} cores, so they wait for each other", f"measure with --threads {cores}",
        )  # fmt: skip


def _launches(row: BenchRow) -> Iterable[Finding]:
    timing = row.timings[-1]
    host = quantile(timing.enqueue, 0.5)
    if host > LAUNCH_SHARE * timing.median:
        yield Finding(
            "launch-bound", timing.network,
            f"the host needs {_ms(host)} to enqueue what the GPU runs in {_ms(timing.median)}, so the GPU waits for launches",
            "use CUDA graphs (torch-cuda-graphs), torch.compile or TensorRT, or a larger batch",
        )  # fmt: skip


def _reorders(row: BenchRow, profile: Profile) -> Iterable[Finding]:
    share = profile.share_reorder_time
    if share > REORDER_SHARE:
        count = sum(layer.kind == "reorder" for layer in profile.layers)
        yield Finding(
            "reorders", profile.network,
            f"{count} changes of memory layout take {share:.0%} of the time inside {row.runtime} ({profile.source})",
            REORDER_REMEDIES.get(row.runtime, "measure the other runtimes of this device beside it"),
        )  # fmt: skip


def _fallbacks(row: BenchRow, profile: Profile) -> Iterable[Finding]:
    slow = [
        layer for layer in profile.convolutions
        if layer.is_depthwise and max(layer.kernel, default=0) >= LARGE_KERNEL
        and FALLBACKS & set(layer.implementation.split(":"))
    ]  # fmt: skip
    taken = sum(layer.seconds for layer in slow)
    if slow and taken > FALLBACK_SHARE * profile.seconds:
        sizes = sorted({"x".join(map(str, layer.kernel)) for layer in slow})
        yield Finding(
            "gemm fallback", profile.network,
            f"{len(slow)} depthwise convolutions ({', '.join(sizes)}) have no kernel of their own in this layout: they ran as "
            f"{slow[0].implementation} and took {taken / profile.seconds:.0%} of the time",
            "run them in channels_last, or in a runtime with a depthwise kernel of that size",
        )  # fmt: skip


def _memory(row: BenchRow, profile: Profile, roof: Roofline) -> Iterable[Finding]:
    ridge = roof.gflops * 1e9 / roof.bandwidth
    low = [layer for layer in profile.layers if layer.bytes > (roof.cache or 0) and layer.flops < ridge * layer.bytes]
    taken = sum(layer.seconds for layer in low)
    whole = max(profile.seconds, row.timings[-1].median)  # counters may leave out what a run spends between layers
    if not low or taken < MEMORY_SHARE * whole:
        return
    reached = sum(layer.bytes for layer in low) / taken / roof.bandwidth
    if NEAR_BANDWIDTH < reached <= MOST_BANDWIDTH:
        yield Finding(
            "memory-bound", profile.network,
            f"{taken / whole:.0%} of the time goes into {len(low)} layers with fewer than {ridge:.0f} operations per "
            f"byte, which already move data at {reached:.0%} of what this device copies",
            "fewer operations will not help these layers: lower the precision, the resolution or the width",
        )  # fmt: skip


def _few_flops(row: BenchRow, profile: Profile, roof: Roofline) -> Iterable[Finding]:
    flops = sum(layer.flops for layer in profile.layers)
    median = row.timings[-1].median
    ideal = flops / (roof.gflops * 1e9)
    untold = sum(layer.seconds for layer in profile.layers if not layer.flops and layer.kind != "reorder")
    if 0 < ideal < FEW_FLOPS * median and untold < UNTOLD_SHARE * profile.seconds:
        yield Finding(
            "too few FLOPs", profile.network,
            f"its {flops / 1e9:.2g} GFLOP would take {_ms(ideal)} at this device's peak, but a run takes {_ms(median)}: the "
            "rest is overhead per layer and memory",
            "use a larger batch, fewer and wider layers, or a runtime that fuses more",
        )  # fmt: skip


def _alike(row: BenchRow) -> Iterable[Finding]:
    """Fusing saved no operations to speak of, and the time says so too."""
    networks = tuple(timing.network for timing in row.timings)
    if row.speedup is None or networks not in FUSED or len(row.profiles) != 2 or not 1 / GAIN < row.speedup.ratio < GAIN:
        return
    before, after = (sum(layer.flops for layer in profile.layers) for profile in row.profiles)
    if before and after > ALIKE_FLOPS * before:
        yield Finding(
            "alike", row.timings[-1].network,
            f"the runtime computes {before / 1e9:.3g} GFLOP before and {after / 1e9:.3g} GFLOP after fusing: the branches cost "
            "it nothing to speak of",
            "the deploy network saves memory and layers here, not time",
        )  # fmt: skip


def _pair(row: BenchRow, other: BenchRow) -> bool:
    return bool(row.timings and other.timings) and (row.device, row.batch) == (other.device, other.batch)


def _overlap(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether the middle halves of two series of runs meet: then nothing is said about them."""
    first, second = (tuple(a), tuple(b))
    return quantile(first, 0.25) <= quantile(second, 0.75) and quantile(second, 0.25) <= quantile(first, 0.75)


def _largest_gain(row: BenchRow, other: BenchRow) -> str:
    """The kind of convolution that gains most by the other layout, of those that stand in both profiles in the same order."""
    if not row.profiles or not other.profiles:
        return ""
    here, there = row.profiles[-1].convolutions, other.profiles[-1].convolutions
    if [_form(layer) for layer in here] != [_form(layer) for layer in there]:
        return ""
    best = max(zip(here, there, strict=True), key=lambda pair: pair[0].seconds - pair[1].seconds, default=None)
    if best is None or best[1].seconds <= 0 or best[0].seconds < LAYOUT_GAIN * best[1].seconds:
        return ""
    kind = "depthwise " if best[0].is_depthwise else ""
    return f"; a {kind}{'x'.join(map(str, best[0].kernel))} convolution alone {best[0].seconds / best[1].seconds:.1f}x"


def _form(layer: RanLayer) -> tuple[object, ...]:
    return layer.kernel, layer.groups, layer.inputs, layer.outputs


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
