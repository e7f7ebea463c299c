"""The GPTQ byte layout against a dozen lines of numpy that follow docs/gptq-format.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nybble.config import QuantConfig
from nybble.errors import CheckpointError
from nybble.kernels.matrix import QuantMatrix
from nybble.quant import gptq


def numpy_weights(tensors: dict[str, np.ndarray], bits: int, v1: bool) -> np.ndarray:
    """W (K, N), read bit by bit from the stored words."""
    pack, mask = 32 // bits, 2**bits - 1
    words, stored = tensors["qweight"].view(np.uint32), tensors["qzeros"].view(np.uint32)
    (rows, outputs), g_idx = (words.shape[0] * pack, words.shape[1]), tensors["g_idx"]
    weights = np.zeros((rows, outputs))
    for k in range(rows):
        for n in range(outputs):
            code = (int(words[k // pack, n]) >> (bits * (k % pack))) & mask
            zero = (int(stored[g_idx[k], n // pack]) >> (bits * (n % pack))) & mask
            zero = (zero + 1) & mask if v1 else zero
            weights[k, n] = float(tensors["scales"][g_idx[k], n]) * (code - zero)
    return weights


def matrix_weights(matrix: QuantMatrix) -> np.ndarray:
    """W (in_features, N) of a QuantMatrix, from its definition."""
    codes = gptq.unpack(matrix.words, matrix.bits)[: matrix.rows].double()
    group = torch.arange(matrix.rows) // matrix.group_size
    zeros = 2 ** (matrix.bits - 1) if matrix.zeros is None else matrix.zeros[group].double()
    weights = matrix.scales[group].double() * (codes - zeros)
    if matrix.perm is None:
        return weights.numpy()
    out = torch.zeros(matrix.in_features + 1, matrix.out_features, dtype=torch.float64)
    out[matrix.perm] = weights
    return out[:-1].numpy()


def make(bits, rows, outputs, group_size, sym, v1, g_idx=None, seed=0):
    rng = np.random.default_rng(seed)
    size = rows if group_size == -1 else min(group_size, rows)
    groups = -(-rows // size)
    g_idx = np.arange(rows) // size if g_idx is None else g_idx
    config = QuantConfig(bits, group_size, False, sym, "gptq" if v1 else "gptq_v2")
    zeros = rng.integers(0, 2**bits, (groups, outputs))
    zeros = np.full_like(zeros, 2 ** (bits - 1)) if sym else zeros
    tensors = gptq.write_tensors(
        torch.from_numpy(rng.integers(0, 2**bits, (rows, outputs)).astype(np.uint8)),
        torch.from_numpy(rng.normal(size=(groups, outputs))).to(torch.float16),
        torch.from_numpy(zeros.astype(np.uint8)),
        torch.from_numpy(g_idx),
        config,
    )
    return tensors, config


def read(tensors, config):
    return gptq.read_matrix(gptq.GptqTensors("layer", **tensors), config)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([4, 8]),
    words=st.integers(1, 12),
    outputs=st.integers(1, 5),
    group_size=st.sampled_from([8, 16, 32, 64, 128, -1]),
    sym=st.booleans(),
    v1=st.booleans(),
    act_order=st.sampled_from(["none", "shuffled", "any"]),
    seed=st.integers(0, 2**16),
)
def test_every_dialect_reads_as_numpy_reads_it(
    bits, words, outputs, group_size, sym, v1, act_order, seed
):
    rows, outputs = words * 8, outputs * 8
    size = rows if group_size == -1 else min(group_size, rows)
    rng = np.random.default_rng(seed)
    g_idx = np.arange(rows) // size
    if act_order == "shuffled":
        g_idx = rng.permutation(g_idx)
    if act_order == "any":
        g_idx = rng.integers(0, g_idx[-1] + 1, rows)
    tensors, config = make(bits, rows, outputs, group_size, sym, v1, g_idx, seed)
    expected = numpy_weights({k: v.numpy() for k, v in tensors.items()}, bits, v1)
    np.testing.assert_array_equal(matrix_weights(read(tensors, config)), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("truth", "label"), [(True, "gptq_v2"), (False, "gptq")])
def test_a_symmetric_file_is_believed_over_its_label(bits, truth, label):
    tensors, _ = make(bits, 64, 8, 32, sym=True, v1=truth)
    lying = QuantConfig(bits, 32, False, True, label)
    expected = numpy_weights({k: v.numpy() for k, v in tensors.items()}, bits, truth)
    np.testing.assert_array_equal(matrix_weights(read(tensors, lying)), expected)


def test_a_file_labelled_symmetric_that_is_not_keeps_its_zeros():
    tensors, config = make(4, 64, 8, 32, sym=False, v1=True)
    labelled = QuantConfig(4, 32, False, True, "gptq")
    np.testing.assert_array_equal(
        matrix_weights(read(tensors, labelled)), matrix_weights(read(tensors, config))
    )


def test_g_idx_may_be_absent():
    tensors, config = make(4, 64, 8, 32, sym=True, v1=True)
    expected = matrix_weights(read(tensors, config))
    del tensors["g_idx"]
    np.testing.assert_array_equal(matrix_weights(read(tensors, config)), expected)


def test_regular_act_order_costs_no_padding():
    g_idx = np.random.default_rng(0).permutation(np.arange(80) // 32)
    tensors, config = make(4, 80, 8, 32, sym=True, v1=True, g_idx=g_idx)
    assert read(tensors, config).rows == 80


@pytest.mark.parametrize("group_size", [8, 32, 128])
def test_a_group_of_all_inputs_is_refused(group_size):
    g_idx = np.zeros(1024, int)
    tensors, config = make(4, 1024, 8, group_size, sym=True, v1=True, g_idx=g_idx)
    with pytest.raises(CheckpointError, match=r"layer\.g_idx puts 1024 inputs into one group"):
        read(tensors, config)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([4, 8]), st.integers(1, 40), st.integers(1, 6), st.integers(0, 99))
def test_pack_and_unpack_are_inverse(bits, rows, cols, seed):
    rng = np.random.default_rng(seed)
    codes = torch.from_numpy(rng.integers(0, 2**bits, (rows, cols)).astype(np.uint8))
    assert torch.equal(gptq.unpack(gptq.pack(codes, bits), bits)[:rows], codes)


def test_concat_joins_outputs():
    parts = [read(*make(4, 64, 8 * n, 32, sym=n == 1, v1=True, seed=n)) for n in (1, 2, 3)]
    joined = gptq.concat(parts)
    expected = np.concatenate([matrix_weights(part) for part in parts], 1)
    np.testing.assert_array_equal(matrix_weights(joined), expected)


def test_concat_refuses_parts_that_differ():
    a = read(*make(4, 64, 8, 32, sym=True, v1=True))
    assert gptq.concat([a, read(*make(8, 64, 8, 32, sym=True, v1=True))]) is None
    shuffled = np.random.default_rng(1).permutation(np.arange(64) // 32)
    assert gptq.concat([a, read(*make(4, 64, 8, 32, True, True, shuffled))]) is None


FAULTS = {
    "qweight": lambda t: t.to(torch.int64),
    "qzeros": lambda t: t[:, :0],
    "scales": lambda t: t[:1],
    "g_idx": lambda t: t + 5,
}


@pytest.mark.parametrize("name", FAULTS)
def test_damaged_tensors_are_refused_by_name(name):
    tensors, config = make(4, 64, 8, 32, sym=True, v1=True)
    tensors[name] = FAULTS[name](tensors[name])
    with pytest.raises(CheckpointError, match=rf"layer\.{name}"):
        read(tensors, config)


def test_non_finite_scales_are_refused():
    tensors, config = make(4, 64, 8, 32, sym=True, v1=True)
    tensors["scales"][0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        read(tensors, config)
