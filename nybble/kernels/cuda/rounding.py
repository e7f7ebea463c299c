"""The sequential part of GPTQ on an NVIDIA GPU: one launch where torch needs eight a row."""

from __future__ import annotations

import ctypes

import torch

from nybble.kernels.cuda.launch import kernel

MOST_ROWS = 64
_THREADS = 64


def round_rows(
    target: torch.Tensor,
    weight: torch.Tensor,
    errors: torch.Tensor,
    codes: torch.Tensor,
    feedback: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor,
    top: int,
) -> None:
    """Round up to MOST_ROWS rows of (rows, N), fp32 or fp64, in their order, into `codes`.

    Row k is rounded at target[k] plus feedback[j, k] times the change of error j, summed over the
    rows j before it. errors: of earlier codes, replaced by weight - rounded. scales and zeros:
    of each number. feedback (rows, rows).
    """
    real = ctypes.c_double if weight.dtype == torch.float64 else ctypes.c_float

    class _Arguments(ctypes.Structure):
        _fields_ = (
            *((name, ctypes.c_void_p) for name in ("target", "weight", "feedback")),
            *((name, ctypes.c_void_p) for name in ("scales", "zeros")),
            *((name, ctypes.c_void_p) for name in ("errors", "codes")),
            *((name, ctypes.c_int) for name in ("rows", "outputs")),
            ("top", real),
        )

    rows, outputs = weight.shape
    inputs = (x.contiguous() for x in (target, weight, feedback, scales, zeros))
    if not (errors.is_contiguous() and codes.is_contiguous()):
        raise ValueError("errors and codes are written in place: they must be contiguous")
    tensors = (*inputs, errors, codes)
    arguments = _Arguments(*(x.data_ptr() for x in tensors), rows, outputs, float(top))
    defines = (("DOUBLE", int(real is ctypes.c_double)), ("MOST", MOST_ROWS), ("THREADS", _THREADS))
    run = kernel("rounding.cu", "round_rows", defines, weight.device)
    run.launch((-(-outputs // _THREADS), 1), _THREADS, arguments, dependent=False)
