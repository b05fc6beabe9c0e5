"""torch's operators as they run, one after the other: shapes, seconds, and the module that each runs in."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from repdeploy.measurements import RanLayer
from repdeploy.runtimes.ran_layers import convolution, matrix_product

CONVOLUTIONS = frozenset({"conv1d", "conv2d", "conv3d", "convolution", "_convolution"})
PRODUCTS = MappingProxyType(
    {
        "linear": ("input", "weight"), "matmul": ("self", "other"), "mm": ("self", "mat2"), "bmm": ("self", "mat2"),
        "addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"),
    }
)  # fmt: skip
"""Matrix products, and what torch calls their factors."""
BIASED = frozenset({"addmm", "baddbmm"})


@dataclass(frozen=True, slots=True)
class Operator:
    """One operator. `module`: its path, empty outside modules; `mark`: what the caller's function said right behind it;
    `layer`: what it computed if torch did so itself, None of a view, which computes nothing."""

    module: str
    mark: int
    layer: RanLayer | None


def watched(once: Callable[[], object], mark: Callable[[], int]) -> list[Operator]:
    """Every operator of a run, in its order, on the host's clock."""
    watching = _Watching(mark)
    with told_modules(watching.modules.append, watching.modules.pop), watching:
        once()
    return watching.operators


class _Watching(TorchDispatchMode):
    def __init__(self, mark: Callable[[], int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.mark = mark
        self.modules = [""]
        self.operators: list[Operator] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - start
        mark, module = self.mark(), self.modules[-1]
        self.operators.append(Operator(module, mark, _layer(func._schema, args, kwargs or {}, result, seconds, module)))
        return result


@contextlib.contextmanager
def told_modules(enter: Callable[[str], object], leave: Callable[[], object]) -> Iterator[None]:
    """Call `enter` with the path of every module of a network when it begins, and `leave` when it ends."""
    names: dict[int, str] = {}
    depth = 0

    def begins(module: nn.Module, _: object) -> None:
        nonlocal depth
        if not depth:
            names.update({id(inner): path for path, inner in module.named_modules()})
        depth += 1
        enter(names.get(id(module), ""))

    def ends(*_: object) -> None:
        nonlocal depth
        depth -= 1
        leave()

    hooks = [
        nn.modules.module.register_module_forward_pre_hook(begins),
        nn.modules.module.register_module_forward_hook(ends, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _layer(
    schema: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any, seconds: float, module: str
) -> RanLayer | None:
    if any(value.alias_info is not None and not value.alias_info.is_write for value in schema.returns):
        return None
    operator = schema.name.partition("::")[2]
    name = module or operator
    given = {item.name: item.default_value for item in schema.arguments}
    given |= {item.name: value for item, value in zip(schema.arguments, args, strict=False)} | dict(kwargs)
    output = next(_tensors((result,)), None)
    if output is None:
        return RanLayer(name, "other", schema.name, seconds)
    shape, itemsize = tuple(output.shape), output.element_size()
    if operator in CONVOLUTIONS and not given.get("transposed"):
        image, weight = given["input"], given["weight"]
        stride = tuple(given["stride"])
        return convolution(
            name, f"aten::{_backend(given)}", seconds, input_shape=tuple(image.shape), weight_shape=tuple(weight.shape),
            output_shape=shape, stride=stride * (image.ndim - 2 if len(stride) == 1 else 1), biased=given["bias"] is not None,
            itemsize=itemsize,
        )  # fmt: skip
    if operator in PRODUCTS:
        first, second = (given[factor] for factor in PRODUCTS[operator])
        return matrix_product(
            name, schema.name, seconds, first=tuple(first.shape),
            second=tuple(second.mT.shape if operator == "linear" else second.shape), output_shape=shape,
            biased=operator in BIASED or given.get("bias") is not None, itemsize=itemsize,
        )  # fmt: skip
    moved = sum(tensor.nbytes for tensor in (*_tensors(given.values()), *_tensors((result,))))
    return RanLayer(name, "other", schema.name, seconds, output_shape=shape, bytes=moved)


def _backend(given: Mapping[str, Any]) -> str:
    """Which of its convolutions torch chose; "Slow2d" is one matrix product over columns of the image."""
    if isinstance(given["padding"], str):
        return "convolution"
    values = (given[name] for name in ("input", "weight", "bias", "stride", "padding", "dilation"))
    rest = (given.get("transposed", False), given.get("output_padding", (0,)), given["groups"])
    return str(torch._C._select_conv_backend(*values, *rest).name)


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
