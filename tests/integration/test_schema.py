"""Requests that are made out of /openapi.json, against a live server: no 5xx, and no answer off its schema.

Hooks (tests/support/known_ids.py) let most of them name jobs, files, batches and webhooks that exist.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from testing.processes import System
from testing.waiting import HANG_SECONDS
from tests.integration.test_api_process import started_api

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "3"))
SECONDS = int(os.environ.get("FUZZ_SECONDS", "30"))
OFTEN = 20
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 3 + 600)
def test_every_answer_is_as_described(sqlite_system: System, tmp_path: Path) -> None:
    """Longer by `make fuzz`."""
    sqlite_system.worker(scripted_latency=0.01)
    log = tmp_path / "answers.log"
    with started_api(sqlite_system, max_sample_size=4, max_iterations=2, webhook_allow_private=True) as api:
        words = ["run", f"{api.url}/openapi.json", "--checks", CHECKS, "--max-examples", str(EXAMPLES), "--seed", "1"]
        words += [
            "--no-color",
            "--phases",
            "examples,coverage,fuzzing",
            "--max-time",
            str(SECONDS),
            "--continue-on-failure",
        ]
        words += ["--request-timeout", "30", "--generation-database", "none", "--suppress-health-check", "all"]
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", *words],
            cwd=tmp_path,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "SCHEMATHESIS_HOOKS": str(ROOT / "tests" / "support" / "known_ids.py"),
                "FUZZ_API": api.url,
                "FUZZ_DATABASE": str(sqlite_system.engine.url),
                "FUZZ_LOG": str(log),
            },
            capture_output=True,
            text=True,
            timeout=SECONDS * 3 + HANG_SECONDS,
            check=False,
        )
        assert api.client.get("/healthz").status_code == 200
        described = api.client.get("/openapi.json").json()["paths"]
    print(done.stdout[-10000:])
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-2000:]
    assert "failed unexpectedly" not in api.process.output
    answers = Counter(log.read_text().splitlines())
    print("\n".join(f"{count:6} {answer}" for answer, count in sorted(answers.items())))
    worked = {answer.rpartition(" ")[0] for answer in answers if int(answer.rpartition(" ")[2]) < 400}
    operations = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    calls = Counter(answer.rpartition(" ")[0] for answer in answers.elements())
    # A machine that is busy gets to some operations seldom, or not at all.
    idle = {operation for operation in operations - worked if calls[operation] >= OFTEN}
    assert idle == set(), "operations that were never seen doing their work"
    print(f"{len(worked & operations)} of {len(operations)} operations were seen doing their work")
