"""CPU, GPU and memory of the workers, read from outside them so that it costs them nothing."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import psutil

from adarun.events import Resources


class Sampler:
    """Reads the use of worker processes; remembers them, since CPU use is counted from one reading to the next."""

    def __init__(self) -> None:
        self._processes: dict[int, psutil.Process] = {}
        self._nvml = _load_nvml()

    def sample(self, rank: int, pid: int) -> Resources | None:
        """What the worker uses now, or None if it is gone."""
        try:
            process = self._processes.get(pid) or self._processes.setdefault(pid, psutil.Process(pid))
            with process.oneshot():
                cpu, memory = process.cpu_percent() / 100.0, process.memory_info().rss
        except psutil.Error:
            self._processes.pop(pid, None)
            return None
        gpu, gpu_memory, gpu_capacity = self._gpu(pid)
        return Resources(
            rank=rank,
            cpu_fraction=round(cpu, 3),
            memory_bytes=memory,
            at=time.time(),
            gpu_fraction=gpu,
            gpu_memory_bytes=gpu_memory,
            gpu_capacity_bytes=gpu_capacity,
        )

    def _gpu(self, pid: int) -> tuple[float | None, int | None, int | None]:
        """Use, memory of this process, and memory of the device."""
        if self._nvml is None:
            return None, None, None
        with suppress(self._nvml.NVMLError):
            for index in range(self._nvml.nvmlDeviceGetCount()):
                device = self._nvml.nvmlDeviceGetHandleByIndex(index)
                for process in self._nvml.nvmlDeviceGetComputeRunningProcesses(device):
                    if process.pid == pid:
                        use = self._nvml.nvmlDeviceGetUtilizationRates(device).gpu / 100.0
                        return use, process.usedGpuMemory, self._nvml.nvmlDeviceGetMemoryInfo(device).total
        return None, None, None


def _load_nvml() -> Any:
    import pynvml  # noqa: PLC0415 - it warns on import in some versions, and only the launcher needs it

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    return pynvml
