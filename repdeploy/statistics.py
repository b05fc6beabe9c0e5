"""What may be said about timings: when a runtime is warm, and when one network is faster than another."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from repdeploy.records import Interval

WINDOWS = 3
WINDOW_AGREEMENT = 0.10
"""Warm: the medians of three windows in a row lie within 10 % of each other."""
MIN_WARMUP_SECONDS = 0.2
MAX_WARMUP_SECONDS = 3.0
RESAMPLES = 4000
CONFIDENCE = 0.95


def warm_up(timers: Sequence[Callable[[], float]]) -> tuple[int, bool]:
    """Run all timers in turn until each is steady. Returns the runs each had, and whether all became steady."""
    started, runs = time.perf_counter(), 0
    history: list[list[float]] = [[] for _ in timers]
    while True:
        for timer, seen in zip(timers, history, strict=True):
            seen.append(timer())
        runs += 1
        elapsed = time.perf_counter() - started
        steady = all(_steady(seen) for seen in history)
        if (steady and elapsed >= MIN_WARMUP_SECONDS) or elapsed >= MAX_WARMUP_SECONDS:
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
    """The ratio of medians, before over after, with its percentile bootstrap interval (Efron and Tibshirani 1993)."""
    generator = np.random.default_rng(seed)
    a, b = np.asarray(before), np.asarray(after)

    def medians(values: np.ndarray) -> np.ndarray:
        picked = generator.integers(0, len(values), (RESAMPLES, len(values)))
        result: np.ndarray = np.median(values[picked], axis=1)
        return result

    ratios = medians(a) / medians(b)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios, (tail, 1 - tail))
    return Interval(float(np.median(a) / np.median(b)), float(low), float(high))
