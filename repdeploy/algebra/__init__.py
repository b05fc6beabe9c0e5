"""The algebra of linear blocks: leaves, `a >> b` in series, `a + b` in parallel; `run` and `squeeze`."""

from repdeploy.algebra.conv import Conv
from repdeploy.algebra.geometry import Geometry, Pads, Pair
from repdeploy.algebra.leaves import AveragePool, Identity, Norm, Pad, Scale
from repdeploy.algebra.linear import FILL_TOLERANCE, Linear, Parallel, Series

__all__ = [
    "FILL_TOLERANCE",
    "AveragePool",
    "Conv",
    "Geometry",
    "Identity",
    "Linear",
    "Norm",
    "Pad",
    "Pads",
    "Pair",
    "Parallel",
    "Scale",
    "Series",
]
