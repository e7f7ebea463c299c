"""The packed order, read back lane by lane as the kernels read it, against the plain matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nybble.errors import ConfigError
from nybble.kernels import ref
from nybble.kernels.cuda.packing import PackedMatrix, pack
from nybble.kernels.cuda.samples import random_matrix

# (output + 8, input of the quad) of each nibble, least first; of each byte of both words.
NIBBLES = ((0, 0), (1, 0), (0, 2), (1, 2), (0, 1), (1, 1), (0, 3), (1, 3))
BYTES = ((0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (1, 3))


def read_back(packed: PackedMatrix) -> np.ndarray:
    """Codes (rows, tiles * 16) in the packed outputs' order."""
    tiles, pieces = packed.tiles, packed.pieces
    words = packed.words.numpy().view(np.uint32).reshape(tiles, pieces, -1, 32, 4)
    codes = np.zeros((packed.rows, tiles * 16), dtype=np.int64)
    per_step = packed.bits // 4
    for lane in range(32):
        g, t = divmod(lane, 4)
        lane_words = np.concatenate([words[:, :, v, lane] for v in range(words.shape[2])], axis=2)
        for step in range(4):
            quad = lane_words[:, :, step * per_step : (step + 1) * per_step]
            for place, (upper, k) in enumerate(NIBBLES if packed.bits == 4 else BYTES):
                word, shift = divmod(place * packed.bits, 32)
                value = (quad[:, :, word] >> shift) & (2**packed.bits - 1)  # (tiles, pieces)
                first = 32 * (step // 2) + 8 * t + 4 * (step % 2) + k
                codes[first::64, g + 8 * upper :: 16] = value.T
    return codes


def outputs_of(packed: PackedMatrix) -> np.ndarray:
    """Where each output of the matrix stands in the packed order."""
    if not packed.paired:
        return np.arange(packed.out_features)
    half = np.arange(packed.out_features // 2)
    gate = half // 8 * 16 + half % 8
    return np.concatenate((gate, gate + 8))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 16), (128, 26), (200, 100)])
def test_codes_and_groups(inputs, outputs, bits, paired):
    random = torch.Generator().manual_seed(1)
    matrix = random_matrix(
        inputs, outputs, bits=bits, group_size=32, symmetric=False, random=random
    )
    packed = pack(matrix, paired=paired)
    places = outputs_of(packed)
    want = ref.unpack(matrix.words, bits, inputs).numpy()
    assert np.array_equal(read_back(packed)[:inputs, places], want)
    assert packed.zeros is not None
    for got, plain in ((packed.scales, matrix.scales), (packed.zeros, matrix.zeros)):
        rows = got.permute(1, 0, 3, 2).flatten(1).numpy()  # (groups, outputs in packed order)
        assert np.array_equal(rows[: plain.shape[0], places], plain.numpy())
        padding = np.delete(rows, places, axis=1)
        assert not padding.any()


def test_gather_index_covers_padding():
    random = torch.Generator().manual_seed(2)
    packed = pack(random_matrix(100, 16, group_size=32, random=random))
    assert packed.gather is not None
    assert packed.gather.tolist() == [*range(100), *[-1] * 28]
    assert pack(random_matrix(128, 16, random=random)).gather is None


def test_refusals_say_what_to_do():
    random = torch.Generator().manual_seed(3)
    with pytest.raises(ConfigError, match=r"group size 48.*choose another kernel"):
        pack(random_matrix(96, 16, group_size=48, random=random))
    with pytest.raises(ConfigError, match="pack them separately"):
        pack(random_matrix(64, 15, random=random), paired=True)
