"""How the C library hands memory back: for loops whose every turn asks for the same blocks again."""

from __future__ import annotations

import ctypes
import logging
import sys

log = logging.getLogger(__name__)

# Of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
MOST = 2**31 - 1
ARENAS = 2  # for all threads: each keeps as much as its threads ever needed at once


def keep_freed_memory() -> bool:
    """Keep freed blocks in the process instead of giving them back to the system; whether that could be said.

    With glibc, blocks from 32 MiB on are otherwise mapped anew each time, and their pages cost more than what is
    written into them. The process then never grows smaller, so its threads share two heaps: a server whose forty
    had one each kept 640 MB after thousands of odd pictures, and 270 to 380 so. Nothing is done where the library is
    another.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "gnu_get_libc_version"):
        return False
    wanted = ((MMAP_MAX, 0), (TRIM_THRESHOLD, MOST), (ARENA_MAX, ARENAS))
    done = all(library.mallopt(what, value) == 1 for what, value in wanted)
    log.debug("freed memory is %s", "kept" if done else "given back")
    return done
