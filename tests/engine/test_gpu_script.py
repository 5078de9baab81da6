"""The measurement for a GPU runs on a bare machine: with torch, triton and transformers, and nothing else of ours."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BARE = """
import runpy, sys

OURS = {"alembic", "celery", "fastapi", "flower", "httpx", "jsonschema_rs", "kombu", "openai", "prometheus_client",
        "psycopg", "pydantic", "pydantic_core", "pydantic_settings", "redis", "sqlalchemy", "starlette", "uvicorn"}


class Without:
    def __init__(self, finder):
        self._finder = finder

    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] in OURS else self._finder.find_spec(name, *rest)

    def __getattr__(self, name):
        return getattr(self._finder, name)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.argv = ["bench.gpu", "--tiny", "--no-generate", "--jobs", "1", "--seconds", "30"]
runpy.run_module("bench.gpu", run_name="__main__")
"""


@pytest.mark.processes
@pytest.mark.slow
@pytest.mark.long
def test_gpu_script_needs_no_package_of_ours() -> None:
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 of 3 greedy completions equal those of generate" in done.stdout
