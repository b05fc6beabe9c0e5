"""What ran when torch computed on a CPU: oneDNN's primitives by its own lines, and torch's operators outside oneDNN.

oneDNN writes one line per primitive to C's standard output. A run is also watched operator by operator: the place of a line
among the operators tells which module it belongs to, and an operator without a line ran in torch itself or in MKL (small
convolutions at batch 1 do, and matrix products in float32). The wall time is that of runs without either.

Sources: oneDNN's developer guide, "Verbose Mode"; benchdnn's problem descriptors; lines of oneDNN 3.12.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from repdeploy.errors import BackendFailed, words
from repdeploy.measurements import LayerKind, RanLayer, quantile
from repdeploy.runtimes.ran_layers import FLOAT32, convolution, matrix_product, timeless, typical
from repdeploy.runtimes.torch_operators import Operator, watched

ENVIRONMENT: Mapping[str, str] = MappingProxyType({})
"""Nothing has to be set before the process starts: torch switches oneDNN's lines on and off."""
SOURCE = "oneDNN's verbose lines"
STANDARD_OUTPUT = 1
MARKER, TEMPLATE, EXECUTED = "onednn_verbose,", ",primitive,info,template:", "exec"
FIELDS = (
    "operation", "engine", "primitive", "implementation", "prop_kind", "memory_descriptors", "attributes", "auxiliary",
    "problem_desc", "exec_time",
)  # fmt: skip
"""The documented order. oneDNN tells the real one once per process; someone else may have had that line."""
KINDS: Mapping[str, LayerKind] = MappingProxyType(
    {"convolution": "convolution", "inner_product": "matmul", "matmul": "matmul", "reorder": "reorder"}
)
ITEMSIZES = MappingProxyType({"f64": 8, "f32": 4, "s32": 4, "tf32": 4, "bf16": 2, "f16": 2, "s8": 1, "u8": 1})
AXES = "dhw"


def profiled(once: Callable[[], object], runs: int) -> tuple[RanLayer, ...]:
    """Every layer in the order it ran, with its median time over `runs`; layers carry their module's name where it has one.

    Last comes what is left of the wall time: torch's own work between operators. Code that torch does not run operator by
    operator (torch.compile) cannot be watched: then all that is outside oneDNN is in there.
    Raises BackendFailed where torch has no oneDNN, or where runs differ.
    """
    fields()  # before the first run: oneDNN writes the line with the order once
    lines, whole, walls = [], [], []
    for _ in range(runs):
        lines.append(_primitives(_captured(once)))
        whole.append(_watched(once))
        walls.append(_seconds(once))
    layers = inside = typical(lines, SOURCE)
    if all(_alike(run.inside, inside) for run in whole):
        layers = typical([run.layers for run in whole], "torch")
    left = quantile(tuple(walls), 0.5) - sum(layer.seconds for layer in layers)
    return (*layers, RanLayer("outside oneDNN", "other", "torch", max(0.0, left)))


@functools.cache
def fields() -> tuple[str, ...]:
    """The names of a line's fields, from its operation on. Raises BackendFailed where oneDNN does not tell what it runs."""
    text = _captured(lambda: torch.zeros(2, 2).to_mkldnn())
    told = next((line.partition(TEMPLATE)[2] for line in text.splitlines() if TEMPLATE in line), "")
    names = tuple(told.split(","))
    found = names[names.index("operation") :] if "operation" in names else FIELDS
    if not any(_values(line, found) for line in text.splitlines()):
        raise BackendFailed("oneDNN does not tell what it runs", hint="this torch may have been built with ONEDNN_VERBOSE off")
    return found


def layer_of(line: str, names: Sequence[str] = FIELDS) -> RanLayer | None:
    """A primitive's line as a layer; None of a line that is about something else. `names`: its fields, from the operation on.

    Raises BackendFailed where a line does not have these fields.
    """
    told = _values(line, names)
    if told is None:
        return None
    try:
        primitive, implementation = told["primitive"], told["implementation"]
        seconds = float(told["exec_time"]) / 1000
        memory = dict(item.split(":", 1) for item in told["memory_descriptors"].split() if ":" in item)
        problem = told["problem_desc"]
    except (KeyError, ValueError) as reason:
        raise BackendFailed(f"a line of oneDNN is not understood: {line[:200]}") from reason
    sizes = {name: _itemsize(text) for name, text in memory.items()}
    biased = memory.get("bia", "undef").split(":")[0] != "undef"
    kind = KINDS.get(primitive, "other")
    if primitive == "convolution":
        return _convolution(descriptor(problem), implementation, seconds, biased, sizes.get("src", FLOAT32))
    if primitive == "inner_product":
        found = descriptor(problem)
        inputs = found["ic"] * math.prod(found.get(f"i{axis}", 1) for axis in AXES)
        return matrix_product(
            primitive, implementation, seconds, first=(found["mb"], inputs), second=(inputs, found["oc"]),
            output_shape=(found["mb"], found["oc"]), biased=biased, itemsize=sizes.get("src", FLOAT32),
        )  # fmt: skip
    if primitive == "matmul":
        first, second = (tuple(map(int, part.split("x"))) for part in problem.split(":")[:2])
        return matrix_product(
            primitive, implementation, seconds, first=first, second=second, output_shape=(*first[:-1], second[-1]),
            biased=biased, itemsize=sizes.get("src", FLOAT32),
        )  # fmt: skip
    shape = tuple(map(int, problem.split("x"))) if re.fullmatch(r"\d+(x\d+)*", problem) else ()
    moved = math.prod(shape) * (sizes.get("src", 0) + sizes.get("dst", 0)) if shape else 0
    return RanLayer(primitive, kind, implementation, seconds, input_shape=shape, output_shape=shape, bytes=moved)


def descriptor(problem: str) -> dict[str, int]:
    """benchdnn's description of a problem by its entries. What it may leave out is filled in: one group, one image, and widths
    that equal the heights."""
    found = {name: int(value) for name, value in re.findall(r"([a-z]+)(\d+)", problem.partition("_n")[0])}
    widths = {f"{name[:-1]}w": value for name, value in found.items() if name.endswith("h")}
    return {"g": 1, "mb": 1, **widths, **found}


def _convolution(found: Mapping[str, int], implementation: str, seconds: float, biased: bool, itemsize: int) -> RanLayer:
    axes = [axis for axis in AXES if f"k{axis}" in found]
    places = {what: tuple(found[f"{what}{axis}"] for axis in axes) for what in "iok"}
    return convolution(
        "convolution",
        implementation,
        seconds,
        input_shape=(found["mb"], found["ic"], *places["i"]),
        weight_shape=(found["oc"], found["ic"] // found["g"], *places["k"]),
        output_shape=(found["mb"], found["oc"], *places["o"]),
        stride=tuple(found.get(f"s{axis}", 1) for axis in axes),
        biased=biased,
        itemsize=itemsize,
    )


def _values(line: str, names: Sequence[str]) -> dict[str, str] | None:
    parts = line.split(",")
    if not line.startswith(MARKER) or "primitive" not in parts or EXECUTED not in parts:
        return None
    return dict(zip(names, parts[parts.index(EXECUTED) :], strict=False))


def _itemsize(memory: str) -> int:
    """Of a memory descriptor, which begins with its type."""
    return ITEMSIZES.get(memory.split(":")[0], FLOAT32)


def _primitives(text: str) -> list[RanLayer]:
    found = (layer_of(line, fields()) for line in text.splitlines())
    return [layer for layer in found if layer is not None]


def _alike(one: Sequence[RanLayer], other: Sequence[RanLayer]) -> bool:
    return [timeless(layer) for layer in one] == [timeless(layer) for layer in other]


def _captured(run: Callable[[], object]) -> str:
    """What `run` made oneDNN write."""
    if not torch.backends.mkldnn.is_available():
        raise BackendFailed("this torch was built without oneDNN", hint="install a build of torch that has it")
    print(end="", flush=True)  # what Python has buffered belongs elsewhere
    kept = os.dup(STANDARD_OUTPUT)
    with tempfile.TemporaryFile() as file, contextlib.ExitStack() as stack:
        stack.callback(os.close, kept)
        stack.callback(os.dup2, kept, STANDARD_OUTPUT)
        os.dup2(file.fileno(), STANDARD_OUTPUT)
        try:
            stack.enter_context(torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON))
        except AssertionError as reason:  # as torch answers for a oneDNN that was built without its lines
            raise BackendFailed(f"oneDNN does not tell what it runs: {words(reason)}") from reason
        run()
        file.seek(0)
        return file.read().decode(errors="replace")


def _seconds(once: Callable[[], object]) -> float:
    start = time.perf_counter()
    once()
    return time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class _Watched:
    """One run: every layer in its order, and those of oneDNN alone as its lines tell them."""

    layers: list[RanLayer]
    inside: list[RanLayer]


def _watched(once: Callable[[], object]) -> _Watched:
    operators: list[Operator] = []
    text = _captured(lambda: operators.extend(watched(once, lambda: os.lseek(STANDARD_OUTPUT, 0, os.SEEK_CUR)))).encode()
    start, layers, inside = 0, [], []
    for operator in operators:
        primitives = _primitives(text[start : operator.mark].decode())
        start = operator.mark
        inside += primitives
        layers += [replace(layer, name=operator.module or layer.name) for layer in primitives]
        if not primitives and operator.layer is not None:
            layers.append(operator.layer)
    return _Watched(layers, inside + _primitives(text[start:].decode()))
