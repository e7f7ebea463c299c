"""Which kernels exist, what each one takes, and which one runs: data, and a scan over it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from nybble.config import ModelConfig
from nybble.errors import ConfigError, NybbleError
from nybble.kernels.backend import Backend, Choice
from nybble.kernels.matrix import QuantMatrix


@dataclass(frozen=True)
class Kernel:
    """What one matrix kernel accepts. None or 1 means: anything."""

    name: str
    backend: str
    bits: tuple[int, ...] = (4, 8)
    group_sizes: tuple[int, ...] | None = None
    group_multiple: int = 1  # of group_size, unless the matrix is one single group
    outputs_multiple: int = 1
    whole_groups: bool = False  # the group size must divide K

    def refusal(self, matrix: QuantMatrix) -> str | None:
        """Why this kernel does not take the matrix, or None when it does."""
        size, one_group = matrix.group_size, matrix.scales.shape[0] == 1
        if matrix.bits not in self.bits:
            return f"{matrix.bits} bits"
        if self.group_sizes is not None and size not in self.group_sizes:
            return f"group size {size}"
        if size % self.group_multiple and not one_group:
            return f"group size {size} is no multiple of {self.group_multiple}"
        if matrix.out_features % self.outputs_multiple:
            return f"{matrix.out_features} outputs are no multiple of {self.outputs_multiple}"
        if self.whole_groups and matrix.rows % size:
            return f"the last group of {size} is short"
        return None


# In order of preference within a backend.
KERNELS = (
    Kernel("c-int8-activations", "cpu", group_multiple=32),
    Kernel("ref", "cpu"),
    Kernel(
        "torch-int4pack",
        "torch",
        bits=(4,),
        group_sizes=(32, 64, 128, 256),
        outputs_multiple=16,
        whole_groups=True,
    ),
    Kernel("torch-dequantise", "torch"),
    Kernel("ref", "ref"),
)


def choose_kernel(backend: str, matrix: QuantMatrix) -> Choice:
    """The first kernel of the backend that takes the matrix, and what the ones before it said."""
    refused: list[str] = []
    for kernel in KERNELS:
        if kernel.backend != backend:
            continue
        reason = kernel.refusal(matrix)
        if reason is None:
            return Choice(kernel.name, tuple(refused))
        refused.append(f"{kernel.name}: {reason}")
    raise ConfigError(
        f"no kernel of '{backend}' takes this matrix ({'; '.join(refused)}): "
        "run the model with the 'ref' kernels."
    )


def _cpu(device: torch.device, dtype: torch.dtype | None) -> Backend:
    from nybble.kernels.cpu.backend import CpuBackend

    return CpuBackend.load()


def _cuda(device: torch.device, dtype: torch.dtype | None) -> Backend:
    from nybble.kernels.cuda.backend import CudaBackend

    return CudaBackend(device, dtype or torch.float16)


def _triton(device: torch.device, dtype: torch.dtype | None) -> Backend:
    from nybble.kernels.cuda.triton_backend import TritonBackend

    return TritonBackend.load(device, dtype or torch.float16)


def _torch(device: torch.device, dtype: torch.dtype | None) -> Backend:
    from nybble.kernels.torch_cpu import TorchBackend

    return TorchBackend()


def _ref(device: torch.device, dtype: torch.dtype | None) -> Backend:
    from nybble.kernels.ref import RefBackend

    return RefBackend(device)


@dataclass(frozen=True)
class Candidate:
    """A set of kernels for some device types; `make` raises NybbleError where it cannot run."""

    name: str
    devices: tuple[str, ...]
    make: Callable[[torch.device, torch.dtype | None], Backend]


# In order of preference on a device.
CANDIDATES = (
    Candidate("cpu", ("cpu",), _cpu),
    Candidate("torch", ("cpu",), _torch),
    Candidate("cuda", ("cuda",), _cuda),
    Candidate("triton", ("cuda",), _triton),
    Candidate("ref", ("cpu", "cuda", "mps", "xpu"), _ref),
)


def choose_backend(
    device: torch.device | str = "cpu",
    prefer: str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Backend, Choice]:
    """The kernels that run on a device, and why those before them were refused.

    dtype: of activations on a GPU, fp16 or bf16; the CPU computes in fp32. `prefer` names one of
    them and allows no other: an unknown name, or one that cannot run here, is a ConfigError.
    """
    device = torch.device(device)
    candidates = [c for c in CANDIDATES if device.type in c.devices]
    names = [c.name for c in candidates]
    if prefer not in (None, *names):
        raise ConfigError(
            f"there are no kernels '{prefer}' for {device.type}: choose from {', '.join(names)}."
        )
    refused: list[str] = []
    for candidate in candidates:
        if prefer not in (None, candidate.name):
            continue
        try:
            backend = candidate.make(device, dtype)
        except NybbleError as error:
            refused.append(f"{candidate.name}: {error}")
            continue
        return backend, Choice(backend.name, tuple(refused))
    raise ConfigError("; ".join(refused) or f"nybble has no kernels for {device.type}: use cpu.")


def select_backend(
    device: torch.device | str = "cpu",
    *,
    exact: bool = False,
    prefer: str | None = None,
    dtype: torch.dtype | None = None,
) -> Backend:
    """The fastest kernels of a device, or with `exact` the reference, in fp32 throughout.

    dtype: of activations on a GPU, fp16 or bf16.
    """
    return choose_backend(device, "ref" if exact else prefer, None if exact else dtype)[0]


def self_test(backend: Backend, config: ModelConfig, kv_kind: str) -> None:
    """Each GPU kernel that this model will run, against the reference on a random tile.

    Takes milliseconds once the kernels are compiled. ConfigError names one that gives wrong
    results. The CPU's kernels are not tested here: their compiler is the system's own.
    """
    if backend.name == "cuda":
        from nybble.kernels.cuda import selftest
        from nybble.kernels.cuda.backend import CudaBackend

        if isinstance(backend, CudaBackend):
            selftest.check_model(backend, config, kv_kind)
