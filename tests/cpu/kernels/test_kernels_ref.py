"""The reference against formulas written a second time, in numpy and float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nybble.kernels import ref as reference
from nybble.kernels.ref import dequantize, quantize_dense, unpack


def dequantize_numpy(matrix) -> np.ndarray:
    words = matrix.words.numpy().view(np.uint32)
    out = np.zeros((matrix.rows, matrix.out_features))
    for k in range(matrix.rows):
        word, shift = divmod(k * matrix.bits, 32)
        code = (words[word] >> shift) & (2**matrix.bits - 1)
        group = k // matrix.group_size
        zero = 2 ** (matrix.bits - 1) if matrix.zeros is None else matrix.zeros[group].numpy()
        out[k] = matrix.scales[group].double().numpy() * (code.astype(np.float64) - zero)
    return out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(("inputs", "group_size"), [(64, 32), (100, 64), (40, 40), (33, 128)])
def test_dequantize(make_matrix, bits, asymmetric, inputs, group_size):
    matrix = make_matrix(inputs, 5, bits, group_size, asymmetric)
    np.testing.assert_allclose(dequantize(matrix).numpy(), dequantize_numpy(matrix), rtol=1e-6)


def test_act_order_takes_each_row_from_its_input(ref, make_matrix):
    matrix = make_matrix(50, 7, padding=14)
    x = torch.randn(3, 50)
    by_input = np.zeros((51, 7))
    for row, source in enumerate(matrix.perm.tolist()):
        by_input[source] += dequantize_numpy(matrix)[row]
    expected = x.double().numpy() @ by_input[:50]
    np.testing.assert_allclose(ref.quant_linear(matrix, None)(x).numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize(("bits", "step"), [(8, 127), (4, 7)])
def test_quantize_dense_is_within_half_a_step(bits, step, group_size):
    weight = torch.randn(9, 100) * torch.logspace(-7, 2, 9)[:, None]  # far below fp16's range too
    weight[4] = 0
    matrix = quantize_dense(weight, bits, group_size)
    error = (dequantize(matrix).t() - weight).abs()
    for first in range(0, 100, group_size):
        piece = slice(first, first + group_size)
        largest = weight[:, piece].abs().amax(1, keepdim=True)
        assert (error[:, piece] <= largest / step * 0.502).all()


def test_quantize_dense_gives_q8_0_back():
    """An embedding that came from 8-bit blocks of 32 survives up to fp16's rounding."""
    codes = torch.randint(-127, 128, (40, 4, 32)).float()
    codes[..., 0] = 127
    weight = (codes * (torch.rand(40, 4, 1) * 1e-3 + 1e-4)).flatten(1).half()
    matrix = quantize_dense(weight)
    assert torch.equal(unpack(matrix.words, 8, 128).t(), codes.flatten(1).int() + 128)
    # Three roundings to 11 bits: the weight, the block's largest weight, the scale.
    torch.testing.assert_close(dequantize(matrix).t(), weight.float(), rtol=3 * 2**-11, atol=1e-7)


def test_attention_in_slices_is_attention(ref, monkeypatch):
    q, keys, values = torch.randn(9, 4, 16), torch.randn(2, 20, 16), torch.randn(2, 20, 16)
    whole = ref.attend(q, keys, values, 0.25)
    monkeypatch.setattr(reference, "_SCORES", 4 * 20 * 2)  # two queries at a time
    assert torch.allclose(ref.attend(q, keys, values, 0.25), whole, atol=1e-6)
