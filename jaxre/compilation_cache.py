"""The persistent compilation cache: a second process reads what the first has compiled."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

DEFAULT = "~/.cache/jaxre/xla"
UNREADABLE = "Error reading persistent compilation cache entry"  # how JAX's warning begins


def use_compilation_cache(say: Callable[[str], object]) -> str:
    """Switches the cache on, in JAX_COMPILATION_CACHE_DIR or ~/.cache/jaxre/xla, for programs of
    any size.

    JAX_ENABLE_COMPILATION_CACHE=false switches it off. A folder that cannot be written is reported
    through `say`, and the process goes on without the cache; so are damaged entries, which are
    compiled again. Machines may share a folder: JAX's keys hold the device, and of a CPU its
    instruction set (its topology's fingerprint changes with --xla_cpu_max_isa).

    Returns:
      The folder, or why there is none.
    """
    if not jax.config.jax_enable_compilation_cache:
        return "off (JAX_ENABLE_COMPILATION_CACHE=false)"
    folder = jax.config.jax_compilation_cache_dir or str(Path(DEFAULT).expanduser())
    if "://" not in folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            jax.config.update("jax_compilation_cache_dir", None)
            compilation_cache.reset_cache()
            off = f"off ({folder} cannot be written: {error.strerror})"
            say(f"compilation cache {off}; set JAX_COMPILATION_CACHE_DIR to a folder that can")
            return off
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if jax.config.jax_compilation_cache_dir != folder:
        jax.config.update("jax_compilation_cache_dir", folder)
        # JAX decides at its first compilation whether there is a cache
        compilation_cache.reset_cache()
    _tell_unreadable(folder, say)
    return folder


def _tell_unreadable(folder: str, say: Callable[[str], object]) -> None:
    """Reports once for all the entries that cannot be read, each of which JAX compiles again with a
    warning.
    """
    show, shown = warnings.showwarning, []

    def show_others(message: Warning | str, *place: Any, **more: Any) -> None:
        if not str(message).startswith(UNREADABLE):
            show(message, *place, **more)
        elif not shown:
            shown.append(message)
            say(
                f"{folder}: has entries that cannot be read, which are compiled again; remove the"
                " folder"
            )

    warnings.showwarning = show_others
