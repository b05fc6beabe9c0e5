"""Find the weights inside whatever a training script saved around them.

Wrappers nest in any order: {'state_dict': ...}, {'model': ...}, EMA copies under many names, whole pickled modules
(read as trees of `_modules`, `_parameters`, `_buffers`, whose other attributes are facts), prefixes of DDP and compile.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from repdeploy.checkpoint.pickle_machine import ASK, MAX_DEPTH, Instance
from repdeploy.checkpoint.stored import StoredTensor
from repdeploy.errors import InputError, UnsafeCheckpoint

PREFERRED = ("", "state_dict", "model", "module", "model_state_dict", "net", "network")
"""Where the weights usually are; an earlier name wins over a later one (the official loaders prefer state_dict)."""
NOT_WEIGHTS = re.compile(
    r"(^|_)optim(izer)?s?(_|$)|sched|scaler|(^|_)amp$|rng|criterion|^loss|^args$|^config$|^hyper|^callbacks$"
)
PREFIXES = ("module.", "_orig_mod.")
"""What DistributedDataParallel and torch.compile put in front of every key."""
MAX_KEY = 500
"""Characters of a name in the file; a longer one is no tensor's."""
MAX_MODULES = 100_000
ARCHITECTURE_NAMES = ("arch", "architecture", "model_name")
NAMING_OBJECTS = ("args", "config", "cfg", "hyper_parameters", "hparams")
GEOMETRY = ("eps", "stride", "padding", "dilation", "groups", "padding_mode")
"""Attributes of a pickled layer that its tensors do not tell."""


@dataclass(frozen=True, slots=True)
class StateDict:
    """One table of tensors found in the file; `where` is the path of keys that leads to it."""

    where: str
    tensors: Mapping[str, StoredTensor]
    attributes: Mapping[str, Mapping[str, object]]
    stripped: str

    @property
    def size(self) -> int:
        """How many tensors have a dimension: a counter beside the weights makes no table."""
        return sum(len(tensor.shape) > 0 for tensor in self.tensors.values())

    @property
    def is_ema(self) -> bool:
        return any("ema" in re.split(r"[_.\-]", part.lower()) for part in self.where.split("/"))


def choose(tree: Any, weights: str) -> tuple[StateDict, tuple[StateDict, ...]]:
    """The state dict to convert and the others in the file. `weights` is "model" or "ema".

    Raises InputError when there is none of that kind.
    """
    found = list(_state_dicts(tree))
    if not found:
        raise InputError(
            "no table of named tensors is in this file", hint="save model.state_dict() with torch.save, or a .safetensors file"
        )
    wanted = [item for item in found if item.is_ema == (weights == "ema")]
    if not wanted and weights == "ema":
        raise InputError(
            f"the file holds no EMA weights; it holds {', '.join(_label(item) for item in found)}",
            hint="leave --weights out to convert the model's own weights",
        )
    wanted = wanted or found
    largest = max(item.size for item in wanted)
    candidates = [item for item in wanted if 2 * item.size >= largest]
    chosen = min(candidates, key=lambda item: (_rank(item), -item.size))
    return chosen, tuple(item for item in found if item is not chosen and 2 * item.size >= chosen.size)


def architecture_hint(tree: Any) -> str | None:
    """The architecture's name that the training script stored beside the tensors; a hint only, shapes win."""
    if not isinstance(tree, dict):
        return None
    holders = [tree] + [_named(tree.get(name)) for name in NAMING_OBJECTS]
    holders += [_named(value) for holder in holders[1:] for key, value in holder.items() if str(key).lower() == "model"]
    for holder in holders:
        for key, value in holder.items():
            if (
                isinstance(value, str)
                and isinstance(key, str)
                and (key.lower() in ARCHITECTURE_NAMES or (key == "model" and holder is not tree))
            ):
                return value
    return None


def _label(item: StateDict) -> str:
    return f"{item.where or 'the top level'} ({len(item.tensors)} tensors)"


def _rank(item: StateDict) -> int:
    """A place among PREFERRED for the names on the way; unknown names come last."""
    parts = item.where.split("/") if item.where else [""]
    return max(PREFERRED.index(part) if part in PREFERRED else len(PREFERRED) for part in parts)


def _state_dicts(tree: Any) -> Iterator[StateDict]:
    """Every table of tensors below, outermost first; optimizers and their like are passed over."""
    pending: deque[tuple[str, Any, int]] = deque([("", tree, 0)])
    seen: set[int] = set()
    while pending:
        where, node, depth = pending.popleft()
        # objects may share one state, which is then looked at once
        shared = node.state if isinstance(node, Instance) and isinstance(node.state, dict) and not node.entries else node
        if id(shared) in seen or depth > MAX_DEPTH:
            continue
        seen.add(id(shared))
        if _is_module(node):
            tensors, attributes = _flatten_module(node)
            if tensors:
                yield _stripped(where, tensors, attributes)
            continue
        entries = _named(node)
        tensors = {key: value for key, value in entries.items() if isinstance(value, StoredTensor)}
        if tensors:
            yield _stripped(where, tensors, {})
        for key, value in entries.items():
            if isinstance(value, dict | list | tuple | Instance) and not NOT_WEIGHTS.search(key.lower()):
                pending.append((f"{where}/{key}" if where else key, value, depth + 1))


def _named(node: Any) -> dict[str, Any]:
    if isinstance(node, Instance):
        node = node.attributes
    if isinstance(node, dict):
        return {key: value for key, value in node.items() if isinstance(key, str) and len(key) <= MAX_KEY}
    if isinstance(node, list | tuple) and len(node) <= 64:
        return {str(index): value for index, value in enumerate(node) if isinstance(value, dict | Instance)}
    return {}


def _is_module(node: Any) -> bool:
    return isinstance(node, Instance) and isinstance(node.attributes.get("_modules"), dict | Instance)


def _flatten_module(root: Any) -> tuple[dict[str, StoredTensor], dict[str, dict[str, object]]]:
    """The state dict of a pickled module, and per submodule its class and the attributes that are facts."""
    tensors: dict[str, StoredTensor] = {}
    attributes: dict[str, dict[str, object]] = {}
    pending: deque[tuple[str, Any, int]] = deque([("", root, 0)])
    while pending:
        path, node, depth = pending.popleft()
        if depth > MAX_DEPTH or len(attributes) > MAX_MODULES:
            raise UnsafeCheckpoint(
                f"the modules of the file nest deeper than {MAX_DEPTH} levels or are more than {MAX_MODULES:,}", hint=ASK
            )
        held = node.attributes
        skipped = held.get("_non_persistent_buffers_set")
        skipped = skipped if isinstance(skipped, list) else []
        for kind in ("_parameters", "_buffers"):
            for name, value in _named(held.get(kind)).items():
                if isinstance(value, StoredTensor) and not (kind == "_buffers" and name in skipped):
                    tensors[f"{path}{name}"] = value
        facts: dict[str, object] = {"class": str(node.of)}
        facts.update({name: _plain(held[name]) for name in GEOMETRY if name in held})
        attributes[path.removesuffix(".")] = facts
        for name, child in _named(held.get("_modules")).items():
            if _is_module(child):
                pending.append((f"{path}{name}.", child, depth + 1))
    return tensors, attributes


def _plain(value: Any) -> object:
    scalar = int | float | str | bool | None
    if isinstance(value, tuple) and len(value) <= 8 and all(isinstance(item, scalar) for item in value):
        return value
    return value if isinstance(value, scalar) else f"<{type(value).__name__}>"


def _stripped(where: str, tensors: dict[str, StoredTensor], attributes: Mapping[str, Mapping[str, object]]) -> StateDict:
    """Take the wrappers' prefixes off the front of the keys, where every key carries them."""
    removed = ""
    tensors = {key: value for key, value in tensors.items() if key != "n_averaged"}  # torch's AveragedModel counts with it
    while len(removed) < MAX_KEY and tensors:
        prefix = next((p for p in PREFIXES if all(key.startswith(p) and key != p for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items()}
        attributes = {key.removeprefix(prefix): value for key, value in attributes.items() if key.startswith(prefix)}
        removed += prefix
    return StateDict(where, tensors, attributes, removed)
