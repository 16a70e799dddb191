"""GPU specifications and peak FLOP/s of a device."""

import re
import time
from dataclasses import dataclass
from functools import cache
from typing import Any


@dataclass(frozen=True)
class Gpu:
    """Specification of a GPU model: memory as reported by CUDA, peak rates from the datasheet."""

    pattern: str  # regex matched against `torch.cuda.get_device_name()`
    memory: int  # bytes
    bfloat16: float  # FLOP/s of dense matrix products, without sparsity
    float32: float  # FLOP/s outside the tensor cores: PyTorch does not use TF32 unless asked to


GIB = 2**30
# Memory is the amount available to CUDA, slightly below the nominal size. More specific patterns come first.
GPUS = {
    "a100-40gb": Gpu(r"A100.*40GB", int(39.4 * GIB), 312e12, 19.5e12),
    "a100-80gb": Gpu(r"A100.*80GB", int(79.1 * GIB), 312e12, 19.5e12),
    "h100-80gb-pcie": Gpu(r"H100 PCIe", int(79.1 * GIB), 756e12, 51e12),
    "h100-80gb": Gpu(r"H100.*80GB", int(79.1 * GIB), 989e12, 67e12),
    "h200": Gpu(r"H200", int(139.7 * GIB), 989e12, 67e12),
    "b200": Gpu(r"B200", int(178.3 * GIB), 2250e12, 75e12),
    "l40s": Gpu(r"L40S", int(44.3 * GIB), 362e12, 91.6e12),
    "rtx-4090": Gpu(r"RTX 4090(?! D| Laptop)", int(23.5 * GIB), 165.2e12, 82.6e12),
}


def find_gpu(device_name: str) -> Gpu | None:
    """Return the GPU entry that matches a `torch.cuda.get_device_name()` string, or None."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.pattern, device_name)), None)


def peak_flops(device: Any, dtype: Any) -> float:
    """Return the peak FLOP/s of a device: from its datasheet, or measured in under 0.3 s if unknown.

    Args:
        device: a `torch.device` or its name.
        dtype: `torch.dtype` of the arithmetic.
    """
    import torch  # imported lazily: the plan uses the table without torch

    device = torch.device(device)
    if device.type == "cuda":
        gpu = find_gpu(torch.cuda.get_device_name(device))
        if gpu and dtype in (torch.bfloat16, torch.float32):
            return gpu.bfloat16 if dtype == torch.bfloat16 else gpu.float32
    return _measured_flops(str(device), dtype)


@cache
def _measured_flops(device: str, dtype: Any) -> float:
    """Measure the FLOP/s of square matrix products; best of several runs."""
    import torch

    size = 4096 if device.startswith("cuda") else 512
    left, right = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < 0.15:
        start = time.perf_counter()
        product = left @ right
        product[0, 0].item()  # synchronizes with the device
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
