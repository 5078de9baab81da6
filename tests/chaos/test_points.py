"""A worker is killed at every labelled point of a step, one point after the other."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from testing.processes import Process, running_system
from testing.waiting import HANG_SECONDS, eventually
from tests.chaos import points
from tests.chaos.verdict import judge


@pytest.mark.processes
@pytest.mark.slow
def test_worker_killed_at_every_point_changes_nothing(migrated_url: str, tmp_path: Path) -> None:
    folder = tmp_path / "points"
    with running_system(migrated_url, tmp_path) as system:

        def start_worker() -> Process:
            return system.start(
                *("-m", "tests.chaos.process", "worker", str(folder)), lease_seconds=2, scripted_latency=0.1
            )

        def submit(iterations: int) -> str:
            accepted.append(system.submit(max_attempts=1000, seed=len(accepted), max_iterations=iterations))
            return accepted[-1]

        def pause() -> None:
            # Another recorded step shows that a running worker has the job. A killed worker would not release it.
            recorded = len(system.store.jobs.state(long[0]).calls)
            eventually(
                lambda: len(system.store.jobs.state(long[0]).calls) > recorded, why="another step should be recorded"
            )
            system.store.jobs.pause(long[0])

        accepted: list[str] = []
        system.maintenance()
        for _ in range(3):
            start_worker().wait_for("is ready")
        # Long jobs pass all points of a step by themselves. While the lease of one that was hit expires, the others
        # continue. They are cancelled at the end.
        long = [submit(50) for _ in range(3)]
        triggers: dict[str, Callable[[], object]] = {
            "claim": lambda: submit(0),
            "release": pause,
            "finish": lambda: submit(0),
        }
        for label in points.LABELS["worker"]:
            points.arm(folder, label, signal.SIGKILL)
            triggers.get(label.split(".")[1], lambda: None)()
            [(reached, pid)] = eventually(lambda: points.reached(folder), why=f"a worker should reach {label}")
            assert reached == label
            assert system.process_of(pid).popen.wait(timeout=HANG_SECONDS) == -signal.SIGKILL
            start_worker()
            if "release" in label:
                system.wait_for_status(long[0], "paused")
                system.store.jobs.resume(long[0])
                system.notify_job(long[0])
        for job_id in long:
            system.store.jobs.cancel(job_id)
        for job_id in accepted:
            assert system.wait_for_end(job_id).status == ("cancelled" if job_id in long else "completed")
        verdict = judge(system.engine, accepted, {}, system.calls())
    assert verdict.wrong == []
