"""Kernels and tables of the decode step for a GPU, run without a GPU."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes


@pytest.mark.slow
def test_gpu_decode_step_equals_the_plain_one() -> None:
    """Compare every kind of attention, with shared prompts and with rows that join, leave and are preempted."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.kernels"], env=environment, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "0 differences\n"), ran.stderr
