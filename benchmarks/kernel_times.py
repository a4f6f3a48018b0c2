"""Where a step's time goes on the device: its kernels, by kind."""

import re
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

KINDS = {  # the first pattern found in a kernel's name decides
    "compiled passes": "^triton_",
    "optimizer": "adam|^_update$|^_begin$|^_write$",
    "kernels of ours": "^_[a-z]",
    "attention": "sdpa|flash|fmha|attention",
    "experts' products": "GroupProblemShape|grouped",
    "other products": "nvjet|gemm|cutlass|cublas|splitk",
    "the rest": "",
}


def kind_of(kernel: str) -> str:
    return next(kind for kind, p in KINDS.items() if re.search(p, kernel, re.IGNORECASE))


def kernel_times(step: Callable[[], object], most: int = 12) -> dict[str, dict[str, float]]:
    """Milliseconds of one call: ``kinds``, and ``kernels``, those that took the longest."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    found = {
        event.key: event.self_device_time_total / 1e3
        for event in profiled.key_averages()
        if event.self_device_time_total
    }
    kinds = dict.fromkeys(KINDS, 0.0)
    for name, milliseconds in found.items():
        kinds[kind_of(name)] += milliseconds
    longest = sorted(found, key=lambda name: -found[name])[:most]
    return {"kinds": kinds, "kernels": {name[:100]: found[name] for name in longest}}
