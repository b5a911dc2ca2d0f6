"""The energy that this process's GPU has taken, by the counter of NVIDIA's management library."""

from __future__ import annotations

from typing import Any

import torch


class Energy:
    """Joules since it was asked last. GPUs before Volta have no counter, and CPUs none that is ours alone."""

    def __init__(self, device: torch.device) -> None:
        self._handle = _handle(device)
        self._before = self._millijoules()

    @property
    def told(self) -> bool:
        """Whether the device tells."""
        return self._before is not None

    def joules(self) -> float:
        """Since the last call; 0 where the device does not tell."""
        before, self._before = self._before, self._millijoules()
        return (self._before - before) / 1000 if self._before is not None and before is not None else 0.0

    def _millijoules(self) -> int | None:
        if self._handle is None:
            return None
        import pynvml

        try:
            return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except pynvml.NVMLError:
            return None


def _handle(device: torch.device) -> Any:
    """NVML's own of the GPU; None without one, or without the library."""
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        # By its identity: NVML numbers all GPUs of the machine, CUDA those that the process may see.
        return pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None
