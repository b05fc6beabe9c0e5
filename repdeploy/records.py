"""What the stages hand each other and what the command line prints: frozen values, no tensors, JSON both ways."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

MANIFEST_SCHEMA = "repdeploy.manifest/1"

Origin = Literal["set", "arch", "file", "image", "skeleton", "default"]
"""Where a fact comes from: --set, --arch, the file beside its tensors, the size of the images that the user gave, the network's
convention, or nothing at all."""
ORIGINS: Mapping[Origin, str] = {
    "set": "stated (--set)",
    "arch": "stated (--arch)",
    "file": "stored in the file",
    "image": "image size",
    "skeleton": "assumed (convention)",
    "default": "assumed (nothing tells it)",
}
"""The same in a reader's words."""
ASSUMED: tuple[Origin, ...] = ("image", "skeleton", "default")
"""Origins that nobody stated: the verdict lists such facts unless it is anchored."""


Dtype = Literal["float32", "float64"]
Gates = Literal["all", "blocks"]
Precision = Literal["fp32", "fp16", "bf16"]
Dynamic = Literal["batch", "spatial", "none"]
"""The axes of an exported graph that stay open; "spatial": the batch too."""
Grade = Literal["anchored", "self-consistent", "blocks only"]


@dataclass(frozen=True, slots=True)
class Fact:
    """Something a checkpoint's tensors do not tell, the blocks it was used for, and where it comes from."""

    name: str
    value: str
    origin: Origin
    scopes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Match:
    """A family found blocks of its own."""

    family: str
    blocks: int
    deployed: int = 0


@dataclass(frozen=True, slots=True)
class NoMatch:
    """A family, or a skeleton, does not describe these tensors, and why."""

    family: str
    reason: str


@dataclass(frozen=True, slots=True)
class BlockReport:
    """One block: what it was made of, what it became, and the proof. `residual`: gate 1, None where nothing was fused."""

    name: str
    family: str
    formula: str
    kernel: tuple[int, ...]
    groups: int
    parameters_before: int
    parameters_after: int
    source_keys: tuple[str, ...]
    deploy_keys: tuple[str, ...]
    residual: float | None


@dataclass(frozen=True, slots=True)
class Check:
    """One comparison of a gate. `error` and `budget` in the unit that `measure` names."""

    gate: str
    subject: str
    error: float
    budget: float
    measure: str = "max|a-b| / max|reference|"
    detail: str = ""
    failure: str = ""

    DERIVED: ClassVar = ("passed",)

    @property
    def passed(self) -> bool:
        return not self.failure and self.error <= self.budget


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of the gates. `grade`: "anchored" to outputs the user recorded, "self-consistent", or "blocks only"."""

    passed: bool
    grade: Grade
    checks: tuple[Check, ...]
    assumed: tuple[Fact, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint a bundle was made from."""

    file: str
    sha256: str
    bytes: int
    container: str
    weights: str
    where: str
    prefix: str
    has_ema: bool
    others: tuple[tuple[str, int], ...] = ()
    architecture: str | None = None
    inert: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class WideLayer:
    """A layer that stays in float32 in a graph of lower precision, and why."""

    name: str
    operator: str
    reason: str


@dataclass(frozen=True, slots=True)
class Drift:
    """How far a layer's output is from float64 when the graph is executed by its types, max|a-b| / max|a|."""

    name: str
    error: float


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file of a bundle, how it was made and what was proved about it. `input_shape` (batch, channels, height, width);
    `others`: files that belong to it, with their SHA-256; `options`: what was asked for beyond shape and dynamic axes; `wide`,
    `drift`: of reduced precisions; `target`: the device and version that a compiled one is for."""

    file: str
    kind: str
    precision: str
    sha256: str
    bytes: int
    made_from: str
    command: str
    input_shape: tuple[int, ...] = ()
    opset: int | None = None
    dynamic: tuple[str, ...] = ()
    checks: tuple[Check, ...] = ()
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    others: tuple[tuple[str, str], ...] = ()
    wide: tuple[WideLayer, ...] = ()
    drift: tuple[Drift, ...] = ()
    notes: tuple[str, ...] = ()
    target: str = ""


@dataclass(frozen=True, slots=True)
class TensorShape:
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output of a graph; an open size goes by its name."""

    name: str
    dtype: str
    shape: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class KeptNode:
    """A linear operator of a graph that stays, and why; the estimate in FLOPs where its region would have grown."""

    name: str
    operator: str
    reason: str
    flops_before: int | None = None
    flops_after: int | None = None


@dataclass(frozen=True, slots=True)
class GraphReport:
    """The graph road's half of a manifest.

    `sampled`: the input shapes that estimates and gates used; `operators_*`: how many of each operator; `flops_*`, `bytes_*`:
    estimates for the squeezed regions; `forced`: --force-squeeze; `model`: what --model built, empty for an ONNX file.
    """

    file: str
    sha256: str
    opset: int
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    sampled: tuple[tuple[str, tuple[int, ...]], ...]
    operators_before: tuple[tuple[str, int], ...]
    operators_after: tuple[tuple[str, int], ...]
    flops_before: int
    flops_after: int
    bytes_before: int
    bytes_after: int
    kept: tuple[KeptNode, ...]
    forced: bool = False
    model: str = ""


@dataclass(frozen=True, slots=True)
class PrunedLayer:
    """A convolution that lost output channels, and how many it had and has."""

    name: str
    before: int
    after: int


@dataclass(frozen=True, slots=True)
class Pruning:
    """What left the fused network: channels that training gave up and, with `dead`, those that were constants or not read.

    FLOPs (at the input shape, batch 1) and parameters are the fused network's, before and after. `cost`: what zeroing the
    given-up channels changes, max|a-b| / max|a| of the training-time outputs; None where that was not measured.
    """

    layers: tuple[PrunedLayer, ...]
    flops_before: int
    flops_after: int
    parameters_before: int
    parameters_after: int
    dead: bool
    cost: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def removed(self) -> int:
        return sum(layer.before - layer.after for layer in self.layers)


@dataclass(frozen=True, slots=True)
class Manifest:
    """Everything a bundle says about itself; `training` is the structure from which `bench` rebuilds the twin; `norms`: batch
    norms that no convolution takes in, and why; `graph`: of a bundle made from a graph; `pruning`: channels that left."""

    source: Source
    family: str
    families: tuple[str, ...]
    architecture: str
    skeleton: str | None
    input_shape: tuple[int, ...]
    gate_shape: tuple[int, ...]
    facts: tuple[Fact, ...]
    blocks: tuple[BlockReport, ...]
    copied: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]
    parameters_before: int
    parameters_after: int
    verdict: Verdict
    training: Mapping[str, TensorShape]
    weights_sha256: str
    references_sha256: str | None
    command: str
    tools: Mapping[str, str]
    artifacts: tuple[Artifact, ...] = ()
    notes: tuple[str, ...] = ()
    norms: tuple[tuple[str, str], ...] = ()
    graph: GraphReport | None = None
    pruning: Pruning | None = None
    schema: str = MANIFEST_SCHEMA

    def artifact(self, file: str) -> Artifact | None:
        return next((item for item in self.artifacts if item.file == file), None)

    def with_artifact(self, artifact: Artifact) -> Manifest:
        others = tuple(item for item in self.artifacts if item.file != artifact.file)
        return dataclasses.replace(self, artifacts=(*others, artifact))


@dataclass(frozen=True, slots=True)
class Conversion:
    """What `convert` did. `bundle` is None for a dry run and where there was nothing to fuse."""

    bundle: Path | None
    manifest: Manifest
    already_deployed: bool = False
    schema: str = "repdeploy.convert/1"


@dataclass(frozen=True, slots=True)
class Branch:
    """One branch of a block.

    `formula`: what it has of its own. `share`: of the squared norm of the fused kernel, so that a block's shares add up to 1
    (a branch that works against the others has a negative one). `norm`: of its own kernel over the fused one's. `similarity`:
    cosine between its kernel and each branch's of the block, in their order. `dead_channels`: outputs it adds nothing to.
    """

    formula: str
    share: float
    norm: float
    similarity: tuple[float, ...]
    dead_channels: int
    is_dead: bool


@dataclass(frozen=True, slots=True)
class BlockBranches:
    """A block's branches; `dead_channels`: outputs whose fused kernel is zero, which give a constant."""

    name: str
    channels: int
    dead_channels: int
    branches: tuple[Branch, ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What a checkpoint holds, without converting it."""

    source: Source
    matches: tuple[Match | NoMatch, ...]
    skeletons: tuple[Match | NoMatch, ...]
    family: str | None
    architecture: str | None
    blocks: tuple[BlockReport, ...]
    facts: tuple[Fact, ...]
    parameters_before: int
    parameters_after: int
    already_deployed: bool
    left_alone: tuple[str, ...]
    notes: tuple[str, ...] = ()
    branches: tuple[BlockBranches, ...] = ()
    schema: str = "repdeploy.inspect/1"


@dataclass(frozen=True, slots=True)
class Verification:
    """Every artifact of a bundle (or two artifacts) against the recorded float64 reference; `warnings`: the conversion's."""

    subject: str
    checks: tuple[Check, ...]
    skipped: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    schema: str = "repdeploy.verify/1"

    DERIVED: ClassVar = ("passed",)

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)


@dataclass(frozen=True, slots=True)
class Export:
    """What `export` wrote into a bundle; `reused` names what was current already; `missing` what this machine lacks;
    `norms`: batch norms that stay in the graph, and why."""

    bundle: Path
    artifacts: tuple[Artifact, ...]
    reused: tuple[str, ...] = ()
    missing: str = ""
    hint: str = ""
    notes: tuple[str, ...] = ()
    norms: tuple[tuple[str, str], ...] = ()
    schema: str = "repdeploy.export/1"


@dataclass(frozen=True, slots=True)
class FamilyInfo:
    """`asks`: facts that may have to be stated; `containers`: the files its repository writes."""

    name: str
    title: str
    source: str
    distribution: str
    architectures: tuple[str, ...]
    skeletons: tuple[str, ...]
    asks: tuple[str, ...] = ()
    containers: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Tool:
    """A library or device `doctor` looked for. `state`: "ready" or "missing"."""

    name: str
    purpose: str
    state: str
    version: str = ""
    hint: str = ""


def to_json(record: Any) -> str:
    """A record as one JSON document. Paths become strings, infinities and NaN become strings that name them."""
    return json.dumps(plain(record), indent=1, ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """A record as dicts, lists, strings and numbers; derived properties that readers ask for are written out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
        derived = {name: plain(getattr(value, name)) for name in getattr(type(value), "DERIVED", ())}
        return {**({"schema": fields.pop("schema")} if "schema" in fields else {}), **fields, **derived}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | frozenset | set):
        return [plain(item) for item in (sorted(value) if isinstance(value, frozenset | set) else value)]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return str(value)
    if isinstance(value, Path):
        return str(value)
    return value


def manifest_from_json(text: str) -> Manifest:
    """Read a manifest back. Raises ValueError (or KeyError, TypeError) where the text is none."""
    content = json.loads(text)
    if not isinstance(content, dict) or content.get("schema") != MANIFEST_SCHEMA:
        raise ValueError(f"expected schema {MANIFEST_SCHEMA}")
    verdict = content["verdict"]
    return Manifest(**{
        **content,
        "source": Source(**{**content["source"], "others": tuple((w, n) for w, n in content["source"]["others"]),
                            "inert": tuple(content["source"]["inert"])}),
        "families": tuple(content["families"]),
        "input_shape": tuple(content["input_shape"]),
        "gate_shape": tuple(content["gate_shape"]),
        "facts": _facts(content["facts"]),
        "blocks": tuple(
            BlockReport(**tupled(item)) for item in content["blocks"]
        ),
        "copied": tuple(content["copied"]),
        "dropped": tuple((key, reason) for key, reason in content["dropped"]),
        "verdict": Verdict(verdict["passed"], verdict["grade"], _checks(verdict["checks"]), _facts(verdict["assumed"]),
                           tuple(verdict["warnings"])),
        "training": {key: TensorShape(tuple(item["shape"]), item["dtype"]) for key, item in content["training"].items()},
        "artifacts": tuple(_artifact(item) for item in content["artifacts"]),
        "notes": tuple(content["notes"]),
        "norms": tuple((name, reason) for name, reason in content.get("norms", ())),
        "graph": _graph(content["graph"]) if content.get("graph") else None,
        "pruning": _pruning(content["pruning"]) if content.get("pruning") else None,
    })  # fmt: skip


def _artifact(item: Mapping[str, Any]) -> Artifact:
    kept = {field.name for field in dataclasses.fields(Artifact)}
    return Artifact(**{
        **tupled({name: value for name, value in item.items() if name in kept}),
        "checks": _checks(item["checks"]),
        "others": tuple((name, sha256) for name, sha256 in item.get("others", ())),
        "wide": tuple(WideLayer(**layer) for layer in item.get("wide", ())),
        "drift": tuple(Drift(layer["name"], float(layer["error"])) for layer in item.get("drift", ())),
    })  # fmt: skip


def _pruning(item: Mapping[str, Any]) -> Pruning:
    return Pruning(**{**tupled(item), "layers": tuple(PrunedLayer(**layer) for layer in item["layers"])})


def _graph(item: Mapping[str, Any]) -> GraphReport:
    ports = {side: tuple(Port(**tupled(port)) for port in item[side]) for side in ("inputs", "outputs")}
    pairs = {side: tuple((name, count) for name, count in item[side]) for side in ("operators_before", "operators_after")}
    return GraphReport(**{
        **item, **ports, **pairs,
        "sampled": tuple((name, tuple(shape)) for name, shape in item["sampled"]),
        "kept": tuple(KeptNode(**node) for node in item["kept"]),
    })  # fmt: skip


def tupled(item: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's lists as the tuples that records hold."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in item.items()}


def _facts(items: list[dict[str, Any]]) -> tuple[Fact, ...]:
    return tuple(Fact(item["name"], item["value"], item["origin"], tuple(item["scopes"])) for item in items)


def _checks(items: list[dict[str, Any]]) -> tuple[Check, ...]:
    kept = {item.name for item in dataclasses.fields(Check)}
    return tuple(
        Check(
            **{**{k: v for k, v in item.items() if k in kept}, "error": float(item["error"]), "budget": float(item["budget"])}
        )
        for item in items
    )
