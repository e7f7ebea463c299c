"""Which kernels run: the table, the compiler's absence, a damaged cache, two builders at once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from nybble.errors import ConfigError
from nybble.kernels import choose_backend, select_backend
from nybble.kernels.cpu import compile
from nybble.kernels.table import choose_kernel
from nybble.kernels.torch_cpu import TorchBackend

LOAD = "from nybble.kernels.cpu.library import Library; print(Library.load().isa)"


@pytest.fixture
def quick_compiler(tmp_path, monkeypatch):
    """The real compiler without optimisation, in a fresh cache; it counts the kernels it builds."""
    real, log, wrapper = shutil.which("cc"), tmp_path / "calls", tmp_path / "cc"
    count = f'case "$*" in *matmul.c*) echo called >> "{log}";; esac'
    wrapper.write_text(f'#!/bin/sh\n{count}\nexec {real} "$@" -O0\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CC", str(wrapper))
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    return lambda: len(log.read_text().split()) if log.exists() else 0


def cached(tmp_path):
    return sorted((tmp_path / "cache" / "kernels").iterdir())


def load_in_new_process() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", LOAD], stdout=subprocess.PIPE, text=True)


def test_the_fastest_kernels_are_chosen():
    backend, choice = choose_backend("cpu")
    assert backend.name == str(choice)
    assert backend.name.startswith("cpu (")
    assert (backend.device, backend.dtype) == (torch.device("cpu"), torch.float32)


def test_exact_means_the_reference():
    assert select_backend("cpu", exact=True).name == "ref"
    assert select_backend("cpu", prefer="torch").name == "torch"


def test_an_unknown_preference_is_refused():
    with pytest.raises(ConfigError, match="cpu, torch, ref"):
        select_backend("cpu", prefer="fast")
    with pytest.raises(ConfigError, match="no kernels for meta"):
        select_backend("meta")


def test_without_a_compiler_torch_runs_and_says_why(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    backend, choice = choose_backend("cpu")
    assert backend.name == choice.kernel == "torch"
    assert "no C compiler" in choice.refused[0]
    assert "apt install gcc" in str(choice)
    with pytest.raises(ConfigError, match="no C compiler"):
        select_backend("cpu", prefer="cpu")


@pytest.mark.parametrize(
    "script", ["echo no such target >&2; exit 1", "exit 0", "exec sleep 0 >&-"]
)
def test_a_broken_compiler_falls_back(monkeypatch, tmp_path, script):
    compiler = tmp_path / "cc"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    backend, choice = choose_backend("cpu")
    assert backend.name == "torch"
    assert str(compiler) in choice.refused[0]
    assert not (tmp_path / "cache").exists()


def test_a_compiler_without_openmp_still_builds(monkeypatch, tmp_path):
    real, compiler = shutil.which("cc"), tmp_path / "cc"
    compiler.write_text(
        '#!/bin/sh\nfor a; do [ "$a" = -fopenmp ] && exit 1; done\n' + f'exec {real} "$@" -O0\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path / "cache"))
    backend = select_backend("cpu", prefer="cpu")
    assert backend.name.endswith("one thread)")
    weight, x = torch.randn(5, 64).half(), torch.randn(2, 64)
    torch.testing.assert_close(backend.dense_linear(weight, None)(x), x @ weight.float().t())


def test_the_cache_is_used_and_a_damaged_one_rebuilt(quick_compiler, tmp_path):
    compile.load()
    compile.load()
    assert quick_compiler() == 1
    (path,) = cached(tmp_path)
    whole = path.read_bytes()
    for damage in (whole[:1000], b"", whole[:5000] + b"\0" + whole[5001:], whole + b"x"):
        path.unlink()  # a mapped file must not change under its users
        path.write_bytes(damage)
        calls = quick_compiler()
        compile.load()
        assert quick_compiler() == calls + 1
        assert cached(tmp_path) == [path]


def test_two_builders_at_once(quick_compiler, tmp_path):
    processes = [load_in_new_process() for _ in range(2)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert outputs[0] == outputs[1] != ""
    assert [process.returncode for process in processes] == [0, 0]
    assert [path.suffix for path in cached(tmp_path)] == [".so"]


def test_an_unwritable_cache_costs_only_the_compilation(quick_compiler, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    compile.load()
    assert quick_compiler() == 1


def test_other_flags_are_another_object(quick_compiler, tmp_path):
    compile.load()
    compile.load(("-DNYBBLE_PORTABLE",))
    assert len(cached(tmp_path)) == 2


def test_cc_may_carry_arguments(monkeypatch):
    monkeypatch.setenv("CC", f"{shutil.which('env')} -u LANG cc")
    assert compile.find_compiler()[1:] == ["-u", "LANG", "cc"]
    monkeypatch.setenv("CC", "/no/such/compiler")
    with pytest.raises(compile.BuildError, match="/no/such/compiler"):
        compile.find_compiler()


def test_refusals_are_kept(make_matrix):
    choice = choose_kernel("torch", make_matrix(64, 40, group_size=48))
    assert choice.kernel == "torch-dequantise"
    assert choice.refused == ("torch-int4pack: group size 48",)
    assert "8 bits" in choose_kernel("torch", make_matrix(64, 32, bits=8)).refused[0]
    assert "40 outputs" in choose_kernel("torch", make_matrix(64, 40)).refused[0]
    assert "is short" in choose_kernel("torch", make_matrix(100, 48)).refused[0]
    with pytest.raises(ConfigError, match="no kernel"):
        choose_kernel("none", make_matrix(64, 32))


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(
    "shape",
    [
        {"inputs": 128, "outputs": 48},
        {"inputs": 128, "outputs": 48, "group_size": 64, "asymmetric": True},
        {"inputs": 120, "outputs": 48, "padding": 8},
        {"inputs": 100, "outputs": 33, "bits": 8},
    ],
    ids=str,
)
def test_torch_kernels_equal_the_reference(ref, make_matrix, shape, rows):
    matrix, bias = make_matrix(**shape), torch.randn(shape["outputs"])
    x = torch.randn(rows, shape["inputs"])
    got = TorchBackend().quant_linear(matrix, bias)(x)
    expected = ref.quant_linear(matrix, bias)(x)
    assert (got - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("tokens", [1, 7, 20])
def test_torch_attention_and_dense_equal_the_reference(ref, tokens):
    backend = TorchBackend()
    q, (keys, values) = torch.randn(tokens, 4, 24), torch.randn(2, 2, 20, 24)
    got = backend.attend(q, keys, values, 0.2)
    torch.testing.assert_close(got, ref.attend(q, keys, values, 0.2))
    weight, bias = torch.randn(6, 96), torch.randn(6)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 0.2)):
        linear = backend.dense_linear(weight.to(dtype), bias)
        expected = ref.dense_linear(weight.to(dtype), bias)(q.flatten(1))
        torch.testing.assert_close(linear(q.flatten(1)), expected, atol=tolerance, rtol=1e-2)


def test_the_objects_are_loaded_beside_torchs_openmp():
    """Two OpenMP runtimes would keep two pools of spinning threads."""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("no /proc")
    select_backend("cpu", prefer="cpu")
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line}
    assert len(runtimes) <= 1


def test_a_compiler_that_failed_once_is_asked_again(tmp_path, monkeypatch):
    """Nothing lesser that it made meanwhile is taken for good."""
    real, built = compile._run, []

    def failing_once(command):
        if not any(part.endswith("matmul.c") for part in command):
            return real(command)
        built.append(command)
        return "out of memory" if len(built) == 1 else real(command)

    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path))
    monkeypatch.setattr(compile, "_run", failing_once)
    for count in (2, 3, 3):
        compile.load()
        assert len(built) == count


def test_flags_that_a_compiler_lacks_cost_little(tmp_path, monkeypatch):
    """Known from an empty file, at every start: no kernels are built to find it out."""
    real, built = compile._run, []

    def without_openmp(command):
        built.append(any(part.endswith("matmul.c") for part in command))
        return "no omp.h" if "-fopenmp" in command else real(command)

    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path))
    monkeypatch.setattr(compile, "_run", without_openmp)
    compile.load()
    assert built == [False, False, True]
    compile.load()
    assert built == [False, False, True, False]


def test_a_cache_without_hard_links_is_used(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("no hard links here")

    monkeypatch.setenv("NYBBLE_CACHE", str(tmp_path))
    monkeypatch.setattr("os.link", refused)
    compile.load()
    assert [path.suffix for path in (tmp_path / "kernels").iterdir()] == [".so"]
