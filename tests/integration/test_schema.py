"""Requests generated from /openapi.json against a live server: no 5xx, and no response that violates its schema.

Hooks (tests/support/known_ids.py) give most requests ids of existing jobs, files, batches and webhooks.
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
from tests.support.webhooks import ANY_TARGET

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "3"))
SECONDS = int(os.environ.get("FUZZ_SECONDS", "30"))
OFTEN = 20
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 3 + 600)
def test_every_response_matches_the_schema(sqlite_system: System, tmp_path: Path) -> None:
    """Send a few generated requests to each operation. `make fuzz` sends more."""
    sqlite_system.worker(scripted_latency=0.01)
    log = tmp_path / "answers.log"
    with started_api(sqlite_system, max_sample_size=4, max_iterations=2, **ANY_TARGET) as api:
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
    responses = Counter(log.read_text().splitlines())
    print("\n".join(f"{count:6} {response}" for response, count in sorted(responses.items())))
    worked = {response.rpartition(" ")[0] for response in responses if int(response.rpartition(" ")[2]) < 400}
    operations = {f"{method.upper()} {path}" for path, methods in described.items() for method in methods}
    calls = Counter(response.rpartition(" ")[0] for response in responses.elements())
    # A busy machine sends few or no requests to some operations: those do not count.
    idle = {operation for operation in operations - worked if calls[operation] >= OFTEN}
    assert idle == set(), "operations that never succeeded"
    print(f"{len(worked & operations)} of {len(operations)} operations succeeded")
