"""What a device reaches at best: the rate of its fastest matrix product, and the bandwidth of its fastest copy.

Source: Williams, Waterman and Patterson 2009 (the roofline model), with both ceilings measured instead of looked up.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from repdeploy.errors import BackendFailed, BackendMissing, words
from repdeploy.graph.single_node import write_single_node
from repdeploy.measurements import Roofline
from repdeploy.runtimes import RUNTIMES
from repdeploy.runtimes.interface import ONNX, Job, Runtime
from repdeploy.runtimes.torch_eager import TorchEager, on_stream

SIDES = (512, 768, 1536, 3072, 6144)
"""Of square matrices, in order; the small ones fill two cores and fit their caches, the large ones fill a GPU. A side is left
out where the device is too slow to run it often enough."""
BLOCK = 256
"""Random numbers are repeated beyond this side: the largest matrices would take longer to draw than to multiply."""
PRODUCT_SHARE = 0.75
"""Of the time: products have more candidates than copies."""
LEAST_RUNS = 3
"""Timed, after one that is not: a maximum of fewer says nothing."""
CACHES = 4
"""Each of the two arrays of a copy is so many times as large as the last level cache, so that nothing stays in it."""
USUAL_CACHE = 64 << 20
"""Bytes, where the machine does not tell: more than most have."""
MEMORY_SHARE = 8
"""A copy takes at most this part of the memory."""

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Timer = Callable[[], float]
"""Runs once and returns seconds, device synchronised."""


@dataclass(frozen=True, slots=True)
class _Backend:
    """`name`: as a reader knows it. `open`: a timer of the product of two square matrices, or of a copy of so many bytes."""

    name: str
    open: Callable[[int], AbstractContextManager[Timer]]


@dataclass(frozen=True, slots=True)
class _Best:
    rate: float
    by: str


def measured(device: str, threads: int, precision: str, seconds: float) -> Roofline:
    """The best of many runs of every backend that is installed: a peak is a maximum, and only ever too low.

    `device`: "cpu" or "cuda"; `precision` of the products, float32 being real float32 (no TF32, no bfloat16 inside); `seconds`:
    for all of it, roughly. A copy counts the bytes it reads and those it writes. Raises BackendMissing where no backend
    multiplies matrices there in that precision.
    """
    absent = TorchEager(device).missing()
    if device not in ("cpu", "cuda") or absent is not None:
        raise BackendMissing(
            f"no peak is known for {device}: {absent.what if absent else 'it is neither cpu nor cuda'}",
            hint=absent.hint if absent else "",
        )
    with tempfile.TemporaryDirectory() as scratch:
        product = _best_product(_products(device, threads, precision, Path(scratch)), precision, seconds * PRODUCT_SHARE)
    copies = [_Backend("torch copy_", partial(_torch_copy, device, threads))]
    if device == "cpu":
        copies.append(_Backend("numpy copyto", _numpy_copy))
    copy = _best_copy(copies, _copied_bytes(device), seconds * (1 - PRODUCT_SHARE))
    return Roofline(
        device, threads, product.rate / 1e9, product.by, copy.rate, copy.by, _last_level_cache() if device == "cpu" else None
    )


def _best_product(backends: list[_Backend], precision: str, seconds: float) -> _Best:
    """One backend after the other: the waiting threads of one would slow the next down."""
    best, failures = _Best(0.0, ""), []
    for backend in backends:
        allowed, own = seconds / len(backends) / len(SIDES), 0.0
        for side in SIDES:
            operations = 2 * side**3
            if own and (LEAST_RUNS + 1) * operations / own > allowed:
                break
            try:
                with backend.open(side) as timer:
                    own = operations / _shortest(timer, allowed)
            except (BackendFailed, RuntimeError) as reason:  # what torch raises where it has no such product
                failures.append(f"{backend.name}: {words(reason, 120)}")
                break
            best = max(best, _Best(own, f"{backend.name}, {side} x {side} x {side}"), key=lambda found: found.rate)
    if not best.rate:
        raise BackendMissing(f"nothing here multiplies matrices in {precision}" + "".join(f"; {text}" for text in failures))
    return best


def _best_copy(backends: list[_Backend], size: int, seconds: float) -> _Best:
    found = []
    for backend in backends:
        with backend.open(size) as timer:
            rate = 2 * size / _shortest(timer, seconds / len(backends))
        found.append(_Best(rate, f"{backend.name}, {size >> 20} MiB"))
    return max(found, key=lambda item: item.rate)


def _shortest(timer: Timer, seconds: float) -> float:
    end = time.perf_counter() + seconds
    timer()  # the first run allocates, and lays weights out for the kernels
    runs: list[float] = []
    while len(runs) < LEAST_RUNS or time.perf_counter() < end:
        runs.append(timer())
    return min(runs)


def _products(device: str, threads: int, precision: str, scratch: Path) -> list[_Backend]:
    backends = [
        _Backend(f"{runtime.name} MatMul", partial(_runtime_product, runtime, threads, scratch))
        for runtime in RUNTIMES.working()
        if (runtime.device, runtime.precision, runtime.needs) == (device, precision, ONNX) and runtime.missing() is None
    ]
    if precision in TYPES:
        backends.append(_Backend("torch.matmul", partial(_torch_product, device, TYPES[precision], threads)))
    if (device, precision) == ("cpu", "float32") and (limited := _numpy_threads(threads)) is not None:
        backends.append(_Backend("numpy matmul", partial(_numpy_product, limited)))
    return backends


@contextmanager
def _runtime_product(runtime: Runtime, threads: int, scratch: Path, side: int) -> Iterator[Timer]:
    weight, path = _matrix(side), scratch / f"{runtime.name}-{side}.onnx"
    job = Job((side,), threads, onnx=lambda: write_single_node(path, "MatMul", weight, (side, side), (side, side)))
    with runtime.open(job) as session:
        yield session.timer(weight)


@contextmanager
def _torch_product(device: str, dtype: torch.dtype, threads: int, side: int) -> Iterator[Timer]:
    matrix = torch.from_numpy(_matrix(side)).to(device, dtype)
    result = torch.empty_like(matrix)
    with _in_torch(device, threads, lambda: torch.matmul(matrix, matrix, out=result)) as timer:
        yield timer


@contextmanager
def _numpy_product(limited: Callable[[], AbstractContextManager[object]], side: int) -> Iterator[Timer]:
    a, result = _matrix(side), np.empty((side, side), np.float32)
    with limited():
        yield lambda: _seconds(lambda: np.matmul(a, a, out=result))


def _numpy_threads(threads: int) -> Callable[[], AbstractContextManager[object]] | None:
    """What limits numpy's BLAS to so many threads; None where nothing does, and it would use another number."""
    if importlib.util.find_spec("threadpoolctl") is not None:
        return partial(importlib.import_module("threadpoolctl").threadpool_limits, threads, "blas")
    return contextlib.nullcontext if threads == os.cpu_count() else None


def _matrix(side: int) -> np.ndarray:
    block = np.random.default_rng(0).standard_normal((BLOCK, BLOCK), np.float32)
    return np.tile(block, (side // BLOCK, side // BLOCK))


@contextmanager
def _torch_copy(device: str, threads: int, size: int) -> Iterator[Timer]:
    source, target = (torch.full((size,), value, dtype=torch.uint8, device=device) for value in (1, 2))
    with _in_torch(device, threads, lambda: target.copy_(source)) as timer:
        yield timer


@contextmanager
def _in_torch(device: str, threads: int, once: Callable[[], object]) -> Iterator[Timer]:
    """With so many threads, and float32 as it is."""

    def enqueue() -> None:
        once()

    before = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield (lambda: on_stream(enqueue)) if device == "cuda" else (lambda: _seconds(once))
    finally:
        torch.set_num_threads(before[0])
        torch.backends.cuda.matmul.allow_tf32 = before[1]


@contextmanager
def _numpy_copy(size: int) -> Iterator[Timer]:
    source, target = (np.full(size, value, np.uint8) for value in (1, 2))  # written once: untouched pages are no memory
    yield lambda: _seconds(lambda: np.copyto(target, source))


def _seconds(once: Callable[[], object]) -> float:
    start = time.perf_counter()
    once()
    return time.perf_counter() - start


def _copied_bytes(device: str) -> int:
    """Of each of the two arrays."""
    if device == "cuda":
        return CACHES * int(torch.cuda.get_device_properties(0).L2_cache_size)
    wanted = CACHES * (_last_level_cache() or USUAL_CACHE)
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):  # Windows
        return wanted
    return min(wanted, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // MEMORY_SHARE // 2)


def _last_level_cache(root: Path = Path("/sys/devices/system/cpu")) -> int | None:
    """Bytes of all caches of the last level together; None where the system does not tell."""
    caches: dict[tuple[int, str], int] = {}
    for folder in root.glob("cpu[0-9]*/cache/index*"):
        with contextlib.suppress(OSError, ValueError):  # a virtual machine may leave some out
            level, shared, size = ((folder / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
            caches[int(level), shared] = int(size.removesuffix("K")) << 10
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last) or None
