"""How the C library hands memory back: for loops whose every turn asks for the same blocks again."""

from __future__ import annotations

import ctypes
import logging
import sys

log = logging.getLogger(__name__)

# Of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX = -1, -4
MOST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Keep freed blocks in the process instead of giving them back to the system; whether that could be said.

    With glibc, blocks from 32 MiB on are otherwise mapped anew each time, and their pages cost more than what is
    written into them. The process then never grows smaller. Nothing is done where the library is another.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "gnu_get_libc_version"):
        return False
    done = library.mallopt(MMAP_MAX, 0) == 1 and library.mallopt(TRIM_THRESHOLD, MOST) == 1
    log.debug("freed memory is %s", "kept" if done else "given back")
    return done
