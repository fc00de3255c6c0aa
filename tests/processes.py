"""`jaxre` in other processes, alone or as the processes of one job."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path


def environment(devices: int, **more: str) -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    # These tests compare results, not how well programs are compiled, which takes longer.
    quick = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    tests = str(Path(__file__).parent)
    return inherited | quick | {"XLA_FLAGS": flags, "PYTHONPATH": tests} | more


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def by_address() -> Callable[[int, int], dict[str, str]]:
    """The variables that tell process `number` of `count` where the others are."""
    address = f"127.0.0.1:{free_port()}"
    return lambda number, count: {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(number),
    }


def by_slurm() -> Callable[[int, int], dict[str, str]]:
    """The variables that Slurm's `srun` sets, on one host; JAX finds the others from them."""
    # JAX derives the port from the job's number.
    job = (free_port() - (65535 - 2**12 + 1)) % 2**12
    return lambda number, count: {
        "JAX_COORDINATOR_ADDRESS": "auto",
        "SLURM_JOB_ID": str(job),
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": str(count),
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
    }


def jaxre(
    *command: str,
    devices: int = 1,
    processes: int = 1,
    joined: Callable[[], Callable[[int, int], dict[str, str]]] = by_address,
) -> list[str]:
    """Runs `jaxre COMMAND` in as many processes, which must all succeed; what each printed."""
    variables = joined()
    started = []
    for number in range(processes):
        env = environment(devices, **(variables(number, processes) if processes > 1 else {}))
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "jaxre.cli", *command],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert all(process.returncode == 0 for process in started), "\n".join(outputs)
    return outputs
