"""The cache of compiled kernels, with a compiler that only counts."""

# ruff: noqa: N802, N815 (the names are those of NVIDIA's bindings)

from __future__ import annotations

import ctypes
import threading
from enum import IntEnum
from types import SimpleNamespace

import pytest

from nybble.errors import ConfigError
from nybble.kernels.cuda import compiler

HOPPER = (9, 0)


class Status(IntEnum):
    NVRTC_SUCCESS = 0
    NVRTC_ERROR_COMPILATION = 6


class CountingCompiler:
    """NVRTC's functions as cuda-bindings spells them; the code is the options in bytes."""

    nvrtcResult = Status

    def __init__(self, version=(13, 0), fails=False):
        self.version, self.fails, self.compiled = version, fails, []

    def nvrtcVersion(self):
        return (Status.NVRTC_SUCCESS, *self.version)

    def nvrtcCreateProgram(self, text, name, count, headers, names):
        assert count == len(headers) == len(names)
        return Status.NVRTC_SUCCESS, SimpleNamespace(text=text, options=b"")

    def nvrtcCompileProgram(self, program, count, options):
        self.compiled.append(options)
        program.options = b" ".join(options)
        return (Status.NVRTC_ERROR_COMPILATION if self.fails else Status.NVRTC_SUCCESS,)

    def nvrtcGetCUBINSize(self, program):
        return Status.NVRTC_SUCCESS, len(program.options)

    def nvrtcGetCUBIN(self, program, buffer):
        copy_into(buffer, program.options)
        return (Status.NVRTC_SUCCESS,)

    def nvrtcGetProgramLogSize(self, program):
        return Status.NVRTC_SUCCESS, 8

    def nvrtcGetProgramLog(self, program, buffer):
        copy_into(buffer, b"bad code")
        return (Status.NVRTC_SUCCESS,)

    def nvrtcDestroyProgram(self, program):
        return (Status.NVRTC_SUCCESS,)


def copy_into(buffer: bytes, data: bytes) -> None:
    """The bindings write into the bytes object that they are given."""
    header = bytes.__basicsize__ - 1
    ctypes.memmove(id(buffer) + header, data, len(data))


@pytest.fixture
def nvrtc(monkeypatch, tmp_path):
    fake = CountingCompiler()
    monkeypatch.setattr(compiler, "binding", lambda name: fake)
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path))
    return fake


def build(bits=4, capability=HOPPER):
    return compiler.cubin("gemm.cu", {"BITS": bits}, capability)


def test_compiled_once_for_each_shape_and_gpu(nvrtc):
    first = build()
    assert b"sm_90a" in first
    assert b"-DBITS=4" in first
    assert build() == first
    assert len(nvrtc.compiled) == 1
    assert build(bits=8) != first
    assert b"sm_86 " in build(capability=(8, 6))
    assert len(nvrtc.compiled) == 3
    nvrtc.version = (13, 1)
    build()
    assert len(nvrtc.compiled) == 4


def test_headers_are_found_through_headers():
    assert set(compiler._with_headers("gemm_hopper.cu")) == {
        "gemm_hopper.cu",
        "arranged.cuh",
        "wgmma.cuh",
        "fragment.cuh",
    }
    assert list(compiler._with_headers("read.cu")) == ["read.cu"]


@pytest.mark.parametrize("damage", [b"", b"short", b"x" * 400])
def test_a_damaged_file_is_built_again(nvrtc, tmp_path, damage):
    first = build()
    (path,) = (tmp_path / "kernels").iterdir()
    path.write_bytes(damage)
    assert build() == first
    assert len(nvrtc.compiled) == 2
    assert build() == first
    assert len(nvrtc.compiled) == 2


def test_many_at_once_leave_one_whole_file(nvrtc, tmp_path):
    results = []
    threads = [threading.Thread(target=lambda: results.append(build())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 8
    assert len(set(results)) == 1
    assert len(list((tmp_path / "kernels").iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_reported(nvrtc, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="set NYBBLE_CACHE"):
        assert build()


def test_a_compiler_error_shows_the_log(nvrtc):
    nvrtc.fails = True
    with pytest.raises(ConfigError, match=r"bad code\nUpdate"):
        build()


def test_missing_bindings_say_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(compiler.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="pip install cuda-bindings"):
        compiler.binding("nvrtc")
