"""What is freed stays with the process."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

SCRIPT = """
import ctypes, os
from pathlib import Path
from jaxre.host_memory import keep_freed_memory
keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
resident = lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before, size = resident(), 1 << 28
for _ in range(2):
    held = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size)))
    ctypes.memset(held, 1, size)
    libc.free(held)
print((resident() - before) / size)
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="memory is kept where malloc is glibc's, on Linux"
)
@pytest.mark.parametrize("setting, kept", [({}, True), ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False)], ids=["alone", "told otherwise"])
def test_what_is_freed_stays_with_the_process(setting, kept):
    others = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=others | setting, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) > 0.9) == kept
