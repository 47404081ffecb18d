"""What a detector costs at inference: parameters, multiply-adds, time and memory."""

from .flops import flop_analysis, flops_by_module
from .groups import REST, Group, by_group, module_groups, parameters_by_group
from .inputs import image_size_of, random_batch
from .machine import device_name
from .memory import PeakMemory, peak_memory
from .network import deployed
from .timing import CLOCKS, GroupTimer, interleaved, percentiles

__all__ = [
    "CLOCKS",
    "Group",
    "GroupTimer",
    "PeakMemory",
    "REST",
    "by_group",
    "deployed",
    "device_name",
    "flop_analysis",
    "flops_by_module",
    "image_size_of",
    "interleaved",
    "module_groups",
    "parameters_by_group",
    "peak_memory",
    "percentiles",
    "random_batch",
]
