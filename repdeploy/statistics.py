"""What may be said about timings: when a runtime is warm, and when one network is faster than another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from repdeploy.measurements import Interval

WINDOWS = 3
WINDOW_AGREEMENT = 0.10
"""Warm: the medians of three windows in a row lie within 10 % of each other."""
MIN_WARMUP_SECONDS = 0.2
MIN_WARMUP_RUNS = 4
MAX_WARMUP_SECONDS = 3.0
RESAMPLES = 4000
CONFIDENCE = 0.95


def warm_up(timers: Sequence[Callable[[], float]], most: float | None = None) -> tuple[int, bool]:
    """Run all timers in turn until each is steady, by time and by count.

    For `most` seconds at most: MAX_WARMUP_SECONDS for two networks, more for more.

    Returns the runs each had, and whether all became steady.
    """
    started, runs = time.perf_counter(), 0
    longest = MAX_WARMUP_SECONDS * max(1.0, len(timers) / 2) if most is None else most
    history: list[list[float]] = [[] for _ in timers]
    while True:
        for timer, seen in zip(timers, history, strict=True):
            seen.append(timer())
        runs += 1
        elapsed = time.perf_counter() - started
        steady = all(_steady(seen) for seen in history)
        if (steady and elapsed >= MIN_WARMUP_SECONDS and runs >= MIN_WARMUP_RUNS) or elapsed >= longest:
            return runs, steady


def _steady(seen: Sequence[float]) -> bool:
    size = max(1, min(10, len(seen) // 4))
    if len(seen) < WINDOWS * size + 1:
        return False
    medians = [float(np.median(seen[len(seen) - (k + 1) * size : len(seen) - k * size])) for k in range(WINDOWS)]
    return max(medians) <= (1 + WINDOW_AGREEMENT) * min(medians)


def interleaved(
    timers: Sequence[Callable[[], float]], seconds: float, least: int, most: int, seed: int = 0
) -> tuple[tuple[float, ...], ...]:
    """Time several networks in rounds, each round in random order, so that drift hits all alike. Every run is kept."""
    order = np.random.default_rng(seed)
    runs: list[list[float]] = [[] for _ in timers]
    started = time.perf_counter()
    while len(runs[0]) < least or (time.perf_counter() - started < seconds and len(runs[0]) < most):
        for index in order.permutation(len(timers)):
            runs[index].append(timers[index]())
    return tuple(tuple(seen) for seen in runs)


def speedup(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Interval:
    """The ratio of medians, before over after, of interleaved runs, with its percentile bootstrap interval.

    Rounds are drawn, not runs, and in blocks: what disturbs a machine lasts longer than one run and hits both networks. The
    length of a block follows the noise itself (see `_block`). Source: Efron and Tibshirani 1993; circular blocks of Politis and
    Romano 1992.
    """
    a, b = np.asarray(before), np.asarray(after)
    assert len(a) == len(b), "interleaved runs come in rounds"
    picked = _drawn(len(a), max(_block(a), _block(b)), np.random.default_rng(seed))
    return _interval(a, b, np.median(a[picked], axis=1), np.median(b[picked], axis=1))


def apart(before: Sequence[float], after: Sequence[float], seed: int = 0) -> Interval:
    """The same for two series that were measured at different times, each drawn for itself."""
    generator = np.random.default_rng(seed)
    a, b = np.asarray(before), np.asarray(after)
    drawn = [values[_drawn(len(values), _block(values), generator)] for values in (a, b)]
    return _interval(a, b, *(np.median(values, axis=1) for values in drawn))


def _drawn(count: int, block: int, generator: np.random.Generator) -> np.ndarray:
    """Indices of resamples (RESAMPLES, count), in circular blocks."""
    starts = generator.integers(0, count, (RESAMPLES, -(-count // block)))
    indices: np.ndarray = (starts[..., None] + np.arange(block)) % count
    return indices.reshape(RESAMPLES, -1)[:, :count]


def _block(values: np.ndarray) -> int:
    """How many runs in a row tell the same: as far as ranks stay correlated beyond chance, a quarter of the runs at most.

    Ranks, because single outliers hide a correlation; beyond 2 / sqrt(n), the band of white noise (Bartlett 1946).
    """
    count = len(values)
    ranks = np.argsort(np.argsort(values)) - (count - 1) / 2
    power = float(ranks @ ranks) or 1.0
    longest = max(1, count // 4)
    for lag in range(1, longest):
        if float(ranks[:-lag] @ ranks[lag:]) / power < 2 / np.sqrt(count):
            return min(longest, max(lag, int(count ** (1 / 3))))
    return longest


def _interval(a: np.ndarray, b: np.ndarray, medians_a: np.ndarray, medians_b: np.ndarray) -> Interval:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(medians_a / medians_b, (tail, 1 - tail))
    return Interval(float(np.median(a) / np.median(b)), float(low), float(high))
