"""The quantiser on a GPU finds what it finds on the CPU."""

from __future__ import annotations

import pytest
import torch

from nybble.checkpoint import Checkpoint
from nybble.config import QuantConfig
from nybble.gptq.bench import write_model
from nybble.gptq.run import RunOptions, quantize_checkpoint
from nybble.gptq.solver import SolverOptions, solve

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

INT4 = QuantConfig(bits=4, group_size=128, desc_act=False, sym=True)


@pytest.mark.parametrize("desc_act", [False, True])
def test_the_same_codes_in_double_precision(desc_act):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(600, 256, dtype=torch.float64, generator=generator)
    weight = torch.randn(256, 96, dtype=torch.float64, generator=generator)
    hessian = x.t() @ x
    quant = QuantConfig(4, 64, desc_act, True)
    here = solve(weight, hessian, quant, SolverOptions())
    there = solve(weight.cuda(), hessian.cuda(), quant, SolverOptions())
    assert (here.codes == there.codes.cpu()).double().mean() > 0.999
    assert there.error == pytest.approx(here.error, rel=1e-3)


def test_refitted_scales_and_sweeps_in_double_precision():
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(900, 200, dtype=torch.float64, generator=generator)  # a short last group
    weight = torch.randn(200, 70, dtype=torch.float64, generator=generator)
    hessian = x.t() @ x
    quant = QuantConfig(4, 64, False, False)
    here = solve(weight, hessian, quant, SolverOptions(sweeps=2))
    there = solve(weight.cuda(), hessian.cuda(), quant, SolverOptions(sweeps=2))
    assert (here.codes == there.codes.cpu()).double().mean() > 0.999
    assert there.error == pytest.approx(here.error, rel=1e-3)


def test_a_checkpoint_quantised_on_the_gpu(tmp_path):
    source = tmp_path / "model"
    write_model(source, hidden=256, intermediate=384, device="cpu")
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(0, 1024, (16, 128), generator=generator).tolist()
    errors = {}
    for device in ("cpu", "cuda"):
        target = tmp_path / device
        report = quantize_checkpoint(source, target, INT4, windows, RunOptions(device=device))
        errors[device] = [module.error for module in report.modules]
        assert len(Checkpoint.open(target)) > 0
    assert errors["cuda"] == pytest.approx(errors["cpu"], rel=0.1)


def test_offloading_changes_nothing(tmp_path):
    source = tmp_path / "model"
    write_model(source, hidden=256, intermediate=384, device="cpu")
    windows = [list(range(64)), list(range(100, 200))]
    written = []
    for offload in (False, True):
        target = tmp_path / str(offload)
        options = RunOptions(device="cuda", offload=offload)
        quantize_checkpoint(source, target, INT4, windows, options)
        written.append((target / "model.safetensors").read_bytes())
    assert written[0] == written[1]
