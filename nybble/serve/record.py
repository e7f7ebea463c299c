"""What is written down of a request, in metrics and in the log: who, how much, how long.

Never what: no text of a prompt or an answer passes through here.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from nybble.serve.metrics import Metrics


@dataclass
class RequestRecord:
    """One HTTP request; `reason` is why its answer ended, where it had one."""

    id: str = "-"
    metrics: Metrics = field(default_factory=Metrics)
    begun: float = field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    new_tokens: int = 0
    reason: str | None = None

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    def started(self) -> None:
        """The request was accepted: it runs or waits."""
        self.metrics.arrived()

    def rejected(self, label: str) -> None:
        """The request never ran."""
        self.metrics.arrived()
        self.metrics.rejected(label)

    def token(self, since: float | None) -> float:
        """A token came; since: when the one before it did. Returns the time."""
        now = time.perf_counter()
        if since is None:
            self.metrics.first_token(now - self.begun)
        else:
            self.metrics.token(now - since)
        return now

    def finished(self, reason: str, prompt_tokens: int, new_tokens: int) -> None:
        self.reason, self.prompt_tokens, self.new_tokens = reason, prompt_tokens, new_tokens
        self.metrics.finished(reason, prompt_tokens, new_tokens, self.seconds)
