"""The decode step for a GPU: its kernels and its tables, without a GPU."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.processes


@pytest.mark.slow
def test_the_gpus_decode_step_writes_what_the_plain_one_writes() -> None:
    """Every kind of attention; prompts shared, rows that join, leave and are put back; greedy and sampled."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    ran = subprocess.run(
        [sys.executable, "-m", "tests.support.kernels"], env=environment, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (0, "0 differences\n"), ran.stderr
