"""The CPU backend: checks tensors, allocates results, calls the C functions."""

from __future__ import annotations

import ctypes

import torch
import torch.nn.functional as F

from nybble.errors import CapacityError, ConfigError
from nybble.kernels.backend import Batch, Choice, KVLayer, LinearFn, Partial
from nybble.kernels.cpu import library
from nybble.kernels.cpu.pack import pack
from nybble.kernels.matrix import QuantMatrix
from nybble.kernels.ref import RefBackend, quantize_dense
from nybble.kernels.table import choose_kernel

DENSE_ROWS = 8  # rows of x up to which reading the 16-bit weights once is what counts
CHUNK_BYTES = 2**26  # widened weights held at once when a 16-bit matrix meets many rows


class CpuBackend(RefBackend):
    """fp32 activations in and out. What the C code does not take runs as in the reference."""

    def __init__(self, functions: library.Library) -> None:
        super().__init__()
        self.functions = functions
        self.name = f"cpu ({functions.isa})"

    @classmethod
    def load(cls, extra: tuple[str, ...] = ()) -> CpuBackend:
        """Compile on first use, `extra` flags last; compile.BuildError where that fails."""
        return cls(library.Library.load(extra))

    def choose(self, matrix: QuantMatrix) -> Choice:
        return choose_kernel("cpu", matrix)

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        dim = weight.shape[0]
        x, weight = _rows(x, dim), _dense(weight)
        out = torch.empty_like(x)
        self.functions.rms_norm(
            x.data_ptr(),
            weight.data_ptr(),
            library.KINDS[weight.dtype],
            eps,
            x.numel() // dim,
            dim,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        width = gate_up.shape[-1] // 2
        gate_up = _rows(gate_up, 2 * width)
        rows = gate_up.shape[0]
        out = torch.empty(rows, width)
        threads = torch.get_num_threads()
        self.functions.silu_mul(gate_up.data_ptr(), rows, width, out.data_ptr(), threads)
        return out

    def rope_store(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        layer: KVLayer,
        batch: Batch,
    ) -> torch.Tensor:
        tokens, heads, dim = q.shape
        if layer.quantized and dim % 16:
            return super().rope_store(q, k, v, cos, sin, layer, batch)
        q, k, v = _heads(q), _heads(k), _heads(v)
        cos, sin = _rows(cos, dim // 2), _rows(sin, dim // 2)
        cache = _cache(layer, dim)
        if k.shape != v.shape or k.shape != (tokens, layer.kv_heads, dim) or dim % 2:
            raise ConfigError("q, k and v differ in tokens or head_dim, or it is odd.")
        if not cos.shape[0] == sin.shape[0] == batch.slots.shape[0] == tokens:
            raise ConfigError("cos, sin and slots need one row a token each.")
        rotated = torch.empty(tokens, heads, dim)
        arguments = library.Rope(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            rotated.data_ptr(),
            batch.slots.data_ptr(),
            q.stride(0),
            k.stride(0),
            v.stride(0),
            tokens,
            heads,
            cache,
        )
        threads = torch.get_num_threads()
        return _checked(rotated, self.functions.rope_store(ctypes.addressof(arguments), threads))

    def attention(
        self,
        q: torch.Tensor,
        layer: KVLayer,
        batch: Batch,
        scale: float,
        reader: LinearFn | None = None,
    ) -> torch.Tensor:
        return self._attend_pages(q, layer, batch, scale)

    def partial_attention(
        self, q: torch.Tensor, layer: KVLayer, batch: Batch, scale: float, *, closed: bool
    ) -> Partial:
        lse = torch.empty(*q.shape[:2])
        return self._attend_pages(q, layer, batch, scale, lse, closed), lse

    def _attend_pages(
        self,
        q: torch.Tensor,
        layer: KVLayer,
        batch: Batch,
        scale: float,
        lse: torch.Tensor | None = None,
        closed: bool = False,
    ) -> torch.Tensor:
        """The logarithms of the sums go to `lse`, where that is given."""
        tokens, heads, dim = q.shape
        kv_heads = layer.kv_heads
        if heads % kv_heads:
            raise ConfigError(f"{heads} heads are no multiple of {kv_heads} K/V heads.")
        if dim % 16:
            out, exact = super().partial_attention(q, layer, batch, scale, closed=closed)
            if lse is not None:
                lse.copy_(exact)
            return out
        q, cache = _rows(q, dim), _cache(layer, dim)
        out = torch.empty(tokens, heads * dim)
        arguments = library.Attention(
            q.data_ptr(),
            out.data_ptr(),
            None if lse is None else lse.data_ptr(),
            batch.pages.data_ptr(),
            batch.starts.data_ptr(),
            batch.lengths.data_ptr(),
            tokens,
            batch.sequences,
            batch.pages.stride(0),
            batch.pages.shape[1],
            heads // kv_heads,
            cache,
            scale,
            closed,
        )
        status = self.functions.attention(ctypes.addressof(arguments), torch.get_num_threads())
        return _checked(out, status)

    def merge_attention(self, first: Partial, second: Partial) -> torch.Tensor:
        """In C, for torch's own rounding of a row changes with the number of rows."""
        (tokens, width), heads = first[0].shape, first[1].shape[1]
        (a, a_lse), (b, b_lse) = ((_rows(x, width), _rows(s, heads)) for x, s in (first, second))
        if not len(b) == len(a_lse) == len(b_lse) == tokens or width % heads:
            raise ConfigError("two parts of attention need the same rows, and a sum a head each.")
        out = torch.empty(tokens, width)
        self.functions.merge_attention(
            a.data_ptr(),
            a_lse.data_ptr(),
            b.data_ptr(),
            b_lse.data_ptr(),
            tokens * heads,
            width // heads,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out

    def quant_linear(self, matrix: QuantMatrix, bias: torch.Tensor | None) -> LinearFn:
        if self.choose(matrix).kernel == "ref":
            return super().quant_linear(matrix, bias)
        packed = pack(matrix, bias)
        inputs, outputs = matrix.in_features, matrix.out_features
        function, address = self.functions.quant_linear, ctypes.addressof(packed.structure)

        def linear(x: torch.Tensor, owner: object = packed) -> torch.Tensor:
            x = _rows(x, inputs)
            rows = x.shape[0]
            out = torch.empty(rows, outputs)
            threads = torch.get_num_threads()
            if not rows:
                return out
            return _checked(out, function(address, x.data_ptr(), rows, out.data_ptr(), threads))

        return linear

    def dense_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> LinearFn:
        weight = _dense(weight)
        wide_bias = None if bias is None else bias.detach().float().contiguous()
        if weight.dtype == torch.float32:
            return lambda x: F.linear(_rows(x, weight.shape[1]), weight, wide_bias)
        outputs, inputs = weight.shape
        structure = library.Dense(
            weight.data_ptr(),
            None if wide_bias is None else wide_bias.data_ptr(),
            inputs,
            outputs,
            library.KINDS[weight.dtype],
        )

        def linear(x: torch.Tensor) -> torch.Tensor:
            x = _rows(x, inputs)
            if x.shape[0] > DENSE_ROWS:
                return _many_rows(x, weight, wide_bias)
            out = torch.empty(x.shape[0], outputs)
            self.functions.dense_linear(
                ctypes.addressof(structure),
                x.data_ptr(),
                x.shape[0],
                out.data_ptr(),
                torch.get_num_threads(),
            )
            return out

        return linear

    def head_linear(self, weight: torch.Tensor, exact: bool = False) -> LinearFn:
        """16-bit weights in 8 bits per group of 32, which halves the largest read of a step."""
        if exact or weight.dtype == torch.float32:
            return self.dense_linear(weight, None)
        return self.quant_linear(quantize_dense(weight), None)


def _many_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Weights widened to fp32 piece by piece: exact, and the memory stays bounded."""
    out = torch.empty(x.shape[0], weight.shape[0])
    step = max(1, CHUNK_BYTES // (4 * weight.shape[1]))
    for first in range(0, weight.shape[0], step):
        piece = slice(first, first + step)
        out[:, piece] = x @ weight[piece].float().t()
    return out if bias is None else out.add_(bias)


def _rows(x: torch.Tensor, width: int) -> torch.Tensor:
    """x as the C code reads it: on the CPU, fp32, dense, rows of `width`."""
    if x.shape[-1] != width or not x.is_cpu:
        raise ConfigError(
            f"a tensor of shape {tuple(x.shape)} on {x.device} came where rows of {width} on "
            "the CPU belong: check the model's config against its weights."
        )
    if x.dtype is not torch.float32:
        x = x.float()
    return x if x.is_contiguous() else x.contiguous()


def _heads(x: torch.Tensor) -> torch.Tensor:
    """(tokens, heads, head_dim), fp32, with dense heads; only the token stride is free."""
    if x.dtype is torch.float32 and x.is_cpu and x.stride(2) == 1 and x.stride(1) == x.shape[2]:
        return x
    return _rows(x, x.shape[2])


def _dense(weight: torch.Tensor) -> torch.Tensor:
    """A weight of a dtype and layout that the C code reads."""
    if weight.dtype not in library.KINDS or not weight.is_cpu:
        raise ConfigError(
            f"weights in {weight.dtype} on {weight.device} cannot run on the CPU kernels: "
            "convert them to float32, float16 or bfloat16 on the CPU."
        )
    return weight if weight.is_contiguous() else weight.contiguous()


def _cache(layer: KVLayer, dim: int) -> library.Cache:
    """A layer as the C code sees it; its own checks are done where it is made."""
    keys, (pages, kv_heads, page_size, _) = layer.keys, layer.keys.shape
    if layer.head_dim != dim or not keys.is_cpu:
        raise ConfigError(
            f"a cache of heads of {layer.head_dim} on {keys.device} does not fit heads of {dim} "
            "on the CPU: make it for this model."
        )
    key_scales, value_scales = layer.key_scales, layer.value_scales
    return library.Cache(
        keys.data_ptr(),
        layer.values.data_ptr(),
        None if key_scales is None else key_scales.data_ptr(),
        None if value_scales is None else value_scales.data_ptr(),
        pages,
        kv_heads,
        page_size,
        dim,
        library.CACHE_KINDS[layer.kind],
    )


def _checked(out: torch.Tensor, status: int) -> torch.Tensor:
    if status == 0:
        return out
    if status == library.NO_SUCH_SLOT:
        raise CapacityError("a page of the batch is not in the cache: enlarge the cache.")
    if status == library.BAD_BATCH:
        raise ConfigError("starts and lengths do not fit: every query needs its own row and key.")
    raise CapacityError("the memory ran out: close other programs or shorten the prompt.")
