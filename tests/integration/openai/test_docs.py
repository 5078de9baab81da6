"""The snippets of docs/openai.md run and have the documented results."""

import os
import re
import subprocess
import sys
from pathlib import Path

from testing.processes import System
from testing.waiting import HANG_SECONDS
from tests.integration.openai.conftest import serving
from tests.support.api_client import KEY

PAGE = Path(__file__).parents[3] / "docs" / "openai.md"


def test_every_snippet_works(sqlite_system: System, tmp_path: Path) -> None:
    sqlite_system.worker(scripted_latency=0.02)
    sqlite_system.maintenance()
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
    with serving(sqlite_system) as server:
        environment = {**os.environ, "OPENAI_BASE_URL": f"{server.url}/v1", "OPENAI_API_KEY": KEY}
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(snippets)],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("completed Draft ")
    assert "{'type': 'job.iteration.completed', 'iteration': 0" in done.stdout
    assert [line.split(" ")[0] for line in lines[-4:]] == ["completed", "question-0", "question-1", "question-2"]
