"""The card's speed-and-memory table for this machine: prefill, decode, memory, beside the floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from nybble.bench.shapes import random_decoder, shape
from nybble.cache.sizes import PAGE_SIZE, bytes_per_token, cache_bytes
from nybble.cache.store import KVStore
from nybble.config import ModelConfig
from nybble.engine.decode_graph import DecodeGraph, bucket
from nybble.errors import CapacityError, ConfigError
from nybble.kernels import select_backend
from nybble.kernels.backend import Batch
from nybble.model.decoder import Decoder, Step
from nybble.model.rope import make_positions

_CHUNK = 8192
# A graph shares out its work by the longest context it may see: one a doubling keeps that close.
_SHORTEST_BUCKET = 1024
# What prefill and the libraries need beside weights and cache.
_WORKSPACE = 3 << 30


@dataclass(frozen=True)
class Plan:
    """One row to measure: `batch` sequences of `context` tokens each, then `new_tokens` more."""

    context: int
    batch: int = 1
    kv: str = "auto"


@dataclass(frozen=True)
class Row:
    """What was measured. Rates are tokens a second, all sequences together.

    overall_rate: generated tokens over prefill and decode time, the card's "speed". bandwidth
    (GB/s) counts weights and cached keys and values once a step; floor_rate is the decode rate
    at which that would run at the read ceiling. peak_memory in GB.
    """

    context: int
    batch: int
    kv: str
    first_token_seconds: float
    prefill_rate: float
    decode_rate: float
    overall_rate: float
    bandwidth: float
    floor_rate: float
    of_floor: float
    peak_memory: float


@dataclass(frozen=True)
class Run:
    """A table and what it was measured on; ceilings in bytes and operations a second."""

    model: str
    device: str
    read_ceiling: float
    matmul_ceiling: float
    weight_bytes: float
    new_tokens: int
    rows: list[Row] = field(default_factory=list)


def weight_bytes(config: ModelConfig) -> float:
    """Bytes that a decoded token reads: 4- or 8-bit blocks with their scales, a 16-bit head."""
    c = config
    matrices = c.hidden_size * (2 * c.q_size + 2 * c.kv_size + 3 * c.intermediate_size)
    bits: float = 16
    if c.quant is not None:
        size = c.hidden_size if c.quant.group_size == -1 else c.quant.group_size
        bits = c.quant.bits + 16 / size
    return c.num_layers * matrices * bits / 8 + 2 * c.vocab_size * c.hidden_size


def measure(decoder: Decoder, plan: Plan, new_tokens: int, ceiling: float) -> Row:
    """Prefill random ids, decode greedily in CUDA graphs, one token back to the host a step."""
    session = _Session(decoder, plan, new_tokens)
    torch.cuda.reset_peak_memory_stats()
    session.warm_up()
    first = session.prefill()
    seconds = session.decode(new_tokens - 1)
    generated, steps = plan.batch * new_tokens, new_tokens - 1
    per_token = bytes_per_token(decoder.config, plan.kv)
    cached = plan.batch * per_token * (plan.context + new_tokens / 2)
    step_bytes = weight_bytes(decoder.config) + cached
    decode_rate = plan.batch * steps / seconds
    floor_rate = plan.batch * ceiling / step_bytes
    return Row(
        context=plan.context,
        batch=plan.batch,
        kv=plan.kv,
        first_token_seconds=first,
        prefill_rate=plan.batch * plan.context / first,
        decode_rate=decode_rate,
        overall_rate=generated / (first + seconds),
        bandwidth=step_bytes * steps / seconds / 1e9,
        floor_rate=floor_rate,
        of_floor=decode_rate / floor_rate,
        peak_memory=torch.cuda.max_memory_allocated() / 1e9,
    )


def prefill_seconds(decoder: Decoder, plan: Plan, repeats: int) -> list[float]:
    """Seconds to the first token, so many times in a row, kernels being warm."""
    session = _Session(decoder, plan, new_tokens=1)
    session.prefill()
    return [session.prefill() for _ in range(repeats)]


def run(
    name: str,
    plans: Sequence[Plan],
    new_tokens: int,
    note: Callable[[str], None],
    *,
    host_embedding: bool = False,
) -> Run:
    """Load random weights of the shape `name` on the GPU and measure every row.

    A plan of kv "auto" takes the finest cache that fits. `note` is told what goes on.
    Raises ConfigError without a GPU, CapacityError where a row does not fit.
    """
    config = shape(name)
    if not torch.cuda.is_available():
        raise ConfigError("nybble bench speed needs an NVIDIA GPU: run make bench-cpu for the CPU.")
    from nybble.kernels.cuda.bench import read_ceiling

    device = torch.device("cuda", torch.cuda.current_device())
    ceilings = read_ceiling(device), matmul_ceiling(device)
    begin = time.perf_counter()
    backend = select_backend(device, dtype=torch.float16)
    decoder = random_decoder(config, backend, host_embedding=host_embedding)
    torch.cuda.synchronize()
    note(
        f"{name}: made and packed in {time.perf_counter() - begin:.1f} s, "
        f"{torch.cuda.memory_allocated() / 1e9:.2f} GB."
    )
    result = Run(
        model=name,
        device=torch.cuda.get_device_name(device),
        read_ceiling=ceilings[0],
        matmul_ceiling=ceilings[1],
        weight_bytes=weight_bytes(config),
        new_tokens=new_tokens,
    )
    for plan in plans:
        row = measure(decoder, _fitted(config, plan, new_tokens), new_tokens, ceilings[0])
        result.rows.append(row)
        note(
            f"batch {row.batch}, context {row.context:,}, {row.kv}: prefill "
            f"{row.prefill_rate:,.0f}, decode {row.decode_rate:,.1f} tokens/s, "
            f"{row.of_floor:.0%} of the floor, {row.peak_memory:.2f} GB"
        )
    return result


def _fitted(config: ModelConfig, plan: Plan, new_tokens: int) -> Plan:
    """The plan with its cache kind settled; CapacityError says what is missing."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] - _WORKSPACE
    tokens = plan.batch * (plan.context + new_tokens + PAGE_SIZE)
    kinds = ("float16", "int8", "int6", "int4") if plan.kv == "auto" else (plan.kv,)
    for kind in kinds:
        if cache_bytes(config, kind, tokens, plan.batch) <= free:
            return replace(plan, kv=kind)
    needed = cache_bytes(config, kinds[-1], tokens, plan.batch)
    raise CapacityError(
        f"The {kinds[-1]} cache of {tokens:,} tokens needs {needed / 1e9:.1f} GB beside the "
        f"weights, {free / 1e9:.1f} are free: use a smaller --kv-dtype, context or batch."
    )


class _Session:
    """The sequences of one row: their pages, their prompt, and the graphs that decode them."""

    def __init__(self, decoder: Decoder, plan: Plan, new_tokens: int) -> None:
        self.decoder, self.plan = decoder, plan
        self.device = decoder.backend.device
        self.total = plan.context + new_tokens + 1
        config = decoder.config
        self.pages_each = -(-self.total // PAGE_SIZE)
        # One page more: what is written while a graph is captured goes to page 0.
        pages = 1 + plan.batch * self.pages_each
        self.store = KVStore(config, plan.kv, pages, self.device, seats=plan.batch)
        self.pages = torch.arange(
            1, 1 + plan.batch * self.pages_each, dtype=torch.int32, device=self.device
        ).view(plan.batch, -1)
        self.positions = make_positions(config, 1.0, self.total, self.device)
        self.ids = torch.randint(
            0, config.vocab_size, (plan.batch, plan.context), device=self.device
        )
        self.chosen = torch.zeros(plan.batch, dtype=torch.int64, device=self.device)
        self.seats = torch.arange(plan.batch, dtype=torch.int32, device=self.device)
        self._graphs: dict[int, DecodeGraph] = {}

    def warm_up(self) -> None:
        """Compile and load kernels, capture graphs: start-up costs, not those of a token."""
        self._feed(0, 0, min(self.plan.context, _CHUNK))
        for length in self._buckets():
            self._graphs[length] = DecodeGraph(
                self.decoder, self.store, self.positions, self.plan.batch, length, scratch_page=0
            )
        torch.cuda.synchronize()

    def prefill(self) -> float:
        """Seconds until every sequence has its first token."""
        begin = time.perf_counter()
        for sequence in range(self.plan.batch):
            for start in range(0, self.plan.context, _CHUNK):
                stop = min(start + _CHUNK, self.plan.context)
                logits = self._feed(sequence, start, stop)
            self.chosen[sequence] = logits[0].argmax()
        self.chosen.tolist()
        return time.perf_counter() - begin

    def decode(self, steps: int) -> float:
        """Seconds of `steps` tokens a sequence, each read by the host before the one after next."""
        lengths = torch.full_like(self.pages[:, 0], self.plan.context)
        ids, length, pending = self.chosen, self.plan.context, None
        torch.cuda.synchronize()
        begin = time.perf_counter()
        graph: DecodeGraph | None = None
        for _ in range(steps):
            longest = bucket(length + 1, _SHORTEST_BUCKET)
            if graph is not self._graphs[longest]:
                graph = self._graphs[longest]
                width = min(self.pages.shape[1], graph.pages.shape[1])
                graph.load(ids, lengths, self.pages[:, :width], seats=self.seats)
            graph.replay()
            ids, lengths, length = graph.ids, graph.lengths, length + 1
            token = ids.to("cpu", non_blocking=True), torch.cuda.Event()  # type: ignore[no-untyped-call]
            token[1].record()
            if pending is not None:
                pending[1].synchronize()
            pending = token
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    def _feed(self, sequence: int, start: int, stop: int) -> torch.Tensor:
        position = torch.arange(start, stop, device=self.device)
        pages = self.pages[sequence : sequence + 1]
        slots = pages[0, position // PAGE_SIZE] * PAGE_SIZE + position % PAGE_SIZE
        batch = Batch(
            slots=slots.to(torch.int32),
            pages=pages,
            starts=torch.tensor([0, stop - start], dtype=torch.int32, device=self.device),
            lengths=torch.tensor([stop], dtype=torch.int32, device=self.device),
            max_query=stop - start,
            max_length=stop,
        )
        batch = self.store.opened(batch, [(start, stop)], [sequence])
        step = Step(self.positions.slice(start, stop), batch, self.store.layers)
        return self.decoder.forward(self.ids[sequence, start:stop], step)

    def _buckets(self) -> Sequence[int]:
        lengths = range(self.plan.context + 1, self.total)
        return sorted(
            {bucket(length, _SHORTEST_BUCKET) for length in (*lengths[::512], lengths[-1])}
        )


def matmul_ceiling(device: torch.device) -> float:
    """Operations a second of an 8192-cube product in 16 bits."""
    a, b = (torch.randn(8192, 8192, dtype=torch.float16, device=device) for _ in range(2))
    return 2 * 8192**3 / _fastest(lambda: a @ b)


def _fastest(work: Callable[[], object], repeat: int = 10) -> float:
    times = list(_times(work, repeat))
    return sorted(times)[len(times) // 2]


def _times(work: Callable[[], object], repeat: int) -> Iterator[float]:
    for _ in range(repeat):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        yield time.perf_counter() - begin
