"""The algebra of linear blocks: leaves, `a >> b` in series, `a + b` in parallel; `run` and `squeeze`."""

from repdeploy.algebra.branches import branches, linearize
from repdeploy.algebra.conv import Conv
from repdeploy.algebra.generated import Flip, Online, fixed, generated
from repdeploy.algebra.geometry import Geometry, Pads, Pair
from repdeploy.algebra.leaves import NORM_EPS, AveragePool, Channelwise, Identity, Norm, Pad, Scale, Shift
from repdeploy.algebra.linear import FILL_TOLERANCE, Linear, Parallel, Series
from repdeploy.algebra.matrix import AsMatrix

__all__ = [
    "FILL_TOLERANCE",
    "NORM_EPS",
    "AsMatrix",
    "AveragePool",
    "Channelwise",
    "Conv",
    "Flip",
    "Geometry",
    "Identity",
    "Linear",
    "Norm",
    "Online",
    "Pad",
    "Pads",
    "Pair",
    "Parallel",
    "Scale",
    "Series",
    "Shift",
    "branches",
    "fixed",
    "generated",
    "linearize",
]
