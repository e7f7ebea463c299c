"""How long one block of the 72B takes to quantise, and how much memory: a random one, from disk.

    python -m nybble.gptq.bench --device cuda

Two layers of the given shapes are written as a checkpoint and quantised. The time of a layer is
that between the ends of the two, so it holds everything that a layer of a long run costs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch

from nybble.checkpoint import CheckpointWriter
from nybble.config import QuantConfig
from nybble.gptq.report import ModuleResult
from nybble.gptq.run import RunOptions, quantize_checkpoint
from nybble.gptq.solver import SolverOptions

_VOCABULARY = 1024
_LAYERS_OF_72B = 80


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--intermediate", type=int, default=24576)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--sweeps", type=int, default=SolverOptions().sweeps)
    parser.add_argument("--offload", action="store_true")
    given = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    shape = (given.samples, given.length)
    windows = torch.randint(0, _VOCABULARY, shape, generator=generator).tolist()
    options = RunOptions(
        SolverOptions(sweeps=given.sweeps), device=given.device, offload=given.offload
    )
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name, "model"), Path(name, "quantized")
        write_model(source, given.hidden, given.intermediate, given.device)
        clock = _Clock()
        quant = QuantConfig(bits=4, group_size=128, desc_act=False, sym=True)
        report = quantize_checkpoint(source, target, quant, windows, options, clock)
    print(report.table())
    for stage, seconds in clock.stages.items():
        print(f"{stage}: {seconds:.1f} s")
    print(
        f"one layer: {clock.layer:.1f} s; {_LAYERS_OF_72B} layers: "
        f"{_LAYERS_OF_72B * clock.layer / 60:.1f} min"
    )
    if torch.device(given.device).type == "cuda":
        print(f"peak GPU memory: {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


class _Clock:
    """Keeps the time of each stage, and of all between the ends of two layers."""

    def __init__(self) -> None:
        self.stages: dict[str, float] = {}
        self.layer = 0.0
        self._last_end = 0.0

    def __call__(self, result: ModuleResult, done: int, total: int) -> None:
        self.stages[result.name] = result.seconds
        if result.name == "down_proj":
            now = time.monotonic()
            self.layer, self._last_end = now - self._last_end, now


def write_model(folder: Path, hidden: int, intermediate: int, device: str) -> None:
    """Two layers of a first-generation Qwen with random weights, bf16."""
    shapes = {
        "ln_1.weight": (hidden,),
        "attn.c_attn.weight": (3 * hidden, hidden),
        "attn.c_attn.bias": (3 * hidden,),
        "attn.c_proj.weight": (hidden, hidden),
        "ln_2.weight": (hidden,),
        "mlp.w1.weight": (intermediate, hidden),
        "mlp.w2.weight": (intermediate, hidden),
        "mlp.c_proj.weight": (hidden, intermediate),
    }

    def random(*shape: int) -> torch.Tensor:
        values = torch.randn(*shape, device=device, dtype=torch.bfloat16)
        return values.mul_(0.02) if len(shape) > 1 else values.mul_(0.1).add_(1)

    with CheckpointWriter(folder) as writer:
        writer.add_json("config.json", _config(hidden, intermediate))
        for name in ("transformer.wte.weight", "lm_head.weight"):
            writer.add(name, random(_VOCABULARY, hidden) * 50)
        writer.add("transformer.ln_f.weight", random(hidden))
        for index in range(2):
            for name, shape in shapes.items():
                writer.add(f"transformer.h.{index}.{name}", random(*shape))


def _config(hidden: int, intermediate: int) -> dict[str, object]:
    return {
        "model_type": "qwen",
        "hidden_size": hidden,
        "intermediate_size": 2 * intermediate,
        "num_hidden_layers": 2,
        "num_attention_heads": hidden // 128,
        "kv_channels": 128,
        "seq_length": 32768,
        "vocab_size": _VOCABULARY,
        "rotary_emb_base": 1000000,
    }


if __name__ == "__main__":
    main()
