"""Compiled kernels loaded on a device, and launched on torch's current stream."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch

from nybble.errors import NybbleError
from nybble.kernels.cuda.compiler import binding, cubin


class Kernel:
    """One kernel of one device. Its single argument is a structure, passed by value."""

    def __init__(
        self,
        source: str,
        name: str,
        defines: tuple[tuple[str, int], ...],
        shared_bytes: int,
        index: int,
    ) -> None:
        driver = binding("driver")
        torch.cuda.current_stream().synchronize()  # makes torch's context current
        code = cubin(source, dict(defines), torch.cuda.get_device_capability())
        self._library = _checked(driver.cuLibraryLoadData(code, [], [], 0, [], [], 0))
        handle = _checked(driver.cuLibraryGetKernel(self._library, name.encode()))
        # Loads the code now: a first launch may stand inside a graph capture, where it cannot.
        self._function = _checked(driver.cuKernelGetFunction(handle))
        self._shared_bytes = shared_bytes
        limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(self._function, limit, shared_bytes))
        self._driver = driver
        self._index = index
        self._attributes = [_programmatic(driver)]

    def launch(
        self,
        grid: tuple[int, int],
        threads: int,
        arguments: ctypes.Structure,
        *,
        dependent: bool,
    ) -> None:
        """Queue the kernel. `dependent`: it may start before the kernel ahead of it has ended
        (programmatic dependent launch, compute capability 9.0 and later)."""
        driver = self._driver
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid[0], grid[1], 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self._shared_bytes
        # As torch's own compiler asks for it: the public way takes a fifth of a launch's time.
        config.hStream = torch._C._cuda_getCurrentRawStream(self._index)
        if dependent:
            config.attrs, config.numAttrs = self._attributes, 1
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        where = ctypes.addressof(parameters)
        if torch.cuda.current_device() == self._index:
            _checked(driver.cuLaunchKernelEx(config, self._function, where, 0))
            return
        with torch.cuda.device(self._index):  # stream 0 is that of the current device
            _checked(driver.cuLaunchKernelEx(config, self._function, where, 0))


def kernel(
    source: str,
    name: str,
    defines: tuple[tuple[str, int], ...],
    device: torch.device,
    shared_bytes: int = 0,
) -> Kernel:
    """The kernel for this device, compiled and loaded at the first call.

    shared_bytes: of shared memory that the launch brings, beyond what the source declares.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    return _loaded(source, name, defines, index, shared_bytes)


def pointers(*tensors: torch.Tensor | None) -> tuple[int | None, ...]:
    """For the fields of an argument structure; None becomes a null pointer."""
    return tuple([None if t is None else t.data_ptr() for t in tensors])


@cache
def _loaded(
    source: str, name: str, defines: tuple[tuple[str, int], ...], index: int, shared_bytes: int
) -> Kernel:
    with torch.cuda.device(index):
        return Kernel(source, name, defines, shared_bytes, index)


@cache
def _programmatic(driver: Any) -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def _checked(result: tuple[Any, ...]) -> Any:
    status, *values = result
    if int(status) != 0:
        raise NybbleError(
            f"The CUDA driver refused a kernel ({status.name}): run nvidia-smi, and update the "
            "driver if its CUDA version is older than torch's."
        )
    return values[0] if values else None
