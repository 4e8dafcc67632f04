"""Freed memory is kept where the C library can be told so."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from sfumato.memory.allocator import keep_freed_memory

def faults() -> int:
    began = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(12_000_000).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - began

before = faults()
print(int(keep_freed_memory()))
faults()
print(before, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's malloc is Linux's")
def test_pages_are_asked_for_once():
    """Blocks of 48 MB, ten times: anew each time before, from what is kept afterwards."""
    out = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True).stdout.split()
    if out[0] == "0":
        pytest.skip("the C library is not glibc")
    before, after = int(out[1]), int(out[2])
    assert before > 1000 and after < before / 10
