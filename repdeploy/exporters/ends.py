"""What stands at the ends of an exported graph: the input's name, its normalisation, a softmax over the classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from repdeploy.errors import InputError, UsageError
from repdeploy.exporters.interface import Case
from repdeploy.exporters.options import Normalization, Options
from repdeploy.graph.sample_inputs import IMAGE_RANK

MEAN, DEVIATION = "normalize.mean", "normalize.deviation"
SOFTMAX = "softmax"


def finished(model: ir.Model, options: Options, image: str) -> None:
    """Put the ends that were asked for onto a graph, in place; `image`: the input that they are about.

    Raises InputError where the graph has no such end, UsageError for a name that is taken.
    """
    value = next(item for item in model.graph.inputs if item.name == image)
    if options.normalize is not None:
        _normalize(model, value, options.normalize)
    if options.softmax:
        _softmax(model)
    if options.input_name is not None:
        _rename(model, value, options.input_name)


def cases_with_ends(cases: Sequence[Case], image: str, output: str, options: Options) -> tuple[Case, ...]:
    """The same references as a graph with these ends sees them: raw images in, probabilities out.

    Raw images are rounded to float32, so a check sees that rounding as an error of the artifact.
    """
    found = []
    for case in cases:
        feeds, wanted = dict(case.feeds), dict(case.wanted)
        if options.normalize is not None:
            mean, std = (_per_channel(item) for item in (options.normalize.mean, options.normalize.std))
            feeds[image] = (feeds[image].astype(np.float64) * std + mean).astype(np.float32)
        if options.softmax:
            shifted = np.exp(wanted[output] - wanted[output].max(axis=1, keepdims=True))
            wanted[output] = shifted / shifted.sum(axis=1, keepdims=True)
        if options.input_name is not None:
            feeds[options.input_name] = feeds.pop(image)
        found.append(Case(case.label, feeds, wanted))
    return tuple(found)


def normalization_note(model: ir.Model, options: Options) -> str:
    """Where the normalisation went."""
    normalization = options.normalize
    assert normalization is not None
    if not options.fold:
        return "the normalisation stands in front as explicit nodes (--no-fold)"
    left = {node.name for node in model.graph if node.name in (MEAN, DEVIATION)}
    if not left:
        return f"the normalisation ({normalization}) is folded into the first convolution, exactly"
    reason = "the first convolution pads its image with zeros, which are not the mean's"
    if left == {MEAN} and normalization.shifts:
        return f"1/deviation is folded into the first convolution; an explicit node in front subtracts the mean: {reason}"
    return "the normalisation stands in front as explicit nodes: " + (
        reason if normalization.shifts else "no convolution takes it in"
    )


def _normalize(model: ir.Model, image: ir.Value, normalization: Normalization) -> None:
    graph = model.graph
    if image.shape is None or len(image.shape) != IMAGE_RANK or image.dtype != ir.DataType.FLOAT:
        kind = image.dtype.name.lower() if image.dtype is not None else "?"
        raise InputError(
            f"--fold-normalize: {image.name} is no image in float32 (BATCHxCHANNELSxHEIGHTxWIDTH), but {kind} {image.shape}",
            hint="leave it out",
        )
    channels = image.shape[1]
    if len(normalization.mean) > 1 and channels != len(normalization.mean):
        raise UsageError(
            f"--fold-normalize has {len(normalization.mean)} means, the image has {channels} channels",
            hint="give one mean and one deviation, or one of each per channel",
        )
    first = next(iter(graph))
    readers = [(node, index) for node, index in image.uses()]
    current = image
    steps = ((MEAN, "Sub", _per_channel(normalization.mean)), (DEVIATION, "Mul", 1 / _per_channel(normalization.std)))
    for name, operator, values in steps:
        if operator == "Sub" and not normalization.shifts:
            continue
        stored = ir.Value(name=name, const_value=ir.tensor(values.astype(np.float32), name=name))
        stored.type, stored.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(values.shape)
        graph.register_initializer(stored)
        node = ir.Node("", operator, [current, stored], name=name, num_outputs=1)
        node.outputs[0].name, node.outputs[0].shape = f"{name}.out", image.shape
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        graph.insert_before(first, node)
        current = node.outputs[0]
    for reader, index in readers:
        reader.replace_input_with(index, current)


def _softmax(model: ir.Model) -> None:
    graph = model.graph
    value = graph.outputs[0]
    if len(graph.outputs) > 1 or value.shape is None or len(value.shape) != 2 or value.dtype != ir.DataType.FLOAT:
        shown = "x".join(map(str, value.shape)) if value.shape is not None else "of unknown shape"
        raise InputError(
            f"--softmax: outputs of this graph: {len(graph.outputs)}, the first is {shown}; expected one, BATCHxCLASSES",
            hint="leave --softmax out",
        )
    name = value.name or "output"
    node = ir.Node("", "Softmax", [value], [ir.AttrInt64("axis", 1)], name=SOFTMAX, num_outputs=1)
    outer = node.outputs[0]
    value.name, outer.name, outer.shape, outer.type = f"{name}.logits", name, value.shape, ir.TensorType(ir.DataType.FLOAT)
    graph.append(node)
    graph.outputs[0] = outer


def _rename(model: ir.Model, image: ir.Value, name: str) -> None:
    graph = model.graph
    taken = {value.name for node in graph for value in node.outputs} | set(graph.initializers) | {v.name for v in graph.inputs}
    if name in taken - {image.name}:
        raise UsageError(f"--input-name {name}: another value of the graph is called so", hint="choose another name")
    if image in graph.outputs:
        raise UsageError(
            "--input-name: the image is an output of this graph too, and would be renamed there", hint="leave it out"
        )
    image.name = name


def _per_channel(values: Sequence[float]) -> np.ndarray:
    return np.array(values, np.float64).reshape(1, -1, 1, 1)
