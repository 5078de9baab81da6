"""An attacker with the broker's address can neither stop a worker nor hold jobs back with remote control."""

from typing import Any

import pytest
from celery import Celery
from celery.app.control import Control

from testing.processes import System
from tpo.broker import MAINTENANCE_QUEUE, RUN_JOB, queue_name
from tpo.settings import SCRIPTED

pytestmark = pytest.mark.processes

COMMANDS: list[tuple[str, dict[str, Any]]] = [
    ("shutdown", {}),
    ("rate_limit", {"task_name": RUN_JOB, "rate_limit": "1/h"}),
    ("time_limit", {"task_name": RUN_JOB, "hard": 0.01}),
    ("cancel_consumer", {"queue": MAINTENANCE_QUEUE}),
    ("cancel_consumer", {"queue": queue_name(SCRIPTED)}),
    ("add_consumer", {"queue": "elsewhere"}),
    ("pool_shrink", {"n": 4}),
    ("pool_grow", {"n": 400}),
    ("pool_restart", {}),
    ("autoscale", {"max": 1, "min": 0}),
    ("revoke", {"task_id": "x", "terminate": True}),
    ("terminate", {"task_id": "x", "signal": "KILL"}),
    ("disable_events", {}),
    ("election", {"id": "x", "topic": "y", "action": None}),
    ("memdump", {}),
    ("objgraph", {}),
    ("conf", {}),
    ("hello", {"from_node": "x"}),
]


def test_remote_control_changes_nothing(sqlite_system: System) -> None:
    system = sqlite_system
    maintenance, worker = system.maintenance(), system.worker(scripted_latency=0.05)
    app = Celery("attacker", broker=system.broker.url, set_as_current=False)
    control: Control = app.control
    for command, arguments in COMMANDS:
        control.broadcast(command, arguments=arguments)
    # Commands are handled in order, so the reply to a ping means that all of them were handled.
    assert {name.partition("-")[2].partition("-")[0] for reply in control.ping(timeout=10) for name in reply} == {
        "worker",
        "maintenance",
    }
    replies = control.broadcast("rate_limit", COMMANDS[1][1], reply=True, timeout=10, limit=2)
    assert [reply for each in replies for reply in each.values()] == [{"error": "remote control is switched off"}] * 2
    job_ids = [system.submit(seed=seed) for seed in range(8)]
    for job_id in job_ids:
        assert system.wait_for_end(job_id).status == "completed"
    queues = control.inspect(timeout=10).active_queues()
    assert sorted(q["name"] for each in queues.values() for q in each) == [queue_name(SCRIPTED), MAINTENANCE_QUEUE]
    assert all("Traceback" not in process.output for process in (maintenance, worker))
    assert [process.popen.poll() for process in (maintenance, worker)] == [None, None]
    app.close()
    assert (worker.stop(), maintenance.stop()) == (0, 0)
