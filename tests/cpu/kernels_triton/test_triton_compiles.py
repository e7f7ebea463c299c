"""The Triton kernel compiles for GPUs that are not here. In a process of its own: in the tests'
process kernels are interpreted."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="triton is not installed")

PROGRAM = """
import sys
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from nybble.kernels.cuda.triton_gemm import _gemm

activation, capability = sys.argv[1], int(sys.argv[2])
constants = dict(bits=4, asym=True, block_m=16, block_n=64, block_k=32)
pointers = dict(x=f"*{activation}", words="*i32", scales="*fp16", zeros="*u8", sums="*fp32")
signature = {
    name: "constexpr" if name in constants else pointers.get(name, "i32")
    for name in _gemm.arg_names
}
places = {(_gemm.arg_names.index(name),): value for name, value in constants.items()}
source = ASTSource(_gemm, signature, constexprs=places)
code = compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]
print(len(code))
"""


@pytest.mark.parametrize(("activation", "capability"), [("fp16", 75), ("bf16", 90)])
def test_compiles(activation, capability):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PROGRAM, activation, str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 1000
