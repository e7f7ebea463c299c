"""The solver against plain fp64 references that treat one input at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.config import QuantConfig
from nybble.errors import ConfigError, NumericsError
from nybble.gptq import solver
from nybble.gptq.grid import search_grid
from nybble.gptq.solver import SolverOptions, corrected_target, solve

NAN = float("nan")
PLAIN = SolverOptions(act_order=False, sweeps=0)


def problem(inputs, outputs, seed, tokens=400):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = random(tokens, inputs) @ random(inputs, inputs) * (0.1 + random(inputs).exp())
    return random(inputs, outputs) * 0.1, x.t() @ x


def reference_gptq(weight, hessian, order, scales, zeros, top, damp):
    """Frantar et al. 2022, algorithm 1 without blocks: weight (K, N), scales and zeros per row."""
    w, h = weight.numpy().copy(), hessian.numpy().copy()
    h[np.diag_indices_from(h)] += damp * np.diag(h).mean()
    w, h = w[order], h[np.ix_(order, order)]
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    codes = np.zeros_like(w)
    for k in range(len(w)):
        scale, zero = scales[order[k]], zeros[order[k]]
        codes[k] = np.clip(np.round(w[k] / scale + zero), 0, top)
        error = (w[k] - scale * (codes[k] - zero)) / upper[k, k]
        w[k:] -= np.outer(upper[k, k:], error)
    result = np.empty_like(codes)
    result[order] = codes
    return result


def rows_of(solution):
    scales = solution.scales.double()[solution.g_idx].numpy()
    return scales, solution.zeros.double()[solution.g_idx].numpy()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("inputs", "group_size"), [(96, 32), (128, 64), (256, 128), (80, 32), (72, -1)]
)
@pytest.mark.parametrize("mode", ["given order", "act_order", "desc_act"])
def test_the_codes_are_those_of_the_published_algorithm(bits, sym, inputs, group_size, mode):
    weight, hessian = problem(inputs, 48, seed=inputs + bits)
    config = QuantConfig(bits, group_size, mode == "desc_act", sym)
    solution = solve(
        weight, hessian, config, SolverOptions(act_order=mode != "given order", sweeps=0)
    )
    diagonal = hessian.diagonal().numpy()
    order = np.argsort(-diagonal) if mode != "given order" else np.arange(inputs)
    scales, zeros = rows_of(solution)
    expected = reference_gptq(weight, hessian, order, scales, zeros, 2**bits - 1, 0.01)
    assert np.array_equal(solution.codes.numpy(), expected)


def test_single_precision_differs_at_near_ties_only():
    weight, hessian = problem(256, 64, seed=5)
    config = QuantConfig(4, 64, False, True)
    wide = solve(weight, hessian, config, PLAIN)
    narrow = solve(weight.float(), hessian.float(), config, PLAIN)
    assert (wide.codes == narrow.codes).float().mean() > 0.99
    assert narrow.error == pytest.approx(wide.error, rel=0.02)


def test_a_sweep_moves_every_code_to_its_best_value():
    """Coordinate descent, written out: the quadratic form in one code at a time."""
    weight, hessian = problem(48, 5, seed=3)
    config = QuantConfig(4, 16, False, False)
    start = solve(weight, hessian, config, PLAIN)
    scales, zeros = rows_of(start)
    h, w, codes = hessian.numpy(), weight.numpy(), start.codes.double().numpy()
    expected = codes.copy()
    for n in range(w.shape[1]):
        for k in range(w.shape[0]):
            trials = np.tile(expected[:, n], (16, 1))
            trials[:, k] = np.arange(16)
            errors = w[:, n] - scales[:, n] * (trials - zeros[:, n])
            expected[k, n] = np.einsum("ik,kl,il->i", errors, h, errors).argmin()
    errors = weight - torch.from_numpy(scales * (codes - zeros))
    scales, zeros = torch.from_numpy(scales), torch.from_numpy(zeros)
    feedback = solver.descent_feedback(hessian)
    rows = torch.arange(48)  # each row as a group of its own
    found = solver.round_with_feedback(weight, feedback, errors, scales, zeros, rows, 15)
    assert not np.array_equal(codes, expected)
    assert np.array_equal(found.numpy(), expected)
    assert torch.allclose(errors, weight - scales * (found - zeros))


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("desc_act", [True, False])
def test_every_refinement_lowers_the_error(sym, desc_act):
    weight, hessian = problem(256, 32, seed=11)
    config = QuantConfig(4, 64, desc_act, sym)
    errors = [
        solve(weight, hessian, config, SolverOptions(sweeps=sweeps)).error for sweeps in (0, 1, 3)
    ]
    assert errors[0] > errors[1] > errors[2]


def test_scales_fitted_some_outputs_at_a_time_are_the_same(monkeypatch):
    weight, hessian = problem(96, 40, seed=2)
    config = QuantConfig(4, 32, False, True)
    whole = solve(weight, hessian, config)
    fit, widths = solver._fit, []

    def watched(hessian, levels, goal):
        widths.append(levels.shape[1])
        return fit(hessian, levels, goal)

    monkeypatch.setattr(solver, "_fit", watched)
    monkeypatch.setattr(solver, "_GRAM_NUMBERS", 16 * 3**2)
    parts = solve(weight, hessian, config)
    assert widths == [16, 16, 8] * 2
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.scales, whole.scales)


def test_the_reported_error_is_that_of_the_outputs():
    weight, _ = problem(64, 8, seed=2)
    x = torch.randn(200, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solution = solve(weight, x.t() @ x, QuantConfig(4, 32, False, True))
    wrong = x @ (weight - solution.dequantize().double())
    expected = (wrong.square().sum() / (x @ weight).square().sum()).item()
    assert solution.error == pytest.approx(expected, rel=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, -1]),
    sym=st.booleans(),
    desc_act=st.booleans(),
)
def test_a_matrix_on_the_grid_comes_back_unchanged(seed, bits, group_size, sym, desc_act):
    _, hessian = problem(64, 8, seed)
    config = QuantConfig(bits, group_size, desc_act, sym)
    generator = torch.Generator().manual_seed(seed)
    top, zero = 2**bits - 1, 2 ** (bits - 1)
    codes = torch.randint(0, top + 1, (64, 8), generator=generator)
    scales = (torch.rand(64, 8, generator=generator) + 0.5).half().double() / 64
    order = torch.argsort(solver.damp(hessian, 0.01).diagonal(), descending=True, stable=True)
    g_idx = solver._groups(order, config)
    for group in range(int(g_idx.max()) + 1):
        rows = torch.nonzero(g_idx == group).flatten()
        codes[rows[0]], codes[rows[1]] = 0, top
    weight = scales[g_idx] * (codes - zero)
    solution = solve(weight, hessian, config)
    assert torch.equal(solution.dequantize(), weight.float())
    assert solution.error < 1e-12


def test_the_scale_search_weighs_rows():
    group = torch.tensor([[0.9], [0.11], [0.23], [-0.31]], dtype=torch.float64)
    config = QuantConfig(4, -1, False, True)
    small = search_grid(group, torch.tensor([1e-6, 1, 1, 1]).double(), config)[0].abs()
    large = search_grid(group, torch.tensor([1e6, 1, 1, 1]).double(), config)[0].abs()
    assert small < 0.6 * large


def test_the_grid_is_no_worse_than_min_max():
    weight, _ = problem(64, 200, seed=9)
    for sym in (True, False):
        config = QuantConfig(4, -1, False, sym)
        scale, zero = search_grid(weight, torch.ones(64).double(), config)
        found = weight - scale * ((weight / scale + zero).round().clamp(0, 15) - zero)
        low, high = weight.amin(0), weight.amax(0)
        plain = 2 * weight.abs().amax(0) / 15 if sym else (high - low) / 15
        origin = 8.0 if sym else (-low / plain).round()
        minmax = weight - plain * ((weight / plain + origin).round().clamp(0, 15) - origin)
        assert (found.square().sum(0) <= minmax.square().sum(0) * 1.001).all()


def test_the_corrected_target_repairs_what_the_inputs_lost():
    """q V = x W + r has an exact solution here, so least squares must find it."""
    generator = torch.Generator().manual_seed(4)
    x, r = (torch.randn(300, k, dtype=torch.float64, generator=generator) for k in (24, 6))
    mixing = torch.randn(24, 24, dtype=torch.float64, generator=generator)
    weight = torch.randn(24, 6, dtype=torch.float64, generator=generator)
    q = x @ mixing
    r = q @ torch.randn(24, 6, dtype=torch.float64, generator=generator)
    shift = q.t() @ ((x - q) @ weight + r)
    target = corrected_target(weight, q.t() @ q, shift, SolverOptions(damp=1e-12))
    assert torch.allclose(q @ target, x @ weight + r, atol=1e-6)


def test_dead_inputs_are_rounded_to_nearest():
    weight, hessian = problem(64, 8, seed=1)
    hessian[7], hessian[:, 7] = 0, 0
    solution = solve(weight, hessian, QuantConfig(4, 32, False, True))
    step = solution.scales[0].abs().double()
    assert ((solution.dequantize()[7] - weight[7]).abs() <= step * 1.5).all()
    assert torch.equal(
        solve(weight, torch.zeros_like(hessian), QuantConfig(4, 32, False, True)).codes,
        solve(weight, torch.eye(64).double(), QuantConfig(4, 32, False, True)).codes,
    )


@pytest.mark.parametrize(("bits", "sym"), [(4, True), (8, True), (8, False)])
def test_small_weights_lose_no_more_than_large_ones(bits, sym):
    """Their scales are fp16 numbers too, below the smallest that is normal."""
    weight, hessian = problem(64, 16, seed=1)
    config = QuantConfig(bits, 32, False, sym)
    wanted = solve(weight, hessian, config).error
    assert solve(weight * 2**bits / 2**14, hessian, config).error < 1.2 * wanted


def test_constant_and_zero_rows():
    weight, hessian = problem(64, 4, seed=1)
    weight[:, 0], weight[:, 1] = 0, 0.25
    solution = solve(weight, hessian, QuantConfig(4, 32, False, True))
    assert torch.equal(solution.dequantize()[:, 0], torch.zeros(64))
    assert torch.allclose(solution.dequantize()[:, 1], torch.full((64,), 0.25), rtol=1e-3)


def test_a_singular_hessian_is_damped_until_it_works():
    weight, _ = problem(64, 4, seed=1)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    hessian = x.t() @ x  # rank 3
    hessian -= 0.05 * hessian.diagonal().mean() * torch.eye(64)  # and not positive either
    config = QuantConfig(4, 32, False, True)
    assert solve(weight, hessian, config, SolverOptions(damp=1e-9)).error < 1


def test_what_no_damping_repairs_is_refused():
    weight, hessian = problem(32, 4, seed=1)
    hessian[0, 1] = hessian[1, 0] = 1e9
    with pytest.raises(NumericsError, match="positive definite"):
        solve(weight, hessian, QuantConfig(4, 32, False, True))


@pytest.mark.parametrize(
    "options", [{"damp": 0}, {"damp": -1}, {"damp": 2}, {"damp": NAN}, {"sweeps": -1}]
)
def test_senseless_options_are_refused(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        SolverOptions(**options)


@pytest.mark.parametrize("value", [NAN, float("inf")])
@pytest.mark.parametrize("where", ["weight", "calibration inputs"])
def test_values_that_are_not_finite_are_refused_by_name(value, where):
    weight, hessian = problem(32, 4, seed=1)
    (weight if where == "weight" else hessian)[1, 1] = value
    with pytest.raises(NumericsError, match=where):
        solve(weight, hessian, QuantConfig(4, 32, False, True))
