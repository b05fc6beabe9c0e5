"""What ran when torch computed on a GPU: the kernels below each convolution and matrix product, by torch's profiler.

torch's profiler records every operator with its arguments, and at the operator that launched it every kernel with its time on
the device. Source: torch.profiler (FunctionEvent, Kernel); torch's native_functions.yaml for the places of arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from repdeploy.errors import BackendFailed
from repdeploy.measurements import RanLayer
from repdeploy.runtimes.ran_layers import FLOAT32, Shape, convolution, matrix_product, typical
from repdeploy.runtimes.torch_operators import told_modules

WARM_UP_RUNS = 2
"""In the first, cuDNN may try kernels, and the profiler attaches itself to the device."""
CONVOLUTIONS: Mapping[str, Mapping[str, int]] = MappingProxyType(
    {
        "aten::convolution": {"bias": 2, "stride": 3, "padding": 4, "dilation": 5, "transposed": 6, "groups": 8},
        "aten::cudnn_convolution": {"padding": 2, "stride": 3, "dilation": 4, "groups": 5},
    }
)
"""Operators that are a whole convolution, and the places of their arguments behind image and weights."""
PRODUCTS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"aten::mm": (0, 1), "aten::bmm": (0, 1), "aten::addmm": (1, 2), "aten::baddbmm": (1, 2)}
)
"""Matrix products, and the places of their factors."""
BIASED = frozenset({"aten::addmm", "aten::baddbmm"})
ITEMSIZES = MappingProxyType({"float": 4, "c10::Half": 2, "c10::BFloat16": 2, "double": 8})
MODULE = "module: "
"""What the names of modules begin with among those of operators."""
REORDERS = ("nchwtonhwc", "nhwctonchw", "nhwcaddpadding", "nhwctofoldednhwc", "foldednhwctonhwc")
"""In lower case, parts of the names of cuDNN's kernels that only change the layout in memory, as public traces show them."""


class Kernel(Protocol):
    """One kernel as torch's profiler attaches it to the operator that launched it. `duration`: microseconds."""

    @property
    def name(self) -> str: ...
    @property
    def duration(self) -> float: ...


class Event(Protocol):
    """One operator of torch's profiler: the shapes of arguments that are tensors, the values of the others, None for these."""

    @property
    def name(self) -> str: ...
    @property
    def input_shapes(self) -> Sequence[Sequence[int]]: ...
    @property
    def concrete_inputs(self) -> Sequence[Any]: ...
    @property
    def kernels(self) -> Sequence[Kernel]: ...
    @property
    def cpu_parent(self) -> Event | None: ...


def profiled(once: Callable[[], object], runs: int) -> tuple[RanLayer, ...]:
    """Every layer in the order it was launched, with the median time of its kernels on the device over `runs`.

    Raises BackendFailed where nothing ran on the device, or where runs differ.
    """
    from torch.profiler import ProfilerActivity

    seen = [layers(recorded(once, ProfilerActivity.CUDA)) for _ in range(WARM_UP_RUNS + runs)]
    if not seen[-1]:
        raise BackendFailed(
            "torch's profiler saw no kernel on the GPU", hint="it needs CUPTI, which CUDA builds of torch bring"
        )
    return typical(seen[-runs:], "torch's profiler")


def recorded(once: Callable[[], object], *devices: Any) -> list[Event]:
    """The operators of a run, and around them the modules of a network; kernels of those of torch's ProfilerActivity."""
    import torch
    from torch.profiler import ProfilerActivity, profile, record_function

    open_modules: list[record_function] = []

    def enter(path: str) -> None:
        open_modules.append(record_function(MODULE + path))
        open_modules[-1].__enter__()

    with profile(activities=[ProfilerActivity.CPU, *devices], record_shapes=True) as seen:
        with told_modules(enter, lambda: open_modules.pop().__exit__(None, None, None)):
            once()
        if ProfilerActivity.CUDA in devices:
            torch.cuda.synchronize()
    return list(seen.events() or ())


def layers(events: Iterable[Event]) -> list[RanLayer]:
    """The layers of one run, from its operators in the order in which they began.

    Below a convolution, kernels that only change layouts are layers of their own; of the rest, the one that takes longest gives
    its name. Where the profiler recorded no shapes, there are none.
    """
    found: list[_Group] = []
    for event in events:
        if not event.kernels or event.name.startswith(MODULE):  # a module may carry the kernels of its operators once more
            continue
        owner = _owner(event)
        if owner is None or not found or found[-1].owner is not owner:
            found.append(_Group(owner or event, []))
        found[-1].kernels.extend(event.kernels)
    return [layer for group in found for layer in _layers(group)]


@dataclass(frozen=True, slots=True)
class _Group:
    """An operator and all kernels below it."""

    owner: Event
    kernels: list[Kernel]


def _owner(event: Event) -> Event | None:
    """The convolution or matrix product that an operator is part of."""
    above = event.cpu_parent
    outer = _owner(above) if above is not None else None
    return outer or (event if event.name in CONVOLUTIONS or event.name in PRODUCTS else None)


def _layers(group: _Group) -> list[RanLayer]:
    own = [kernel for kernel in group.kernels if not _only_reorders(kernel)]
    made: list[RanLayer] = []
    for kernel in group.kernels:
        if _only_reorders(kernel):
            made.append(RanLayer(_name(group.owner), "reorder", kernel.name, kernel.duration / 1e6))
        elif kernel is own[0]:
            longest = max(own, key=lambda kernel: kernel.duration)
            made.append(_layer(group.owner, longest.name, sum(kernel.duration for kernel in own) / 1e6))
    return made


def _name(owner: Event) -> str:
    """Of the module that an operator runs in; without one, its own."""
    above = owner.cpu_parent
    while above is not None and not above.name.startswith(MODULE):
        above = above.cpu_parent
    return (above.name.removeprefix(MODULE) if above is not None else "") or owner.name


def _only_reorders(kernel: Kernel) -> bool:
    return any(part in kernel.name.lower() for part in REORDERS)


def _layer(owner: Event, implementation: str, seconds: float) -> RanLayer:
    name, operator = _name(owner), owner.name
    shapes = [tuple(shape) for shape in owner.input_shapes]
    if operator in CONVOLUTIONS and shapes and not _value(owner, "transposed"):
        image, weights = shapes[:2]
        stride, padding, dilation = (
            _per_axis(_value(owner, what), len(image) - 2) for what in ("stride", "padding", "dilation")
        )
        steps = zip(image[2:], weights[2:], stride, padding, dilation, strict=True)
        places = tuple((size + 2 * pad - gap * (taps - 1) - 1) // step + 1 for size, taps, step, pad, gap in steps)
        return convolution(
            name, implementation, seconds, input_shape=image, weight_shape=weights,
            output_shape=(image[0], weights[0], *places), stride=stride,
            biased="bias" in CONVOLUTIONS[operator] and bool(shapes[CONVOLUTIONS[operator]["bias"]]), itemsize=_itemsize(owner),
        )  # fmt: skip
    if operator in PRODUCTS and shapes:
        first, second = (shapes[place] for place in PRODUCTS[operator])
        return matrix_product(
            name, implementation, seconds, first=first, second=second, output_shape=(*first[:-1], second[-1]),
            biased=operator in BIASED, itemsize=_itemsize(owner),
        )  # fmt: skip
    return RanLayer(name, "other", implementation, seconds)


def _itemsize(owner: Event) -> int:
    """Of the first argument; float32 in versions of torch whose profiler tells no types."""
    return ITEMSIZES.get(next(iter(getattr(owner, "input_dtypes", None) or ()), ""), FLOAT32)


def _value(owner: Event, what: str) -> Any:
    """An argument of a convolution; None where this operator has none of that name."""
    place = CONVOLUTIONS[owner.name].get(what)
    return None if place is None else owner.concrete_inputs[place]


def _per_axis(values: Sequence[int], axes: int) -> Shape:
    """torch takes one number for all axes."""
    return tuple(values) if len(values) == axes else tuple(values) * axes
