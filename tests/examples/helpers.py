"""What the tests of the examples share."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

from examples.lm.config import Config

ROOT = Path(__file__).resolve().parents[2]
SMALL = Config(
    steps=12, batch_size=4, seq_len=32, width=32, depth=1, heads=2, val_every=5, learning_rate=1e-2
)


def small(**changes):
    return dataclasses.replace(SMALL, **changes)


def start_python(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_python(*arguments, **environment):
    process = start_python(*arguments, **environment)
    out, err = process.communicate(timeout=240)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)
