"""`--model`: the user's own network, built by the user's own code, as the front end of the graph road and as its anchor.

This runs the user's code, and nothing of the checkpoint: its tensors are loaded into the network, by name and strictly.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from repdeploy import gates
from repdeploy.algebra import Conv, Identity, Linear, Scale, Series, Shift
from repdeploy.checkpoint import Checkpoint
from repdeploy.checkpoint.wrappers import GEOMETRY
from repdeploy.delivery import Request, recorded
from repdeploy.digest import Digest
from repdeploy.errors import InputError, NotRecognised, RepDeployError, UsageError, words
from repdeploy.exporters.onnx_file import write_plain
from repdeploy.family import Family
from repdeploy.graph.model_proof import exact_outputs
from repdeploy.graph.onnx_source import OnnxSource, read_onnx
from repdeploy.graph.squeezer import Squeezed
from repdeploy.graph_fusion import Origin, convert_graph
from repdeploy.inspection import recognised, source_record
from repdeploy.network import sample_images, squeeze
from repdeploy.progress import Progress
from repdeploy.rebuild import reader
from repdeploy.recognise import keys_of
from repdeploy.records import Check, Conversion
from repdeploy.runtimes.onnx_runtime import OnnxSession

TIMM = "timm"
USUAL_SHAPE = (1, 3, 224, 224)
"""Where --input-shape does not say what the network takes."""
STRAYS = 6
"""Keys named in a message."""
ARGUMENTS = "for example --model-args '{\"num_classes\": 10}'"


@dataclass(frozen=True, slots=True)
class Factory:
    """What --model names: `package.module:factory`, `path/to/file.py:factory` or `timm:NAME`, and its keyword arguments."""

    spec: str
    arguments: Mapping[str, object] = field(default_factory=dict)

    def build(self) -> nn.Module:
        """Run the user's code. Raises UsageError where it is not found, InputError where it fails or builds no network."""
        with contextlib.redirect_stdout(sys.stderr):  # what the user's code prints must not land in our document
            made = self._call()
        if not isinstance(made, nn.Module):
            raise InputError(f"--model {self.spec} gave {type(made).__name__}, expected a torch.nn.Module", hint=self._example)
        made.eval()
        return made

    @property
    def _example(self) -> str:
        return "name a class or a function that returns the network, for example nets/repvgg.py:create_RepVGG_A0"

    def _call(self) -> object:
        where, _, name = self.spec.rpartition(":")
        if not where or not name:
            raise UsageError(f"--model {self.spec}: expected MODULE:FACTORY", hint=self._example)
        try:
            if where == TIMM:
                timm = importlib.import_module(TIMM)
                return timm.create_model(name, pretrained=False, **self.arguments)
            module = self._module(where)
            factory: Any = module
            for part in name.split("."):
                if not hasattr(factory, part):
                    defined = ", ".join(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
                    raise UsageError(
                        f"--model {self.spec}: {where} has no {name}", hint=f"it has {defined or 'nothing to call'}"
                    )
                factory = getattr(factory, part)
            return factory if isinstance(factory, nn.Module) else factory(**self.arguments)
        except RepDeployError:
            raise
        except ModuleNotFoundError as reason:
            absent = where == TIMM and reason.name == TIMM
            hint = "pip install timm" if absent else "run in the folder that has it, or install it"
            raise UsageError(f"--model {self.spec}: there is no module {reason.name}", hint=hint) from reason
        except (Exception, SystemExit) as reason:  # whatever the user's code raises, a script's exit included
            raise InputError(
                f"--model {self.spec} failed: {type(reason).__name__}: {words(reason)}",
                hint="arguments go into --model-args as JSON; --debug shows the trace",
            ) from reason

    @staticmethod
    def _module(where: str) -> object:
        path = Path(where)
        if path.suffix != ".py":
            _importable(Path.cwd())
            return importlib.import_module(where)
        if not path.is_file():
            raise UsageError(f"--model: there is no file {path}", hint="check the path")
        _importable(path.resolve().parent)
        module_spec = importlib.util.spec_from_file_location(path.stem, path)
        assert module_spec is not None
        assert module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        sys.modules.setdefault(path.stem, module)  # classes look their module up there
        module_spec.loader.exec_module(module)
        return module


def arguments(given: str | Mapping[str, object] | None) -> Mapping[str, object]:
    """--model-args. Raises UsageError where it is no JSON object."""
    if given is None or isinstance(given, Mapping):
        return given or {}
    try:
        found = json.loads(given)
    except ValueError as reason:
        raise UsageError(f"--model-args is no JSON: {reason}", hint=ARGUMENTS) from reason
    if not isinstance(found, dict):
        raise UsageError("--model-args is no JSON object", hint=ARGUMENTS)
    return found


def convert(
    checkpoint: Checkpoint,
    factory: Factory,
    hashing: Digest,
    families: Sequence[Family],
    target: Path,
    request: Request,
    progress: Progress,
) -> Conversion:
    """Build the network, load the checkpoint into it, squeeze its graph. The network's own outputs anchor the verdict.

    Raises what `Factory.build`, `load_into` and `graph_fusion.convert_graph` raise, InputError where it cannot be exported.
    """
    expect = recorded(request.expect)
    progress("building the network", 0, 1)
    network = factory.build()
    load_into(network, checkpoint)
    shape = request.input_shape or USUAL_SHAPE
    notes = [f"--model ran the code of {factory.spec}; nothing in {checkpoint.path.name} was executed"]
    if request.input_shape is None:
        notes.append(f"images of {'x'.join(map(str, shape[1:]))} are assumed; state others with --input-shape")
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "source.onnx"
        progress("exporting the network", 0, 1)
        notes += write_plain(network, path, shape)
        source = read_onnx(path)
        progress("running the network", 0, 1)
        check = anchor(network, source, shape, request.seed)
        roads, apart = _both_roads(network, checkpoint, families, request)
        notes += [apart] if apart else []
        origin = Origin(source_record(checkpoint, hashing.result()), factory.spec, (check,), tuple(notes))
        return convert_graph(source, origin, target, request, expect, progress, roads)


def load_into(network: nn.Module, checkpoint: Checkpoint) -> None:
    """Load every tensor by name. Raises InputError with the keys that do not fit."""
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in checkpoint.tensors]
    unexpected = [key for key in checkpoint.tensors if key not in wanted]
    shapes = [
        f"{key} {tuple(checkpoint.tensors[key].shape)} for {tuple(tensor.shape)}"
        for key, tensor in wanted.items()
        if key in checkpoint.tensors and tuple(checkpoint.tensors[key].shape) != tuple(tensor.shape)
    ]
    troubles = [
        f"{len(keys)} {what}: {', '.join(keys[:STRAYS])}{' ...' if len(keys) > STRAYS else ''}"
        for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if keys
    ]
    if troubles:
        raise InputError(
            f"the checkpoint does not fit the network of --model: {'; '.join(troubles)}",
            hint="build the network that was trained: --model-args, another factory, or --weights",
        )
    network.load_state_dict({key: checkpoint.tensors[key].read() for key in wanted}, strict=True)


def anchor(network: nn.Module, source: OnnxSource, shape: tuple[int, ...], seed: int) -> Check:
    """The user's own network in float64 against the exported graph in float64: the export is the network."""
    x = sample_images((max(shape[0], gates.POOLED_IMAGES), *shape[1:]), seed)
    batch = source.model.graph.inputs[0].shape
    if batch is not None and isinstance(batch[0], int):
        x = x[: batch[0]]
    exact = network.double()
    with gates.exact_arithmetic():
        answers = [item for item in _tensors(exact(x.double())) if isinstance(item, Tensor)]
    wanted = list({id(item): item for item in answers}.values())  # a graph names a tensor once
    network.float()
    feeds = {source.model.graph.inputs[0].name or "": np.asarray(x)}
    found = exact_outputs(source.model, [feeds])[0]
    kind = "float64"
    if len(found) < len(source.model.graph.outputs):  # an operator that nothing runs in float64 here
        kind = "float32"
        found = {name: torch.from_numpy(array) for name, array in OnnxSession(source.path).run_all(feeds).items()}
    subject = "your network" + (f", {len(wanted)} outputs" if len(wanted) > 1 else "") + f", in {kind}"
    budget = gates.EXPECT_BUDGETS[kind]
    if len(wanted) != len(found):
        return Check("anchor", subject, float("inf"), budget, failure=f"it gives {len(wanted)} tensors, its graph {len(found)}")
    names = dict.fromkeys(value.name or "" for value in source.model.graph.outputs)
    pairs = [(found[name], reference) for name, reference in zip(names, wanted, strict=True)]
    failure = next((problem for got, reference in pairs if (problem := gates.output_failure(got, reference))), "")
    if failure:
        return Check("anchor", subject, float("inf"), budget, failure=failure)
    return Check("anchor", subject, max(gates.relative_error(got, reference) for got, reference in pairs), budget)


def _both_roads(
    network: nn.Module, checkpoint: Checkpoint, families: Sequence[Family], request: Request
) -> tuple[Callable[[Squeezed], Iterable[Check]], str]:
    """Where families know blocks of the checkpoint: their kernels on the checkpoint road against the graph's regions.

    Returns the comparison, and why there is none where a family does not understand the blocks.
    """
    told = replace(checkpoint, attributes=attributes_of(network))
    try:
        recognition, facts = recognised(told, families, request.family, request.arch, request.settings)
    except NotRecognised:
        return lambda _: (), ""
    except InputError as reason:
        return lambda _: (), f"the blocks were not compared with the checkpoint road: {reason}"
    read, keys = reader(checkpoint.tensors), keys_of(checkpoint.tensors)
    slots = recognition.slots if recognition.plan is None else tuple(recognition.plan.slots.values())

    def compare(done: Squeezed) -> Iterable[Check]:
        owner = {key: item for item in done.regions for key in item.report.source_keys}
        worst, found, failure = 0.0, 0, ""
        for slot in slots:
            consumed = {key for part in slot.parts for key in part.consumed}
            regions = {owner[key].placed.name: owner[key] for key in consumed if key in owner}
            item = next(iter(regions.values()), None)
            if item is None or len(regions) > 1 or not consumed.issuperset(item.report.source_keys):
                continue  # part of a larger region, which is proved as a whole, or one layer, which no region took in
            block = slot.describe_whole(read, facts, keys)
            expression = item.region.reading.expression
            if _at_its_ends(expression) > _at_its_ends(block) or (_ends_in_scale(block) and not _ends_in_scale(expression)):
                continue  # the region has operators of the graph as well, or lacks some: a residual sum, a scale further on
            if _convolutions(expression) > _convolutions(block):
                continue  # it begins with a layer before the block, which others read as well
            found += 1
            ours, theirs = squeeze(slot.label, block), item.region.conv
            if ours.geometry != theirs.geometry:
                failure = f"block {slot.label}: {ours.geometry} on the checkpoint road, {theirs.geometry} in the graph"
                continue
            pairs = ((ours.weight, theirs.weight), (ours.bias_or_zero(), theirs.bias_or_zero()))
            worst = max(worst, *(gates.relative_error(theirs, ours) for ours, theirs in pairs))
        if found or failure:
            subject = f"{found} {' and '.join(recognition.families)} kernels, checkpoint road against graph road"
            yield Check("roads", subject, worst, gates.ALGEBRA_BUDGET, "kernels, max|a-b| / max|a|", failure=failure)

    return compare, ""


def _at_its_ends(expression: Linear) -> int:
    """How many maps without trained weights an expression begins or ends with, or has beside its branches."""
    parts = tuple(expression.children()) or (expression,)
    ends = (parts[0], parts[-1]) if isinstance(expression, Series) else parts
    return sum(isinstance(part, Scale | Shift | Identity) for part in ends)


def _ends_in_scale(expression: Linear) -> bool:
    return isinstance(expression, Series) and isinstance(expression.parts[-1], Scale)


def _convolutions(expression: Linear) -> int:
    """Those inside, branches and series alike."""
    return isinstance(expression, Conv) + sum(map(_convolutions, expression.children()))


def attributes_of(network: nn.Module) -> dict[str, dict[str, object]]:
    """Per module its class and geometry, as a pickled network tells them; eps as ONNX stores it, in float32."""
    found: dict[str, dict[str, object]] = {}
    for path, module in network.named_modules():
        held: dict[str, object] = {name: getattr(module, name) for name in GEOMETRY if hasattr(module, name)}
        eps = held.get("eps")
        if isinstance(eps, float):
            held["eps"] = float(np.float32(eps))
        found[path] = {"class": f"{type(module).__module__}.{type(module).__qualname__}", **held}
    return found


def _tensors(found: object) -> list[object]:
    """The outputs of a network, in the order in which its graph has them."""
    leaves: Callable[[object], list[object]] = torch.utils._pytree.tree_leaves
    return leaves(found)


def _importable(folder: Path) -> None:
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
