"""Whether `bench` can be trusted: equal networks beside each other, its medians beside a plain loop, and how long it takes.

usage: python -m benchmarks.bench_trust [--image N] [--seconds S]
RepVGG-A0 in deploy form, synthetic weights, in torch, onnxruntime and OpenVINO. First twenty comparisons of one file with
itself, each in a process of its own as `bench` makes them: how often is a difference called? Then bench's way of measuring (two
networks interleaved in random order) against a loop around one of the two sessions, in one process, in turns. Last a whole
`bench`, batch 1 and 8, three runtimes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

import repdeploy
from repdeploy.benchmark.children import asked
from repdeploy.benchmark.subject import Measured, job_of, networks_of, with_graphs
from repdeploy.measurements import BenchRow, read_json
from repdeploy.runtimes import RUNTIMES
from repdeploy.statistics import interleaved, warm_up
from sample_models.backbones import settled
from sample_models.repvgg import RepVGG

RUNTIMES_MEASURED = ("torch", "onnxruntime", "openvino")
COMPARISONS = 20
TURNS = 6


def a0(folder: Path, side: int) -> Path:
    """A bundle of RepVGG-A0 with random weights."""
    torch.manual_seed(0)
    network = settled(RepVGG((2, 4, 14, 1), (48, 48, 96, 192, 1280), 1000), 3, side)
    torch.save(network.state_dict(), folder / "a0.pth")
    bundle = repdeploy.convert(folder / "a0.pth", output=folder / "a0.repdeploy", input_shape=(1, 3, side, side)).bundle
    assert bundle is not None
    return bundle


def equal_networks(file: Path, image: tuple[int, ...], seconds: float) -> None:
    threads, called = os.cpu_count() or 1, []
    item = asdict(Measured("file", "graph", str(file), graph=str(file)))
    for number in range(COMPARISONS):
        runtime = RUNTIMES_MEASURED[number % len(RUNTIMES_MEASURED)]
        request = {
            "task": "time", "runtime": runtime, "device": "cpu", "networks": [item, item], "image": image, "batches": [1],
            "threads": threads, "seconds": seconds,
        }  # fmt: skip
        (answer,) = asked(request)
        ratio = read_json(BenchRow, answer.record).speedup
        assert ratio is not None
        called.append(ratio.differs)
        said = "called a difference" if ratio.differs else "no difference"
        print(f"  {runtime}: {ratio.ratio:.3f} ({ratio.low:.3f} .. {ratio.high:.3f}), {said}", flush=True)
    print(f"equal networks: a difference was called in {sum(called)} of {len(called)} comparisons")


def beside_a_loop(bundle: Path, scratch: Path, image: tuple[int, ...], seconds: float) -> None:
    """The deploy network's median as bench finds it, over the median of a loop around the very same session."""
    threads = os.cpu_count() or 1
    for name in RUNTIMES_MEASURED:
        runtime = next(item for item in RUNTIMES.working() if (item.name, item.device) == (name, "cpu"))
        networks = with_graphs(networks_of(bundle, runtime.needs), image, scratch)
        for batch in (1, 8):
            x = np.random.default_rng(batch).standard_normal((batch, *image)).astype(np.float32)
            with contextlib.ExitStack() as stack:
                timers = [stack.enter_context(runtime.open(job_of(item, image, threads))).timer(x) for item in networks]
                warm_up(timers)
                ours: list[float] = []
                plain: list[float] = []
                for turn in range(TURNS):
                    ours += interleaved(timers, seconds / TURNS, 4, 400, seed=turn)[1]
                    ended = time.perf_counter() + seconds / TURNS / 2
                    timers[1]()
                    while time.perf_counter() < ended:
                        started = time.perf_counter()
                        timers[1]()
                        plain.append(time.perf_counter() - started)
            ratio = float(np.median(ours) / np.median(plain))
            times = f"bench {np.median(ours) * 1e3:.2f} ms, loop {np.median(plain) * 1e3:.2f} ms"
            print(f"  {name}, batch {batch}: {times}, {ratio:.3f}x", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=int, default=224)
    parser.add_argument("--seconds", type=float, default=6)
    options = parser.parse_args()
    image = (3, options.image, options.image)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = a0(folder, options.image)
        deploy = with_graphs(networks_of(bundle), image, folder)[1]
        print(f"RepVGG-A0, {options.image}x{options.image}, {os.cpu_count()} cores")
        equal_networks(Path(deploy.graph), image, options.seconds / 2)
        print("bench beside a plain loop, same session:")
        beside_a_loop(bundle, folder, image, options.seconds)
        started = time.perf_counter()
        result = repdeploy.bench(bundle, runtime=RUNTIMES_MEASURED)
        print(f"bench, batch 1 and 8, {len(RUNTIMES_MEASURED)} runtimes: {time.perf_counter() - started:.0f} s")
        for row in result.rows:
            ratio = row.speedup
            assert ratio is not None
            print(f"  {row.runtime}, batch {row.batch}: {ratio.ratio:.2f}x ({ratio.low:.2f} .. {ratio.high:.2f})")


if __name__ == "__main__":
    main()
