"""CUDA C++ to machine code by NVRTC, once: the result is kept in the user's cache."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import re
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from nybble.errors import ConfigError
from nybble.kernels.compiled import kernel_path, read_checked, write_checked

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"', re.MULTILINE)


def binding(name: str) -> Any:
    """A module of NVIDIA's cuda-bindings, imported only where a CUDA kernel is wanted."""
    try:
        return importlib.import_module(f"cuda.bindings.{name}")
    except ImportError as error:
        raise ConfigError(
            f"The CUDA kernels need NVIDIA's Python bindings ({error}): pip install cuda-bindings."
        ) from error


def cubin(source: str, defines: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """Machine code of the file `source` of this package for one compute capability."""
    # "a": with Hopper's own instructions (wgmma), which no other GPU has.
    arch = f"sm_{capability[0]}{capability[1]}{'a' if capability[0] == 9 else ''}"
    options = (f"--gpu-architecture={arch}", "--std=c++17", *_flags(defines))
    texts = _with_headers(source)
    key = hashlib.sha256(repr((texts, options, version())).encode()).hexdigest()
    path = kernel_path(f"{Path(source).stem}-{arch}-{key[:32]}.cubin")
    cached = read_checked(path)
    if cached is not None:
        return cached
    code = _compile(texts, options)
    try:
        write_checked(path, code)
    except OSError as error:
        warnings.warn(
            f"Compiled kernels cannot be kept ({error}), so every start compiles them again: "
            "set NYBBLE_CACHE to a folder that can be written.",
            stacklevel=2,
        )
    return code


def _flags(defines: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(f"-D{name}={value}" for name, value in sorted(defines.items()))


def _with_headers(source: str) -> dict[str, str]:
    """The texts of a source file and of all headers that it includes, itself first."""
    texts: dict[str, str] = {}
    names = [source]
    while names:
        name = names.pop()
        if name not in texts:
            texts[name] = Path(__file__).with_name(name).read_text("utf-8")
            names += _INCLUDE.findall(texts[name])
    return texts


def version() -> str:
    """Of NVRTC, with the package's own number, for a miscompiled kernel must not outlive it.

    ConfigError where it cannot be loaded.
    """
    nvrtc = binding("nvrtc")
    try:
        major, minor = _checked(nvrtc.nvrtcVersion())
    except RuntimeError as error:
        raise ConfigError(
            f"NVIDIA's compiler library NVRTC cannot be loaded ({error}): "
            "pip install nvidia-cuda-nvrtc."
        ) from error
    return f"{major}.{minor} {_package_version('nvidia-cuda-nvrtc')}"


@cache
def _package_version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a system's own
        return ""


def _compile(texts: dict[str, str], options: tuple[str, ...]) -> bytes:
    nvrtc = binding("nvrtc")
    (source, text), *headers = texts.items()
    program = _checked(
        nvrtc.nvrtcCreateProgram(
            text.encode(),
            source.encode(),
            len(headers),
            [header.encode() for _, header in headers],
            [name.encode() for name, _ in headers],
        )
    )
    try:
        flags = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(flags), flags)
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise ConfigError(_complaint(source, options, _log(program)))
        code = bytes(_checked(nvrtc.nvrtcGetCUBINSize(program)))  # filled by the next call
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
        return code
    finally:
        _checked(nvrtc.nvrtcDestroyProgram(program))


def _log(program: Any) -> str:
    nvrtc = binding("nvrtc")
    log = bytes(_checked(nvrtc.nvrtcGetProgramLogSize(program)))
    _checked(nvrtc.nvrtcGetProgramLog(program, log))
    return log.rstrip(b"\0 \n").decode("utf-8", "replace")


def _complaint(source: str, options: tuple[str, ...], log: str) -> str:
    return (
        f"NVRTC could not compile {source} with {' '.join(options)}:\n{log}\n"
        "Update cuda-bindings and nvidia-cuda-nvrtc to versions that know this GPU."
    )


def _checked(result: tuple[Any, ...]) -> Any:
    """The values of a binding's (status, *values), or an error where the status is not 0."""
    status, *values = result
    if int(status) != 0:
        raise ConfigError(f"NVRTC failed ({status.name}): reinstall nvidia-cuda-nvrtc.")
    return values[0] if len(values) == 1 else tuple(values)
