"""Workers without faults: they run jobs concurrently, stop them on request and log no text."""

import base64
import json
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import redis

from testing.processes import System, marker, timeless, uninterrupted
from testing.waiting import HANG_SECONDS, eventually
from tpo.broker import JobNotifier, queue_name
from tpo.core.errors import BrokerUnavailableError
from tpo.settings import SCRIPTED

pytestmark = pytest.mark.processes


def decoded(message: bytes) -> str:
    """Return a message of the broker, followed by its decoded body."""
    return message.decode() + base64.b64decode(json.loads(message)["body"]).decode()


def test_job_completes_and_no_text_leaves_the_database(sqlite_system: System) -> None:
    system = sqlite_system
    password, word = marker(), marker()
    with redis.Redis(port=system.broker.port) as client:
        client.config_set("requirepass", password)
    system.broker.url = f"redis://:{password}@127.0.0.1:{system.broker.port}/0"
    system.environment["TPO_BROKER_URL"] = system.broker.url
    with redis.Redis.from_url(system.broker.url) as client, client.pubsub() as events:
        events.psubscribe("*")
        job_id = system.submit(f"Tell me of the {word}.")
        messages = client.lrange(queue_name(SCRIPTED), 0, -1)
        maintenance = system.maintenance()
        worker = system.worker()
        assert system.wait_for_end(job_id).status == "completed"
        assert [process.stop() for process in (worker, maintenance)] == [0, 0]
        published = ""
        while event := events.get_message(timeout=0.5):
            published += decoded(event["data"]) if event["type"] == "pmessage" else ""
    state = system.store.jobs.state(job_id)
    assert timeless(state) == uninterrupted(state)
    message = decoded(messages[0])
    assert json.loads(messages[0])["headers"]["argsrepr"] == f"['{job_id}']"
    assert f'[["{job_id}"], {{}}' in message
    assert '"task-started"' in published
    assert job_id in published
    logs = "".join(process.output for process in system.processes)
    assert job_id in logs
    texts = [word, password, *(c.text for c in state.candidates)]
    texts += [note.text for i in state.iterations for note in (i.critique, i.gradient) if note]
    for place in (logs, message, published):
        assert not [text for text in texts if text in place or json.dumps(text)[1:-1] in place]


def test_twenty_jobs_run_concurrently(system: System) -> None:
    system.worker(concurrency=20, scripted_latency=0.7)
    job_ids = [system.submit(seed=seed) for seed in range(20)]
    jobs = [system.wait_for_end(job_id) for job_id in job_ids]
    assert {job.status for job in jobs} == {"completed"}
    assert max(job.started_at or 0 for job in jobs) < min(job.completed_at or 0 for job in jobs)


def test_busy_worker_leaves_wakeups_to_an_idle_one(sqlite_system: System) -> None:
    system = sqlite_system
    system.worker(concurrency=1, scripted_latency=3600)
    running = system.submit()
    system.wait_for_status(running, "in_progress")
    waiting = [system.submit(seed=seed) for seed in (1, 2, 3)]
    system.worker(concurrency=3)
    for job_id in waiting:
        system.wait_for_end(job_id)
    assert system.store.jobs.get(running).status == "in_progress"


def test_duplicate_wakeups_run_a_job_once(system: System) -> None:
    for _ in range(2):
        system.worker()
    job_id = system.submit(notify=False)
    for _ in range(20):
        system.notify_job(job_id)
    job = system.wait_for_end(job_id)
    system.wait_for_end(system.submit(seed=1))
    assert (job.status, job.attempt, job.fence) == ("completed", 1, 1)
    assert len(system.calls()) == 2 * len(system.store.jobs.state(job_id).calls)


def test_cancel_interrupts_a_call_and_ends_writes(system: System) -> None:
    worker = system.worker(scripted_latency=600)  # only an interrupted call ends within the test
    job_id = system.submit()
    eventually(system.calls, why="a model call should start")
    assert system.store.jobs.cancel(job_id).status == "cancelling"
    job = system.wait_for_end(job_id)
    worker.wait_for(f"{job_id} cancelled")
    assert job.status == system.store.jobs.get(job_id).status == "cancelled"
    assert [e.type for e in system.store.jobs.events(job_id)][-2:] == ["job.cancelling", "job.cancelled"]
    assert system.store.jobs.state(job_id).calls == ()


@pytest.fixture
def sighup_enabled() -> Iterator[None]:
    """Let new processes receive SIGHUP, even if the tests run under nohup."""
    old = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, old)


@pytest.mark.usefixtures("sighup_enabled")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_ends_an_idle_worker(sqlite_system: System, number: int) -> None:
    processes = [sqlite_system.worker(drain_seconds=600), sqlite_system.maintenance()]
    assert len(eventually(lambda: sqlite_system.store.workers.live(10), why="the worker should be registered")) == 1
    assert [process.stop(number) for process in processes] == [0, 0]
    # The forced exit after the deadline would log nothing.
    assert all("has ended" in process.output for process in processes)
    assert not sqlite_system.store.workers.live(10)


@pytest.mark.parametrize(
    ("module", "settings", "code", "message"),
    [
        ("worker", {"concurrency": 0}, 2, "TPO_CONCURRENCY: Input should be greater than or equal to 1"),
        ("worker.maintenance", {"database_url": "mysql://u:secret@h/d"}, 2, "TPO_DATABASE_URL must start with"),
        ("worker", {"policy": "/no/such/folder"}, 1, "/no/such/folder"),
        ("worker", {"database_url": "sqlite:///empty.db"}, 1, "tpo db upgrade"),
    ],
)
def test_invalid_configuration_is_a_one_line_error(
    sqlite_system: System, module: str, settings: dict[str, str], code: int, message: str
) -> None:
    process = sqlite_system.start("-m", module, **settings)
    assert process.popen.wait(timeout=HANG_SECONDS) == code
    assert message in process.output
    assert "Traceback" not in process.output
    assert "secret" not in process.output
    assert not sqlite_system.store.workers.live(60)


def test_paused_job_stops_within_a_call_and_resumes_elsewhere(system: System) -> None:
    first = system.worker(scripted_latency=1)
    job_id = system.submit()
    eventually(lambda: len(system.calls()) >= 2, why="the second call should be running")
    system.store.jobs.pause(job_id)
    running = len(system.calls())
    system.wait_for_status(job_id, "paused")
    calls = len(system.calls())
    assert calls <= running + 1  # one call may have been allowed just before the pause
    first.stop()
    system.worker()
    job = system.store.jobs.resume(job_id)
    assert job.attempt == 0
    system.notify_job(job_id)
    assert system.wait_for_end(job_id).status == "completed"
    state = system.store.jobs.state(job_id)
    assert timeless(state) == uninterrupted(state)
    assert len(system.calls()) - calls <= len(state.calls)
    events = [event.type for event in system.store.jobs.events(job_id)]
    assert (events.count("job.paused"), events.count("job.resumed")) == (1, 1)


def test_immediate_pause_and_resume_lose_nothing(system: System) -> None:
    system.worker(scripted_latency=0.2)
    system.maintenance()
    job_id = system.submit(max_iterations=10)
    for _ in range(5):
        system.wait_for_status(job_id, "in_progress")
        system.store.jobs.pause(job_id)
        system.store.jobs.resume(job_id)
    assert system.wait_for_end(job_id).status == "completed"
    assert timeless(system.store.jobs.state(job_id)) == uninterrupted(system.store.jobs.state(job_id))


def test_expired_jobs_are_purged(sqlite_system: System) -> None:
    system = sqlite_system
    ended, live = system.submit(notify=False), system.submit(notify=False)
    system.store.jobs.cancel(ended)
    system.start(
        "-c",
        "import worker.tasks.cleaner as r; r.PURGE_SECONDS = 0.2; import worker.maintenance as m; "
        "m.PURGE_SECONDS = 0.2; import sys; from worker.startup import start; sys.exit(start(m.main))",
        retention_days=1e-9,
    )
    eventually(lambda: len(system.store.jobs.page(limit=9)) == 1, why="the ended job should be deleted")
    assert system.store.jobs.get(live).status == "queued"


def test_worker_waits_for_its_broker_and_can_be_stopped(sqlite_system: System) -> None:
    system = sqlite_system
    system.broker.stop()
    stopped = [system.start("-m", "worker"), system.start("-m", "worker.maintenance")]
    waiting = system.start("-m", "worker")
    for process in (*stopped, waiting):
        process.wait_for("cannot be reached")
    assert [process.stop() for process in stopped] == [0, 0]
    job_id = system.submit(notify=False)
    system.broker.start()
    system.maintenance()
    assert system.wait_for_end(job_id).status == "completed"
    assert waiting.stop() == 0


def test_worker_waits_for_a_broker_without_memory(sqlite_system: System) -> None:
    system = sqlite_system
    system.broker.command("CONFIG", "SET", "maxmemory", "1")
    full = [system.start("-m", "worker"), system.start("-m", "worker.maintenance")]
    for process in full:
        process.wait_for("The broker's memory is full")
    job_id = system.submit()
    system.broker.command("CONFIG", "SET", "maxmemory", "0")
    assert system.wait_for_end(job_id).status == "completed"
    assert [process.stop() for process in full] == [0, 0]
    assert not [process.output for process in full if "Traceback" in process.output]


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (":other-word@127.0.0.1:{port}/0", "The broker refuses the user or password"),
        (":the-word@127.0.0.1:{port}/99", "The broker has no database of the number"),
    ],
)
def test_broker_errors_name_the_cause(sqlite_system: System, address: str, message: str) -> None:
    broker = sqlite_system.broker
    broker.command("CONFIG", "SET", "requirepass", "the-word")
    url = f"redis://{address.format(port=broker.port)}"
    notifier = JobNotifier(url)
    for call in (
        notifier.ping,
        lambda: notifier.notify_job("job_1", SCRIPTED),
        lambda: notifier.pending_count(SCRIPTED),
    ):
        with pytest.raises(BrokerUnavailableError, match=message):
            call()
    notifier.close()
    process = sqlite_system.start("-m", "worker", broker_url=url)
    process.wait_for(message)
    assert process.stop() == 0
    assert "word@" not in process.output


def test_worker_waits_for_its_database_and_can_be_stopped(sqlite_system: System) -> None:
    process = sqlite_system.start("-m", "worker", database_url="postgresql+psycopg://nobody:word@127.0.0.1:1/none")
    process.wait_for("The database cannot be reached")
    assert process.stop() == 0
    assert "word" not in process.output


@pytest.mark.parametrize("module", ["worker.maintenance", "worker.tasks", "worker.__main__"])
def test_worker_modules_do_not_import_torch(module: str) -> None:
    check = f"import sys, {module}; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], timeout=HANG_SECONDS).returncode == 0
