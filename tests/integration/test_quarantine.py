"""A job whose model call kills its process, next to 15 others, in real processes with 16 slots."""

import pytest

from testing.processes import Process, System, timeless, uninterrupted
from testing.waiting import eventually
from tests.support.poisonous_worker import POISON

pytestmark = pytest.mark.processes


@pytest.mark.slow
def test_poison_job_fails_and_15_others_complete(system: System) -> None:
    system.maintenance(renotify_seconds=0.5)
    innocent = [system.submit(seed=seed, notify=False) for seed in range(8)]
    poison = system.submit(POISON, notify=False)
    innocent += [system.submit(seed=seed, notify=False) for seed in range(8, 15)]
    workers: list[Process] = []

    def all_ended() -> bool:
        """Restart the worker whenever it has died, as its supervisor would."""
        if not workers or workers[-1].popen.poll() is not None:
            options = {"concurrency": 16, "lease_seconds": 4, "scripted_latency": 0.3}
            workers.append(system.start("-m", "tests.support.poisonous_worker", **options))
        return all(system.store.jobs.get(job_id).completed_at for job_id in [*innocent, poison])

    eventually(all_ended, why="every job should end")
    failed = system.store.jobs.get(poison)
    assert (failed.status, failed.error_code, failed.attempt) == ("failed", "worker_lost", 3)
    for job_id in innocent:
        job, state = system.store.jobs.get(job_id), system.store.jobs.state(job_id)
        assert (job.status, job.error_code) == ("completed", None)
        assert timeless(state) == uninterrupted(state)
    deaths = sum(worker.popen.poll() is not None for worker in workers)
    assert 1 + 3 <= deaths <= 3 + 3, "one to three shared deaths, and its three attempts"
