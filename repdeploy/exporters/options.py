"""What an export was asked for, checked before anything is read or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from repdeploy.digest import digest
from repdeploy.errors import UsageError
from repdeploy.records import Dynamic, Precision

OLDEST_OPSET, NEWEST_OPSET = 11, 23
BF16_OPSET = 22
"""Since when ONNX has convolutions in bfloat16."""
LEAST_DEVIATION, MOST_DEVIATIONS = 1e-6, 1e3
"""Of a normalisation: how small a deviation may be, and how many of them the mean may be away from zero."""
BATCHES = (1, 4, 16)
"""Smallest, optimal and largest batch of a dynamic engine, where nothing else is said."""
NAMED_NORMALIZATIONS: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True, slots=True)
class Normalization:
    """What the network expects of its image: (x - mean) / std, per channel or for all."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Normalization:
        """`0.5,0.25` (mean and deviation of all channels), `0.4,0.5,0.6,0.2,0.2,0.3` (all means, then all deviations) or
        `imagenet`. Raises UsageError."""
        if text in NAMED_NORMALIZATIONS:
            return cls(*NAMED_NORMALIZATIONS[text])
        try:
            numbers = [float(part) for part in text.replace("/", ",").split(",")]
        except ValueError:
            numbers = []
        half = len(numbers) // 2
        if (
            not numbers
            or len(numbers) % 2
            or min(numbers[half:]) < LEAST_DEVIATION
            or not all(abs(item) < 1e9 for item in numbers)
        ):
            raise UsageError(
                f"--fold-normalize {text}: expected as many means as deviations, and deviations above zero",
                hint="for example 0.485,0.456,0.406,0.229,0.224,0.225 (means, then deviations), 127.5,127.5, or imagenet",
            )
        if max(abs(mean) / std for mean, std in zip(numbers[:half], numbers[half:], strict=True)) > MOST_DEVIATIONS:
            raise UsageError(
                f"--fold-normalize {text}: a mean is over {MOST_DEVIATIONS:g} deviations from zero, which float32 images blur",
                hint="check the order: means first, then deviations",
            )
        return cls(tuple(numbers[:half]), tuple(numbers[half:]))

    def __str__(self) -> str:
        return ",".join(map(repr, (*self.mean, *self.std)))

    @property
    def shifts(self) -> bool:
        return any(self.mean)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What only TensorRT is told. `workspace` in MiB; `batches`: smallest, optimal, largest."""

    batches: tuple[int, int, int] | None = None
    timing_cache: Path | None = None
    workspace: int | None = None
    level: int | None = None
    tf32: bool = False
    hardware_compatible: bool = False
    version_compatible: bool = False
    strip_weights: bool = False

    def __post_init__(self) -> None:
        if self.batches is not None and not 1 <= self.batches[0] <= self.batches[1] <= self.batches[2]:
            raise UsageError(
                f"--min {self.batches[0]} --opt {self.batches[1]} --max {self.batches[2]}: expected 1 <= min <= opt <= max"
            )
        if self.level is not None and not 0 <= self.level <= 5:
            raise UsageError(f"--optimization-level {self.level}: TensorRT has levels 0 to 5")
        if self.workspace is not None and self.workspace < 1:
            raise UsageError(f"--workspace {self.workspace}: expected a number of MiB")

    @property
    def changed(self) -> dict[str, str]:
        """What is not as it is by default, by flag; the cache changes how long a build takes, not what is built."""
        names = {"level": "optimization_level"}
        return {
            names.get(item.name, item.name): "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
            for item in fields(self)
            if item.name != "timing_cache" and (value := getattr(self, item.name)) not in (None, False)
        }


@dataclass(frozen=True, slots=True)
class Options:
    """One export. `targets`: exporters beside ONNX, by name; `io`: the type of inputs and outputs; `keep`: what stays in
    float32; `sample`: images for the overflow guard. Raises UsageError for what contradicts itself."""

    targets: tuple[str, ...] = ()
    precision: Precision = "fp32"
    dynamic: Dynamic = "batch"
    opset: int | None = None
    fold: bool = True
    simplify: bool = False
    input_name: str | None = None
    normalize: Normalization | None = None
    softmax: bool = False
    io: Precision = "fp32"
    keep: tuple[str, ...] = ()
    sample: Path | None = None
    engine: EngineOptions = EngineOptions()

    def __post_init__(self) -> None:
        if self.opset is not None and not OLDEST_OPSET <= self.opset <= NEWEST_OPSET:
            raise UsageError(
                f"--opset {self.opset}: opsets {OLDEST_OPSET} to {NEWEST_OPSET} are written here",
                hint="leave it out to choose one",
            )
        if self.precision == "bf16" and self.opset is not None and self.opset < BF16_OPSET:
            raise UsageError(
                f"--opset {self.opset}: ONNX has bfloat16 convolutions since opset {BF16_OPSET}",
                hint=f"give --opset {BF16_OPSET}, or leave it out",
            )
        if self.io not in ("fp32", self.precision):
            raise UsageError(
                f"--io-dtype {self.io}: inputs and outputs are fp32 or what the graph is in, here {self.precision}",
                hint=f"give --precision {self.io} as well, or leave it out",
            )
        if self.keep and self.precision == "fp32":
            raise UsageError("--keep-fp32 goes with --precision fp16 or bf16: everything is float32 already")
        if self.sample is not None and self.precision != "fp16":
            raise UsageError("--sample goes with --precision fp16: it shows what float16 cannot hold")
        if self.input_name is not None and not self.input_name.strip():
            raise UsageError("--input-name: the name is empty")

    @classmethod
    def of_ends(cls, recorded: Mapping[str, str]) -> Options:
        """From what an artifact recorded: as far as it says what its inputs and outputs mean."""
        normalize = recorded.get("fold_normalize")
        return cls(
            normalize=Normalization.parse(normalize) if normalize else None,
            softmax="softmax" in recorded,
            input_name=recorded.get("input_name"),
        )

    def opset_from(self, own: int | None) -> int | None:
        """What to write, of a graph that is in an opset of its own or not yet in any; None: as it is."""
        if self.opset is not None or self.precision != "bf16":
            return self.opset
        return max(own or 0, BF16_OPSET)

    @property
    def of_graph(self) -> dict[str, str]:
        """What shapes the ONNX graph, where it is not as by default: an artifact made with the same is current."""
        found = {
            "opset": self.opset, "no_fold": not self.fold, "simplify": self.simplify, "input_name": self.input_name,
            "fold_normalize": self.normalize, "softmax": self.softmax, "io_dtype": None if self.io == "fp32" else self.io,
            "keep_fp32": " | ".join(self.keep) or None,
            "sample": digest(self.sample) if self.sample is not None and self.sample.is_file() else None,
        }  # fmt: skip
        return {name: str(value) for name, value in found.items() if value not in (None, False)}
