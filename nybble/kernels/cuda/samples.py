"""Random quantised matrices in any shape, made where they are used: for tests and benchmarks."""

from __future__ import annotations

import torch

from nybble.kernels.matrix import QuantMatrix


def random_matrix(
    inputs: int,
    outputs: int,
    *,
    bits: int = 4,
    group_size: int = 128,
    symmetric: bool = True,
    scale: float = 0.01,
    scale_dtype: torch.dtype = torch.float16,
    random: torch.Generator,
) -> QuantMatrix:
    """On the generator's device. Uniform codes; scales of 0.5 to 1.5 times `scale`; any zeros."""
    size = inputs if group_size <= 0 else group_size
    groups = -(-inputs // size)
    pack = 32 // bits
    shape, device = (-(-inputs // pack), outputs), random.device
    words = torch.empty(shape, dtype=torch.int32, device=device)
    words.random_(-(2**31), 2**31, generator=random)
    scales = torch.rand(groups, outputs, device=device, generator=random).add_(0.5).mul_(scale)
    zeros = torch.empty(groups, outputs, dtype=torch.uint8, device=device)
    zeros.random_(0, 2**bits, generator=random)
    return QuantMatrix(
        bits=bits,
        group_size=size,
        in_features=inputs,
        words=words,
        scales=scales.to(scale_dtype),
        zeros=None if symmetric else zeros,
    )
