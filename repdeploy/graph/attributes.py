"""Attributes of ONNX nodes: with their defaults, and the window of convolutions and pools in one form."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from torch import Tensor

from repdeploy.errors import CannotSqueeze


def number(node: ir.Node, name: str, default: float) -> float:
    """A float or int attribute."""
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.value is None else float(attribute.value)


def text(node: ir.Node, name: str, default: str) -> str:
    attribute = node.attributes.get(name)
    return default if attribute is None or attribute.value is None else str(attribute.value)


def ints(node: ir.Node, name: str) -> tuple[int, ...]:
    """An attribute of integers; empty where it is absent."""
    attribute = node.attributes.get(name)
    return () if attribute is None or attribute.value is None else tuple(int(item) for item in attribute.value)


def axes_of(node: ir.Node, given: Tensor | None) -> tuple[int, ...] | None:
    """The axes of a reduction or a squeeze, which newer opsets take as an input; None for the default."""
    found = tuple(given.tolist()) if given is not None and given.numel() else ints(node, "axes")
    return found or None


@dataclass(frozen=True, slots=True)
class Window:
    """Kernel, strides, dilations and pads (all begins, then all ends) of a convolution or a pool, per spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    ceil: bool

    @classmethod
    def of(cls, node: ir.Node, kernel: tuple[int, ...], size: tuple[int | None, ...]) -> Window:
        """`size`: the spatial size of the input, None where unknown. Raises CannotSqueeze where the pads depend on that."""
        rank = len(kernel)
        strides, dilations = ints(node, "strides") or (1,) * rank, ints(node, "dilations") or (1,) * rank
        automatic = text(node, "auto_pad", "NOTSET")
        pads = ints(node, "pads") or (0,) * (2 * rank)
        if automatic == "VALID":
            pads = (0,) * (2 * rank)
        elif automatic != "NOTSET":
            needed = []
            for taps, stride, dilation, length in zip(kernel, strides, dilations, size, strict=True):
                extent = (taps - 1) * dilation + 1
                if stride > 1 and length is None:
                    raise CannotSqueeze(f"its padding ({automatic}) depends on the size of the image, which is open")
                rest = 0 if stride == 1 or length is None else (-(-length // stride) - 1) * stride + 1 - length
                needed.append(max(extent - 1 + rest, 0))
            small, large = [item // 2 for item in needed], [item - item // 2 for item in needed]
            pads = tuple(small + large if automatic == "SAME_UPPER" else large + small)
        ceil = bool(number(node, "ceil_mode", 0)) and not _divides(kernel, strides, dilations, pads, size)
        return cls(kernel, strides, dilations, pads, ceil)

    @property
    def torch_pads(self) -> tuple[int, ...]:
        """As F.pad takes them: the last axis first."""
        rank = len(self.kernel)
        return tuple(self.pads[axis + end] for axis in reversed(range(rank)) for end in (0, rank))


def _divides(
    kernel: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    pads: tuple[int, ...],
    size: tuple[int | None, ...],
) -> bool:
    """Whether rounding up and rounding down give the same number of windows."""
    rank = len(kernel)
    return all(
        stride == 1 or (length is not None and (length + pads[axis] + pads[axis + rank] - (taps - 1) * step - 1) % stride == 0)
        for axis, (taps, stride, step, length) in enumerate(zip(kernel, strides, dilations, size, strict=True))
    )
