"""Two real processes, four devices each, one mesh: the same numbers as one device."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def test_two_processes_agree_with_one_device() -> None:
    port = str(free_port())
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
    }
    command = [sys.executable, "-m", "tests.parallel.two_processes", port]
    workers = [
        subprocess.Popen(
            [*command, str(rank)], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    for worker in workers:
        out, err = worker.communicate(timeout=240)
        assert worker.returncode == 0, err[-2000:]
        found = re.search(r"processes 2 devices 8 worst (\S+)", out)
        assert found, out
        assert float(found[1]) < 1e-6
