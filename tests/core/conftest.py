"""The worker harness fixture."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.worker import state as celery_state

from tests.support.databases import migrated_database
from tests.support.worker_harness import Bench, FlakyStore, Policy, RecordingNotifier, Reward
from tpo.db import connect
from tpo.settings import Settings
from worker.drain import Drain
from worker.job_runner import JobRunner
from worker.leases import Leases


@pytest.fixture
def bench(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Yield a worker without its process, on an empty SQLite database."""
    monkeypatch.setattr(celery_state, "should_stop", None)
    with migrated_database("sqlite", request, tmp_path) as url:
        settings = Settings(policy="scripted", reward_model="scripted", database_url=url)
        engine = connect(url)
        store, policy, reward, notifier, drain = FlakyStore(engine), Policy(), Reward(), RecordingNotifier(), Drain()
        leases = Leases(store, drain, "worker", settings)
        runner = JobRunner(settings, store, notifier, policy, reward, leases, drain, "worker")
        yield Bench(store, policy, reward, notifier, drain, leases, runner, settings)
        engine.dispose()
