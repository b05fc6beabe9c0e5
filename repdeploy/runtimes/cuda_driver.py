"""How many NVIDIA GPUs the driver shows, asked of the driver itself: no package has to be installed for that."""

from __future__ import annotations

import ctypes
import sys


def device_count() -> int:
    """0 where there is no driver or no device. Source: CUDA driver API, cuInit and cuDeviceGetCount."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value
