"""What a run did, for programs (JSON), for eyes (a table) and for whoever finds the folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class ModuleResult:
    """One quantised linear. error: |x W - x Q|^2 / |x W|^2 over the calibration tokens.

    W is the weight that was aimed at: the original, or the one that repairs earlier errors.
    `name` is the decoder's, "gate_up_proj" say; parts of a fused matrix are solved as one.
    """

    layer: int
    name: str
    error: float
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """The outcome of a run. seconds: of this process, which may have continued another's work."""

    source: str
    settings: Mapping[str, Any]
    modules: Sequence[ModuleResult]
    source_bytes: int
    target_bytes: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lasting(self) -> dict[str, Any]:
        """The part that two equal runs share, which is what the output folder keeps."""
        modules = [{"layer": m.layer, "name": m.name, "error": m.error} for m in self.modules]
        return {
            "source": self.source,
            "settings": dict(self.settings),
            "modules": modules,
            "source_bytes": self.source_bytes,
            "target_bytes": self.target_bytes,
        }

    def table(self) -> str:
        """Markdown: one row a layer, the relative error of each linear in percent."""
        names = list(dict.fromkeys(module.name for module in self.modules))
        rows: dict[int, dict[str, float]] = {}
        for module in self.modules:
            rows.setdefault(module.layer, {})[module.name] = module.error
        lines = [f"| layer | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for layer, errors in sorted(rows.items()):
            cells = [f"{errors[name]:.3%}" if name in errors else "" for name in names]
            lines.append(f"| {layer} | {' | '.join(cells)} |")
        return "\n".join(lines)


def model_card(report: Report) -> str:
    """README.md of the output folder: how it was made, and what that measured."""
    quant = report.settings["quant"]
    calibration = report.settings["calibration"]
    mean = sum(module.error for module in report.modules) / max(len(report.modules), 1)
    kind = "symmetric" if quant["sym"] else "asymmetric"
    steps = ["GPTQ", "weighted scales"]
    steps += ["coordinate descent"] if report.settings["solver"]["sweeps"] else []
    steps += ["correction of earlier errors"] if report.settings["correct"] else []
    return f"""# {report.source}, {quant["bits"]} bits

Quantised by nybble ({", ".join(steps)}) from {report.source}, whose licence applies to this copy
too.

| | |
|---|---|
| bits, group size | {quant["bits"]}, {quant["group_size"]} ({kind}) |
| act-order in the file (`desc_act`) | {str(quant["desc_act"]).lower()} |
| calibration | {calibration["windows"]} windows, {calibration["tokens"]} tokens |
| size | {report.target_bytes / 1e6:,.0f} MB, from {report.source_bytes / 1e6:,.0f} MB |
| mean relative error of the linears' outputs | {mean:.3%} |

The embeddings, norms and the output head are unchanged. Any loader of GPTQ checkpoints reads
this folder; measure what it lost with `nybble compare`.

## Relative error of each linear's outputs

{report.table()}
"""
