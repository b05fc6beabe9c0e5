"""Batch-norm statistics as training leaves them: default statistics hide every mistake of a fusion."""

from __future__ import annotations

import torch
from torch import nn


def scatter(model: nn.Module, seed: int = 0) -> nn.Module:
    """Randomise every one-dimensional tensor in place: variances from 0.3 to 3, some gammas negative or almost zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=generator) * 2.7 + 0.3)
        elif value.dim() == 1 and value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) * (0.7 if name.endswith("weight") else 0.3))
            if name.endswith("weight"):
                value[0], value[-1] = -0.8, 1e-7
    return model.eval()
