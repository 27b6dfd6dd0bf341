"""Memory that was freed comes back without new pages, counted by the operating system."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import ctypes, resource
from modalities_core.freed_memory import all_freed_kept, keep_freed

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def faults(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        piece = libc.malloc(size)
        ctypes.memset(piece, 1, size)
        libc.free(piece)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

print(faults(64 << 20))
before = resident()
with all_freed_kept():
    print(faults(64 << 20), resident() - before)
print(faults(64 << 20), resident() - before)
keep_freed(64 << 20)
print(faults(16 << 20))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_stays_inside_and_goes_back_behind() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    plain, inside, kept, behind, left, few = (int(word) for word in done.stdout.split())
    pages = (64 << 20) // 4096
    # Huge pages, where they are on, make fewer faults, but still some in each of ten rounds.
    assert inside < 1.5 * pages < plain
    assert kept > 60 << 20
    assert behind > 1.5 * pages
    assert left < 8 << 20
    assert few < 1.5 * (16 << 20) // 4096
