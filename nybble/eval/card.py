"""The model card's own figures (Qwen-72B-Chat-Int4), to stand beside what is measured.

Every table of the card that nybble has a benchmark for: rows in the card's order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """task: whose score it shows. rows: (model, shots or "") -> per cent."""

    task: str
    title: str
    rows: Mapping[tuple[str, str], float]


CEVAL = Table(
    "ceval",
    "C-Eval, validation set, mean of the subjects",
    {
        ("LLaMA2-7B-Chat", ""): 31.9,
        ("LLaMA2-13B-Chat", ""): 36.2,
        ("LLaMA2-70B-Chat", ""): 44.3,
        ("ChatGPT3.5", ""): 52.5,
        ("ChatGPT4", ""): 69.9,
        ("Yi-34B-Chat", "0-shot"): 77.0,
        ("Yi-34B-Chat", "5-shot"): 78.5,
        ("Qwen-7B-Chat (original)", "0-shot"): 54.2,
        ("Qwen-7B-Chat", "0-shot"): 59.7,
        ("Qwen-7B-Chat", "5-shot"): 59.3,
        ("Qwen-14B-Chat", "0-shot"): 69.8,
        ("Qwen-14B-Chat", "5-shot"): 71.7,
        ("Qwen-72B-Chat", "0-shot"): 80.1,
        ("Qwen-72B-Chat", "5-shot"): 82.9,
    },
)
MMLU = Table(
    "mmlu",
    "MMLU, accuracy over questions",
    {
        ("LLaMA2-7B-Chat", ""): 46.2,
        ("LLaMA2-13B-Chat", ""): 54.6,
        ("LLaMA2-70B-Chat", ""): 63.8,
        ("Yi-34B-Chat", "0-shot"): 67.6,
        ("Yi-34B-Chat", "5-shot"): 73.4,
        ("ChatGPT3.5", ""): 69.1,
        ("ChatGPT4", ""): 83.0,
        ("Qwen-7B-Chat (original)", "0-shot"): 53.9,
        ("Qwen-7B-Chat", "0-shot"): 55.8,
        ("Qwen-7B-Chat", "5-shot"): 57.0,
        ("Qwen-14B-Chat", "0-shot"): 64.6,
        ("Qwen-14B-Chat", "5-shot"): 66.5,
        ("Qwen-72B-Chat", "0-shot"): 74.3,
        ("Qwen-72B-Chat", "5-shot"): 75.0,
    },
)
HUMANEVAL = Table(
    "humaneval",
    "HumanEval, pass@1",
    {
        ("LLaMA2-7B-Chat", ""): 12.2,
        ("LLaMA2-13B-Chat", ""): 18.9,
        ("LLaMA2-70B-Chat", ""): 32.3,
        ("Yi-34B-Chat", ""): 33.5,
        ("ChatGPT3.5", ""): 73.2,
        ("ChatGPT4", ""): 86.6,
        ("Qwen-7B-Chat (original)", "0-shot"): 24.4,
        ("Qwen-7B-Chat", "0-shot"): 37.2,
        ("Qwen-14B-Chat", "0-shot"): 43.9,
        ("Qwen-72B-Chat", "0-shot"): 64.6,
    },
)
GSM8K = Table(
    "gsm8k",
    "GSM8K, accuracy",
    {
        ("LLaMA2-7B-Chat", ""): 26.3,
        ("LLaMA2-13B-Chat", ""): 37.1,
        ("LLaMA2-70B-Chat", ""): 59.3,
        ("Yi-34B-Chat", ""): 71.6,
        ("ChatGPT3.5", ""): 73.2,
        ("ChatGPT4", ""): 91.4,
        ("Qwen-7B-Chat (original)", "0-shot"): 41.1,
        ("Qwen-7B-Chat", "0-shot"): 50.3,
        ("Qwen-7B-Chat", "8-shot"): 54.1,
        ("Qwen-14B-Chat", "0-shot"): 60.1,
        ("Qwen-14B-Chat", "8-shot"): 59.3,
        ("Qwen-72B-Chat", "0-shot"): 76.4,
        ("Qwen-72B-Chat", "8-shot"): 75.7,
    },
)
TABLES = (CEVAL, MMLU, HUMANEVAL, GSM8K)

LEVAL_COLUMNS: Mapping[str, str] = {
    "leval-coursera": "Coursera",
    "leval-gsm100": "GSM",
    "leval-quality": "QuALITY",
    "leval-tpo": "TOEFL",
    "leval-codeU": "CodeU",
    "leval-sci_fi": "SFiction",
}
LEVAL: Mapping[str, tuple[float, ...]] = {
    "ChatGPT-3.5-16k": (63.51, 84.00, 61.38, 78.43, 12.22, 64.84),
    "Qwen-72B-Chat": (58.13, 76.00, 77.22, 86.24, 6.66, 69.53),
}

QUANTIZATION_COLUMNS: Mapping[str, str] = {
    "mmlu": "MMLU",
    "ceval": "C-Eval (val)",
    "gsm8k": "GSM8K",
    "humaneval": "HumanEval",
}
QUANTIZATION: Mapping[str, tuple[float, ...]] = {
    "BF16": (74.4, 80.1, 76.4, 64.6),
    "Int8": (73.5, 80.1, 73.5, 62.2),
    "Int4": (73.4, 80.1, 75.3, 61.6),
}


def figure(task: str, shots: int, weights: str) -> float | None:
    """The card's figure for Qwen-72B-Chat: of these weights ("Int4") where it has them."""
    weights = "BF16" if weights == "16-bit" else weights
    if task in LEVAL_COLUMNS:
        return LEVAL["Qwen-72B-Chat"][list(LEVAL_COLUMNS).index(task)]
    if task in QUANTIZATION_COLUMNS and shots == 0 and weights in QUANTIZATION:
        return QUANTIZATION[weights][list(QUANTIZATION_COLUMNS).index(task)]
    for table in TABLES:
        if table.task == task:
            return table.rows.get(("Qwen-72B-Chat", f"{shots}-shot"))
    return None
