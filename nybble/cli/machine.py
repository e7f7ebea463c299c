"""What this machine has: processor, memory, accelerators."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Instruction sets that the kernels make use of, as Linux spells them (x86, then ARM).
_FEATURES = (
    *("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"),
    *("asimd", "asimddp", "i8mm", "sve"),
)


@dataclass(frozen=True)
class Memory:
    """Bytes of one memory: the RAM, or one GPU's."""

    name: str
    free: int
    total: int


def cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """What of the instruction sets that matter is there; empty where the system does not tell."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    return [feature for feature in _FEATURES if feature in flags]


def _cpuinfo(key: str) -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


def usable_cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def ram() -> Memory:
    """The machine's memory, or the container's where that is less."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    free = _available() or total
    limit, used = (_cgroup(name) for name in ("memory.max", "memory.current"))
    if limit is not None and limit < total:
        return Memory("RAM", max(min(free, limit - (used or 0)), 0), limit)
    return Memory("RAM", free, total)


def _available() -> int | None:
    """What Linux says can be used without swapping."""
    with suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return None


def _cgroup(name: str) -> int | None:
    """A file of this container's control group (v2); "max" means no limit."""
    with suppress(OSError, ValueError):
        return int((Path("/sys/fs/cgroup") / name).read_text())
    return None


def gpus() -> list[Memory]:
    """The memory of each CUDA device that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        found.append(Memory(torch.cuda.get_device_name(index), free, total))
    return found
