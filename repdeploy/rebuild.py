"""Networks rebuilt from tensors and recorded facts alone: the deploy network of a bundle, and its training-time twin."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from repdeploy.bundle import Bundle
from repdeploy.checkpoint import StoredTensor
from repdeploy.errors import InputError
from repdeploy.facts import GEOMETRY, FactKind, Facts, settings_of
from repdeploy.family import Family, Read
from repdeploy.network import Network, describe
from repdeploy.recognise import Table, recognise
from repdeploy.records import Fact, TensorShape

Image = tuple[int, int, int]
"""(channels, height, width)"""


def fact_kinds(families: Iterable[Family]) -> list[FactKind]:
    kinds = (*GEOMETRY, *(kind for family in families for kind in family.all_facts))
    return list({kind.name: kind for kind in kinds}.values())


def reader(tensors: Table) -> Read:
    """Read tensors in float64. Raises InputError for NaN and Inf, by name."""

    def read(key: str, rows: int | None = None) -> Tensor:
        values = tensors[key].read() if rows is None else tensors[key].read()[:rows]
        if not values.dtype.is_floating_point:
            raise InputError(f"{key} has type {str(values.dtype).removeprefix('torch.')}; expected floating point weights")
        if values.dtype.itemsize < 2:
            raise InputError(
                f"{key} is stored as {str(values.dtype).removeprefix('torch.')}, which is no precision to convert from",
                hint="save the weights in float32, float16 or bfloat16",
            )
        # a sum in float64 is finite exactly when its terms are: float32 cannot overflow it
        if not math.isfinite(float(values.sum(dtype=torch.float64))):
            raise not_finite(key, values)
        return values.double()

    return read


def not_finite(key: str, values: Tensor) -> InputError:
    nans, infinities = int(values.isnan().sum()), int(values.isinf().sum())
    what = " and ".join(f"{count} {name}" for count, name in ((nans, "NaN"), (infinities, "Inf")) if count)
    return InputError(
        f"{key} holds {what or 'numbers whose sum overflows'} among its {values.numel()} values; expected finite weights",
        hint="the training diverged or the file is damaged: convert an earlier checkpoint",
    )


def rebuilt(
    tensors: Table,
    families: Sequence[Family],
    facts: Iterable[Fact],
    image: Image,
    *,
    owners: Collection[str],
    squeezed: bool,
    dtype: torch.dtype = torch.float32,
    static: bool = False,
) -> Network:
    """The network that these tensors are, described with the facts a bundle recorded; `owners`: the families of its blocks.

    Raises IllegalInput where it cannot take the image, InputError where it is no known network.
    """
    known = _told(facts, families)
    recognition = recognise(tensors, families, known, input_shape=image, fused_of=owners)
    if recognition.plan is None:
        raise InputError("the weights are no network that is known here", hint="convert the checkpoint again")
    description = describe(recognition.plan, reader(tensors), known)
    return description.network(squeezed=squeezed, dtype=dtype, static=static)


def _told(facts: Iterable[Fact], families: Sequence[Family]) -> Facts:
    """What a bundle recorded, but for groups: in a network shapes tell them, and channels may have left."""
    return Facts(item for item in settings_of(facts, fact_kinds(families)) if item.name != "groups")


def require_network(bundle: Bundle) -> None:
    """Raises InputError where the bundle holds blocks of an unknown network."""
    if bundle.manifest.skeleton is None:
        raise InputError(
            f"{bundle.path} holds {bundle.manifest.architecture}: its blocks are fused and proved, but nothing tells how "
            "they are connected",
            hint="load weights.safetensors into your own deploy model and export that",
        )


def check_image(bundle: Bundle, families: Sequence[Family], shape: tuple[int, ...]) -> Image:
    """The image part of an input shape. Raises InputError or IllegalInput where the bundle's network cannot take it."""
    _, channels, height, width = shape
    known = _told(bundle.manifest.facts, families)
    owners = bundle.manifest.families
    recognise(bundle.tensors(), families, known, input_shape=(channels, height, width), fused_of=owners)
    return channels, height, width


def deploy_network(bundle: Bundle, families: Sequence[Family], image: Image, dtype: torch.dtype = torch.float32) -> Network:
    """The fused network of a bundle. Raises InputError or IllegalInput."""
    require_network(bundle)
    manifest = bundle.manifest
    return rebuilt(bundle.tensors(), families, manifest.facts, image, owners=manifest.families, squeezed=True, dtype=dtype)


def training_twin(bundle: Bundle, families: Sequence[Family], image: Image, *, static: bool = False) -> Network:
    """The training-time network with harmless weights: latency needs the branches, not their values.

    `static`: to be exported; kernels that training generates at every step are then generated once.
    """
    require_network(bundle)
    manifest = bundle.manifest
    tensors = synthetic(manifest.training)
    return rebuilt(tensors, families, manifest.facts, image, owners=manifest.families, squeezed=False, static=static)


def synthetic(structure: Mapping[str, TensorShape]) -> dict[str, StoredTensor]:
    """Tensors that keep activations of order one: neither denormals nor infinities distort a CPU's timing."""
    return {key: _synthetic(key, item, seed) for seed, (key, item) in enumerate(structure.items())}


def _synthetic(key: str, item: TensorShape, seed: int) -> StoredTensor:
    dtype: torch.dtype = getattr(torch, item.dtype)

    def read() -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        if len(item.shape) > 1:
            spread = 1 / math.sqrt(max(math.prod(item.shape[1:]), 1))
            return (torch.randn(item.shape, generator=generator) * spread).to(dtype)
        scales = key.endswith(("running_var", ".weight", "gamma")) or key == "weight"
        return torch.ones(item.shape).to(dtype) if scales else torch.zeros(item.shape).to(dtype)

    return StoredTensor(item.shape, dtype, read)
