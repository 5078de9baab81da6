"""The snippets of docs/client.md run and have the documented results."""

import os
import re
import subprocess
import sys
from pathlib import Path

from testing.processes import System
from testing.waiting import HANG_SECONDS
from tests.integration.test_api_process import started_api

ROOT = Path(__file__).parents[3]


def test_every_snippet_works(sqlite_system: System) -> None:
    sqlite_system.worker(scripted_latency=0.02)
    page = (ROOT / "docs" / "client.md").read_text()
    snippets = "\n".join(re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE))
    with started_api(sqlite_system) as api:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "TPO_URL": api.url, "TPO_API_KEY": ""}
        done = subprocess.run(
            [sys.executable, "-c", snippets],
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\ncompleted Draft " in done.stdout
    assert "\n1 job.queued\n" in done.stdout
    assert " job.completed\n" in done.stdout
    last = done.stdout.splitlines()[-3:]
    assert [line[:8] for line in last[:2]] == ["0 Draft ", "1 Draft "]
    assert last[2].startswith("2 input: is blank")
