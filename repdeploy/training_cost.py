"""What one training step costs, by block kind and resolution (OREPA, arXiv:2204.00826, table 4): time, and memory.

A block that runs every branch keeps a map per branch for the backward pass, so its extra memory grows with the image. One that
generates its kernel (OREPA) keeps kernels instead, whose size the image does not change.
"""

from __future__ import annotations

import contextlib
import importlib.util
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from repdeploy import registry
from repdeploy.errors import InputError, UsageError, words
from repdeploy.measurements import ExtraMemory, MemoryMeasure, OnlineGain, TrainStep
from repdeploy.own_model import Factory
from repdeploy.runtimes.interface import Job
from repdeploy.runtimes.torch_eager import prepared
from repdeploy.statistics import MAX_WARMUP_SECONDS, interleaved, speedup, warm_up

SAMPLES = "sample_models"
USUAL_MODELS = tuple(
    f"{SAMPLES}.training_costs:{name}"
    for name in ("plain_resnet18", "acnet_resnet18", "repvgg_resnet18", "dbb_resnet18", "orepa_resnet18")
)
"""What is measured where nobody names networks: one backbone with each kind of block."""
PLAIN, OFFLINE, ONLINE = "plain", "dbb", "orepa"
PAPER_SAVED = (0.65, 0.75)
PAPER_FASTER = (1.5, 2.3)
"""Extra memory that OREPA does without and how much faster its steps are, both beside DBB (section 1; by table 4, for four
ResNets on a GPU, 69 to 75 % and 1.4 to 2.3 times)."""
MOMENTUM = 0.9
LEARNING_RATE = 0.0
"""SGD does the same work at any rate; at zero the weights stay, so that many steps on one batch neither diverge nor run dry."""
LEAST_STEPS = 6
"""The fewest whose range covers the median with 95 %: 1 - 2 * 0.5^6 is 0.969."""
MOST_STEPS = 200


def usual_models() -> tuple[str, ...]:
    """Raises UsageError where the sample models cannot be imported."""
    if importlib.util.find_spec(SAMPLES) is None and not Path(SAMPLES).is_dir():
        raise UsageError(
            f"the usual networks of --train-step are in {SAMPLES}, which is part of the source repository and not here",
            hint="name your own: --model package.module:factory, several times to compare, or run in a clone of the repository",
        )
    return USUAL_MODELS


def measured(
    models: Sequence[str],
    sides: Sequence[int],
    batch: int,
    *,
    device: str,
    threads: int,
    seconds: float,
    channels: int = 3,
    model_arguments: Mapping[str, object] = MappingProxyType({}),
) -> Iterator[TrainStep]:
    """Train each network for some steps at each resolution, in float32: one row each, resolution by resolution.

    `models`: as --model names them, all with the same keyword arguments; `sides`: of square images; `seconds`: about how long
    the timed steps of one resolution take together, all networks interleaved; warming up takes no longer. A network that fails,
    for want of memory or because it does not take the size, is a row that says why, and the rest go on. Raises UsageError where
    a factory is not found.
    """
    factories = [Factory(spec, model_arguments) for spec in models]
    for side in sides:
        images = torch.randn(batch, channels, side, side, generator=torch.Generator().manual_seed(side))
        yield from _trained(factories, images, device, threads, seconds)


def _trained(factories: Iterable[Factory], images: Tensor, device: str, threads: int, seconds: float) -> tuple[TrainStep, ...]:
    """One resolution. All networks are in memory together, so that their steps can alternate, and gone afterwards."""
    with contextlib.ExitStack() as stack:
        trainees = [Trainee(factory, images, device, threads, stack) for factory in factories]
        warm_up([trainee.timed_step for trainee in _running(trainees)], min(seconds, MAX_WARMUP_SECONDS))
        running = _running(trainees)
        timers = [trainee.timed_step for trainee in running]
        runs = interleaved(timers, seconds, LEAST_STEPS, MOST_STEPS, seed=images.shape[2]) if timers else ()
        timed = dict(zip(running, runs, strict=True))
        return tuple(trainee.row(timed.get(trainee, ())) for trainee in trainees)


class Trainee:
    """One network with its optimizer and images on a device. Once a step has failed, its others do nothing."""

    def __init__(self, factory: Factory, images: Tensor, device: str, threads: int, stack: contextlib.ExitStack) -> None:
        self.network_name, self.block = named(factory.spec)
        self.device, self.batch, self.side = device, images.shape[0], images.shape[2]
        self.parameters, self.saved, self.failure = 0, 0, ""
        self.allocated: int | None = None
        self._step: Callable[[], None] = lambda: None
        self._attempt(lambda: self._prepare(factory, images, threads, stack))

    def _prepare(self, factory: Factory, images: Tensor, threads: int, stack: contextlib.ExitStack) -> None:
        before = torch.cuda.memory_allocated() if self.device == "cuda" else 0  # what the other networks hold
        job = Job(tuple(images.shape[1:]), threads, factory.build)
        network = stack.enter_context(prepared(job, self.device, "float32", "NCHW")).train()
        self.parameters = sum(parameter.numel() for parameter in network.parameters())
        x = images.to(self.device)
        optimizer = torch.optim.SGD(network.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)

        def forward() -> Tensor:
            return loss(network(x))

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            forward().backward()
            optimizer.step()

        self.saved = kept_for_backward(forward, (*network.parameters(), *network.buffers(), x))
        step()  # makes what the optimizer holds
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step()
            torch.cuda.synchronize()
            self.allocated = torch.cuda.max_memory_allocated() - before
        self._step = step

    def timed_step(self) -> float:
        """Seconds, the device synchronised; NaN once it has failed."""
        started = time.perf_counter()
        self._attempt(self._synchronised)
        return float("nan") if self.failure else time.perf_counter() - started

    def _synchronised(self) -> None:
        self._step()
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _attempt(self, work: Callable[[], None]) -> None:
        try:
            work()
        except UsageError:
            raise
        except Exception as reason:  # whatever the network's own code or the allocator raises
            self.failure = f"failed: {type(reason).__name__}: {words(reason, 200)}"
            self._step = lambda: None  # lets go of what it holds
        if self.failure and self.device == "cuda":
            torch.cuda.empty_cache()

    def row(self, seconds: tuple[float, ...]) -> TrainStep:
        """What was measured, or why nothing was."""
        measured = () if self.failure else seconds
        return TrainStep(
            self.network_name, self.block, self.device, self.batch, self.side, self.parameters, measured,
            0 if self.failure else self.saved, None if self.failure else self.allocated, self.failure,
        )  # fmt: skip


def _running(trainees: Iterable[Trainee]) -> list[Trainee]:
    return [trainee for trainee in trainees if not trainee.failure]


def named(spec: str) -> tuple[str, str]:
    """Network and block kind, from a factory's name: `nets:orepa_resnet18` is the network resnet18 made of OREPA's blocks.

    The block kind is "plain" or a family's name; a name that begins otherwise is all the network's, and its block kind "".
    """
    name = spec.rpartition(":")[2].rpartition(".")[2]
    block, _, network = name.partition("_")
    kinds = {PLAIN, *(family.name for family in registry.families())}
    return (network, block) if network and block in kinds else (name, "")


def loss(output: object) -> Tensor:
    """Cross entropy of logits (batch, classes); of any other output the mean squares of its tensors, summed.

    Raises InputError where there is nothing to train.
    """
    if isinstance(output, Tensor) and output.ndim == 2:
        return F.cross_entropy(output, torch.arange(len(output), device=output.device) % output.shape[1])
    leaves = torch.utils._pytree.tree_leaves(output)
    squares = [leaf.square().mean() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
    if not squares:
        raise InputError(f"the network gave {type(output).__name__} without a tensor that training could improve")
    return torch.stack(squares).sum()


def kept_for_backward(forward: Callable[[], Tensor], apart: Iterable[Tensor]) -> int:
    """Bytes of all storages that the graph of a forward pass keeps alive for its backward pass, each counted once.

    A view keeps its whole storage. `apart`: tensors whose storages are left out. For a training step these are the parameters
    and buffers, which exist whether or not anything is saved, and the images, which are the caller's; what is left is what the
    choice of blocks adds. What a network's own autograd functions keep without `save_for_backward` is not seen.
    """
    elsewhere = {tensor.untyped_storage().data_ptr() for tensor in apart}
    kept: weakref.WeakSet[_Saved] = weakref.WeakSet()  # what is dropped on the way need not be kept at the end

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor.detach())  # the tensor itself may be the output of the node that saves it: a cycle
        kept.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        result = forward()
    storages = (saved.tensor.untyped_storage() for saved in kept)
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
    del result  # until here it held the graph
    return sum(size for pointer, size in sizes.items() if pointer not in elsewhere)


class _Saved:
    """As long as one of these lives, so does what the graph saved in it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def findings(rows: Sequence[TrainStep]) -> tuple[ExtraMemory | OnlineGain, ...]:
    """What block kinds cost beyond the plain network, and OREPA beside DBB, for every backbone that was trained with them."""
    found: list[ExtraMemory | OnlineGain] = []
    told = [row for row in rows if not row.missing]
    for network, device, batch in dict.fromkeys((row.network, row.device, row.batch) for row in told):
        own = [row for row in told if (row.network, row.device, row.batch) == (network, device, batch)]
        table = {(row.block, row.side): row for row in sorted(own, key=lambda row: row.side)}
        for measure in ("saved", "allocated"):
            extra = _extra(table, measure)
            for block in dict.fromkeys(block for block, _ in extra):
                sides = tuple(side for other, side in extra if other == block)
                sizes = tuple(extra[block, side] for side in sides)
                found.append(ExtraMemory(network, block, device, batch, measure, sides, sizes))
            for side in (side for block, side in extra if block == ONLINE and (OFFLINE, side) in extra):
                before, after = (table[block, side].seconds for block in (OFFLINE, ONLINE))
                faster = speedup(before, after) if len(before) == len(after) > 0 else None
                offline, online = extra[OFFLINE, side], extra[ONLINE, side]
                found.append(
                    OnlineGain(network, device, batch, side, measure, offline, online, faster, PAPER_SAVED, PAPER_FASTER)
                )
    return tuple(found)


def _extra(table: Mapping[tuple[str, int], TrainStep], measure: MemoryMeasure) -> dict[tuple[str, int], int]:
    """Bytes beyond the plain network, by block kind and side, where both were measured."""
    sizes = {key: getattr(row, measure) for key, row in table.items()}
    return {
        (block, side): size - sizes[PLAIN, side]
        for (block, side), size in sizes.items()
        if block != PLAIN and size is not None and sizes.get((PLAIN, side)) is not None
    }
