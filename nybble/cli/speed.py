"""How fast an answer came, in one line."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nybble.engine.request import Timing


def speed_line(timing: Timing) -> str:
    """Tokens and tokens/s of the answer and of the prompt, seconds to the first token."""
    answer = f"{timing.new_tokens} tokens"
    if timing.decode_seconds:
        answer += f" at {timing.decode_rate:.1f}/s"
    prompt = f"prompt {timing.prompt_tokens}"
    if timing.reused_tokens:
        prompt += f" ({timing.reused_tokens} cached)"
    if timing.prefill_seconds:
        prompt += f" at {prefill_rate(timing):.0f}/s"
    return f"{answer}, {prompt}, first token after {timing.prefill_seconds:.2f} s"


def prefill_rate(timing: Timing) -> float:
    """Prompt tokens a second, those that came from the cache not counted."""
    fed = timing.prompt_tokens - timing.reused_tokens
    return fed / timing.prefill_seconds if timing.prefill_seconds else 0.0


def timing_json(timing: Timing) -> dict[str, Any]:
    return asdict(timing) | {
        "decode_tokens_per_second": timing.decode_rate,
        "prefill_tokens_per_second": prefill_rate(timing),
    }
