"""What the tests of single parts share."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from celery.worker import state as celery_state

from tests.support.worker_harness import Bench, FlakyStore, Policy, RecordingNotifier, Reward
from tpo.db import connect
from tpo.settings import Settings
from worker.drain import Drain
from worker.job_runner import JobRunner
from worker.leases import Leases


@pytest.fixture
def bench(sqlite_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    monkeypatch.setattr(celery_state, "should_stop", None)
    shutil.copy(sqlite_template, tmp_path / "tpo.db")
    settings = Settings(policy="scripted", reward_model="scripted", database_url=f"sqlite:///{tmp_path}/tpo.db")
    engine = connect(settings.database_url.get_secret_value())
    store, policy, reward, bells, drain = FlakyStore(engine), Policy(), Reward(), RecordingNotifier(), Drain()
    leases = Leases(store, drain, "worker", settings)
    runner = JobRunner(settings, store, bells, policy, reward, leases, drain, "worker")
    yield Bench(store, policy, reward, bells, drain, leases, runner, settings)
    engine.dispose()
