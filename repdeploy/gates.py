"""The gates (design section 6): numerical proof that the fused network is the trained one.

Evaluation mode, float64 for exactness, float32 against its own noise floor; the unit is max|a-b| / max|reference|
unless a check says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from repdeploy.algebra import Conv, Geometry, Linear, generated
from repdeploy.errors import IllegalInput, InputError
from repdeploy.network import Network, sample_images
from repdeploy.records import Check

ALGEBRA_BUDGET = 1e-10
"""Gate 1: float64 arithmetic on one block; a wrong tap shows at 1e-2 and more."""
NETWORK_BUDGET = 1e-9
"""Gate 2: float64 through a whole network."""
ROUNDING_FACTOR = 4.0
"""Gate 3: the deploy network's float32 noise over the training-time network's; below 2.2 over 43 networks."""
PRECISION_BUDGETS = {"fp64": NETWORK_BUDGET, "fp32": 1e-4, "tf32": 2e-3, "fp16": 1e-2, "bf16": 5e-2}
"""Gate 4, per precision of the artifact."""
LOSSLESS = 1e-3
"""What zeroing given-up channels may change of the outputs; rows that training drove to zero change them by 1e-4 at most."""
EXPECT_BUDGETS = {"float64": 1e-6, "float32": 1e-4}
"""Against outputs that the user's own training code recorded, by the type they were recorded in."""
RECORD = "np.savez('expect.npz', input=x.numpy(), output=model.eval()(x).numpy()), in float32 or float64"
POOLED_IMAGES = 8
"""Gate 3 pools its noise over this many images: a maximum on one image gives false alarms."""
CHUNK = 2
"""Images that run through a float64 network at once."""


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """No autocast, no TF32, no gradients."""
    matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, cudnn


def relative_error(got: Tensor, reference: Tensor) -> float:
    """max|got - reference| / max|reference|; the plain maximum where the reference is zero everywhere."""
    largest = float(reference.double().abs().max()) if reference.numel() else 0.0
    difference = float((got.double() - reference.double()).abs().max()) if reference.numel() else 0.0
    return difference / largest if largest > 0 else difference


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def algebra(name: str, expression: Linear, fused: Conv, seed: int = 0) -> Check:
    """Gate 1: run the block branch by branch and as one convolution, in float64, on an image with border and interior.

    Where the training-time block generates its kernel, what it generates it from is held against itself as well.
    """
    worst = 0.0
    for literal, squeezed in ((expression, fused), *((part, part.squeeze()) for part in generated(expression))):
        x = algebra_image((1, squeezed.in_channels, *border_and_interior(squeezed.geometry)), seed)
        with exact_arithmetic():
            reference, got = literal.run(x), squeezed.run(x)
        if got.shape != reference.shape:
            failure = f"the fused convolution gives {tuple(got.shape)}, the branches {tuple(reference.shape)}"
            return Check("algebra", name, float("inf"), ALGEBRA_BUDGET, failure=failure)
        if failure := _not_finite(got):
            return Check("algebra", name, float("inf"), ALGEBRA_BUDGET, failure=failure)
        worst = max(worst, relative_error(got, reference))
    return Check("algebra", name, worst, ALGEBRA_BUDGET)


def border_and_interior(geometry: Geometry) -> tuple[int, int]:
    """The smallest odd image on which some output reads nothing of the border, whatever stride and padding are."""
    height, width = (
        (side + step - 1 - min(0, *geometry.pads) * 2) | 1 for side, step in zip(geometry.extent, geometry.stride, strict=True)
    )
    return height, width + 2


def algebra_image(shape: tuple[int, ...], seed: int) -> Tensor:
    """What gate 1 runs on: noise, in float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@contextmanager
def within_memory(shape: Iterable[int]) -> Iterator[None]:
    """Raises IllegalInput where images of that shape are more than this machine can hold."""
    try:
        yield
    except RuntimeError as reason:  # torch has no error of its own for it on the CPU
        if "allocate memory" not in str(reason):
            raise
        raise IllegalInput(
            f"images of {'x'.join(map(str, shape))} do not fit into this machine's memory", hint="use a smaller --input-shape"
        ) from reason


def gate_images(shape: tuple[int, int, int], seed: int = 0, batch: int = POOLED_IMAGES) -> Tensor:
    with within_memory(shape):
        return sample_images((batch, *shape), seed)


def run_in_chunks(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    with exact_arithmetic(), within_memory(images.shape[1:]):
        return torch.cat([network(part) for part in images.split(CHUNK)])


def network_gate(training: Network, deploy: Network, images: Tensor) -> tuple[Check, Tensor]:
    """Gate 2: both networks in float64. Returns the check and the training-time output, the reference of all that follows.

    On failure the check names the first block over budget.
    """
    x = images.double()
    reference, got = run_in_chunks(training, x), run_in_chunks(deploy, x)
    failure = output_failure(got, reference)
    error = relative_error(got, reference) if got.shape == reference.shape else float("inf")
    check = Check("network", "float64, training-time against deploy", error, NETWORK_BUDGET, failure=failure)
    if not check.passed:
        culprit = _first_difference(training, deploy, x[:1])
        check = Check(check.gate, check.subject, error, NETWORK_BUDGET, failure=f"{failure or 'the outputs differ'}; {culprit}")
    return check, reference


def rounding_gate(training: Network, deploy: Network, images: Tensor, reference: Tensor) -> Check:
    """Gate 3: both networks in float32 against the float64 reference, root mean square over all images."""
    trained, deployed = run_in_chunks(training, images), run_in_chunks(deploy, images)
    failure = output_failure(deployed, reference)
    if failure:
        return Check("rounding", "float32", float("inf"), 0.0, "rms(deploy - reference)", failure=failure)
    floor = rms(trained.double() - reference)
    return Check(
        "rounding",
        f"float32, rms over {len(images)} images",
        rms(deployed.double() - reference),
        ROUNDING_FACTOR * floor + 8 * 2.0**-24 * rms(reference),
        "rms(deploy - reference)",
        detail=f"the training-time network itself is off by {floor:.1e} in float32; outputs have rms {rms(reference):.1e}",
    )


def stored_gate(pairs: Iterable[tuple[str, Tensor, Tensor]]) -> Check:
    """Gate 3, first half: every stored tensor is the float64 result rounded once, bit for bit."""
    wrong = [name for name, exact, stored in pairs if not torch.equal(exact.to(stored.dtype), stored)]
    failure = f"{len(wrong)} tensors differ from the float64 result rounded once, the first is {wrong[0]}" if wrong else ""
    return Check("stored", "every fused tensor, bit for bit", float(len(wrong)), 0.0, "tensors that differ", failure=failure)


def artifact_check(subject: str, got: Tensor, reference: Tensor, precision: str, detail: str = "") -> Check:
    """Gate 4: an artifact's output against the float64 reference, within the budget of its precision."""
    failure = output_failure(got, reference)
    error = relative_error(got, reference) if got.shape == reference.shape else float("inf")
    return Check("artifact", subject, error, PRECISION_BUDGETS[precision], detail=detail, failure=failure)


def expectation(training: Network, recorded: dict[str, np.ndarray]) -> Check:
    """The anchor: our training-time network against outputs recorded by the user's own code.

    `recorded`: `input` (batch, channels, height, width) and `output`, checked. Raises InputError where they do not fit.
    """
    x, wanted = torch.from_numpy(recorded["input"]), torch.from_numpy(recorded["output"])
    if x.shape[1] != training.plan.channels:
        raise InputError(
            f"--expect: input has shape {tuple(x.shape)}, expected (batch, {training.plan.channels}, height, width)",
            hint=RECORD,
        )
    got = run_in_chunks(training, x.double())
    if got.shape != wanted.shape:
        raise InputError(
            f"--expect: output has shape {tuple(wanted.shape)}, this network gives {tuple(got.shape)}", hint=RECORD
        )
    kind = str(wanted.dtype).removeprefix("torch.")
    error = relative_error(got, wanted)
    return Check("anchor", f"recorded {kind} outputs, {len(x)} images", error, EXPECT_BUDGETS[kind], failure=_not_finite(got))


def check_recorded(recorded: dict[str, np.ndarray]) -> None:
    """Raises InputError where recorded inputs and outputs prove nothing."""
    for name in ("input", "output"):
        if name not in recorded:
            raise InputError(
                f"--expect needs the arrays 'input' and 'output', the file has {', '.join(recorded) or 'none'}", hint=RECORD
            )
        values = recorded[name]
        if values.dtype.name not in EXPECT_BUDGETS:
            raise InputError(f"--expect: {name} has type {values.dtype}, expected float32 or float64", hint=RECORD)
        if values.size == 0 or not np.isfinite(values).all() or not values.any():
            what = (
                "is empty" if values.size == 0 else "has NaN or Inf" if not np.isfinite(values).all() else "is zero everywhere"
            )
            raise InputError(f"--expect: {name} {what}, which proves nothing", hint=RECORD)
    if recorded["input"].ndim != 4 or len(recorded["input"]) != len(recorded["output"]):
        raise InputError(
            f"--expect: input has shape {recorded['input'].shape} and output {recorded['output'].shape}; "
            "expected (batch, channels, height, width) and (batch, ...)",
            hint=RECORD,
        )


def output_failure(got: Tensor, reference: Tensor) -> str:
    """Gate 5: what no budget may excuse, each under its own name; empty when there is nothing."""
    if got.shape != reference.shape:
        return f"the output has shape {tuple(got.shape)}, expected {tuple(reference.shape)}"
    if failure := _not_finite(got):
        return failure
    if not got.is_floating_point():
        return ""  # classes and masks may well be the same everywhere
    if got.numel() > 1 and float(reference.max() - reference.min()) > 0:
        if not got.any():
            return "the output is zero everywhere, the reference is not"
        if float(got.max() - got.min()) == 0:
            return "the output is constant, the reference is not"
    return ""


def _not_finite(values: Tensor) -> str:
    if values.isnan().any():
        return "the output has NaN"
    return "the output has Inf" if values.isinf().any() else ""


def _first_difference(training: Network, deploy: Network, x: Tensor) -> str:
    """Walk the blocks in order: the first one over budget and what it is made of."""
    with exact_arithmetic():
        ours, theirs = training.outputs_by_slot(x), deploy.outputs_by_slot(x)
    for name, wanted in ours.items():
        if name in theirs and theirs[name].dim() == wanted.dim() and theirs[name].shape[1] < wanted.shape[1]:
            continue  # it has lost channels, which is no difference by itself
        if name not in theirs or theirs[name].shape != wanted.shape or relative_error(theirs[name], wanted) > NETWORK_BUDGET:
            slot = training.plan.slots.get(name)
            made_of = f" ({slot.formula})" if slot else ""
            return f"the first block that differs is {name}{made_of}: its stored form does not belong to these weights"
    return "every block agrees, so what stands between them differs"
