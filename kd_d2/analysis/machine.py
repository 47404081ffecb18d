"""What figures of speed were measured on."""

import platform

import torch

__all__ = ["device_name"]


def device_name(device: str) -> str:
    """Name of the GPU, or of the processor where ``device`` is "cpu"."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as f:
            lines = [line for line in f if line.startswith("model name")]
        return lines[0].split(":", 1)[1].strip()
    except (OSError, IndexError):
        return platform.processor() or platform.machine()
