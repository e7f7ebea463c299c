"""What a decode graph computes, without a GPU: its step run eagerly in place of a capture."""

from __future__ import annotations

import pytest
import torch
import toy

from nybble.cache.store import KVStore
from nybble.engine.decode_graph import Capture, DecodeGraph, DecodeGraphs, bucket, padded
from nybble.engine.runner import PositionTable
from nybble.engine.scheduler import Chunk, TokenSequence
from nybble.model import read_model_config
from nybble.sampling import SamplingParams

PROMPTS = [list(range(10, 20 + 9 * n)) for n in range(5)]
GREEDY = SamplingParams(temperature=0, max_tokens=90)


class EagerGraph(DecodeGraph):
    @torch.inference_mode()
    def _captured(self, capture: Capture | None) -> torch.Tensor:
        logits = self._step()  # warm-up, which must leave no trace in pages that are owned
        self.lengths.zero_()
        return logits

    def replay(self) -> None:
        self.logits = self._step()


def with_graphs(engine):
    """The engine as it is on a GPU: a whole store, a scratch page, graphs for decoding."""
    runner, store = engine._runner, engine._runner._store
    pages, seats = runner.num_pages + 1, store.seats + 1
    runner._store = KVStore(store.config, store.kind, pages, store.device, seats=seats)
    unowned = runner.num_pages, store.seats
    graphs = DecodeGraphs(engine.decoder, runner._store, *unowned, graph_type=EagerGraph)
    runner._graphs = graphs
    return engine


def answers(engine):
    requests = [engine.request(prompt, GREEDY) for prompt in PROMPTS]
    for request in requests:
        engine.add(request)
    while any(not request.done for request in requests):
        engine.step()
    return [[token.id for token in request.news] for request in requests]


@pytest.mark.parametrize("kind", ["float32", "int4"])
@pytest.mark.parametrize("name", ["llama", "qwen1-ntk-logn"])
def test_graphs_decode_what_eager_steps_decode(make_engine, data, tmp_path, name, kind):
    folder = toy.write_llama(tmp_path) if name == "llama" else data / name
    options = {"max_context": 250, "cache_tokens": 10240, "kv_dtype": kind}
    expected = answers(make_engine(folder, **options))
    engine = with_graphs(make_engine(folder, **options))
    assert answers(engine) == expected
    assert engine._runner._graphs._graphs  # they did run


def test_a_graph_feeds_itself(make_engine, tmp_path):
    """Replayed without a load, it goes on with the token that it chose: what the bench times."""
    engine = with_graphs(make_engine(toy.write_llama(tmp_path), cache_tokens=512))
    expected = list(engine.generate([5, 6, 7], SamplingParams(temperature=0, max_tokens=5)))
    runner = engine._runner
    graph = next(iter(runner._graphs._graphs.values()))
    graph.load(torch.tensor([7]), torch.tensor([2]), torch.tensor([[0]]), torch.tensor([0]))
    chosen = []
    for _ in range(5):
        graph.replay()
        chosen.append(int(graph.ids[0]))
    assert chosen == expected


@pytest.mark.parametrize(
    ("number", "found"), [(1, 1), (2, 2), (3, 4), (33, 48), (49, 64), (65, 96), (97, 128)]
)
def test_batches_are_padded(number, found):
    assert padded(number) == padded(found) == found


@pytest.mark.parametrize(("number", "found"), [(1, 1024), (1024, 1024), (1025, 2048)])
def test_contexts_are_doubled(number, found):
    assert bucket(number, 1024) == found


def test_a_table_made_for_the_whole_context_stays(data):
    """Graphs hold its address: one that grows with an answer would cost all of them."""
    config = read_model_config(data / "qwen1-plain")
    whole = PositionTable(config, torch.device("cpu"), least=2048)
    growing = PositionTable(config, torch.device("cpu"), least=512)
    tables = set()
    for end in (5, 600, 1100):
        chunk = Chunk(TokenSequence(list(range(end)), 2000, 1.0), end - 1, end, complete=True)
        whole.cover([chunk])
        growing.cover([chunk])
        assert torch.equal(whole.rows([chunk]).cos, growing.rows([chunk]).cos)
        tables.add(id(whole.table))
    assert len(tables) == 1
    assert len(whole.table.cos) == 2048
