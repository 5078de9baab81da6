"""`python -m worker`: serve one policy and one reward model until a stop signal arrives."""

import contextlib
import os
import sys
import threading

from tpo.backends import LoadedPolicy, LoadedRewardModel
from tpo.broker import RUN_JOB, JobNotifier, queue_name
from tpo.core.errors import LeaseLostError, StoreUnavailableError
from tpo.settings import Settings
from tpo.store import Store
from worker.celery.app import controller, make_app
from worker.celery.consumer_watch import ConsumerWatch, watch_consumer
from worker.drain import Drain
from worker.job_runner import JobRunner
from worker.leases import Leases
from worker.logs import log
from worker.model_loading import load
from worker.model_watch import watch_models
from worker.queue_poller import QueuePoller
from worker.startup import node_name, start

_GRACE_SECONDS = 4.0
"""Time for an interrupted model call to stop before the process ends without it."""

_SILENT_ROUNDS = 4
"""A queued job is notified again every `renotify_seconds`: a consumer that misses this many rounds is stalled."""

_UNHEALTHY_SECONDS = 6.0
"""A model that is unhealthy for this long ends the process, unless a job's thread noticed and ended it first."""


def main(settings: Settings, store: Store) -> int:
    """Load the models, then serve. Returns the exit code. Raises ModelRefusedError."""
    policy, reward = load(settings)
    return serve(settings, store, policy, reward)


def serve(settings: Settings, store: Store, policy: LoadedPolicy, reward: LoadedRewardModel) -> int:
    """Run jobs with these models until a stop signal arrives, then hand back running jobs. Returns the exit code."""
    name = node_name("worker")
    notifier = JobNotifier(settings.broker_url.get_secret_value())
    drain = Drain()
    leases = Leases(store, drain, name, settings)
    runner = JobRunner(settings, store, notifier, policy, reward, leases, drain, name)
    app = make_app(settings, queue_name(settings.policy))
    consumer = ConsumerWatch(settings.concurrency, lambda: notifier.pending_count(settings.policy))
    app.task(name=RUN_JOB, typing=False)(consumer.track(runner.run_job))

    poller = QueuePoller(
        consumer,
        drain,
        runner.next_waiting,
        runner.run_waiting_job,
        runner.notify,
        silent_seconds=settings.renotify_seconds,
    )

    def ready() -> None:
        leases.start()
        poller.start()
        watch_consumer(consumer, drain, _SILENT_ROUNDS * settings.renotify_seconds)
        watch_models(
            lambda: policy.healthy and reward.healthy,
            drain,
            lambda: _deregister(store, leases, name),
            _UNHEALTHY_SECONDS,
        )
        log.info("%s is ready: %d slots, %s, %s", name, settings.concurrency, settings.policy, settings.reward_model)

    worker = controller(app, name=name, threads=settings.concurrency, on_ready=ready)
    drain.on_signals()
    drain.force_exit_after(settings.drain_seconds + 2 * _GRACE_SECONDS)
    threading.Thread(
        target=_drain_jobs, args=(settings, drain, leases, runner, name), name="drain", daemon=True
    ).start()
    worker.start()
    leases.wait_until_idle(settings.drain_seconds + 2 * _GRACE_SECONDS)  # for jobs on threads that Celery does not know
    _deregister(store, leases, name)
    policy.close()
    reward.close()
    log.info("%s has ended", name)
    return drain.exit_code if drain.begun.is_set() else 1


def _drain_jobs(settings: Settings, drain: Drain, leases: Leases, runner: JobRunner, name: str) -> None:
    """Let running calls finish, then interrupt them, then hand back hung jobs and exit without their threads."""
    drain.begun.wait()
    log.info("draining: %d jobs", len(leases.held()))
    if leases.wait_until_idle(settings.drain_seconds):
        return
    drain.interrupting.set()
    if leases.wait_until_idle(_GRACE_SECONDS):
        return
    for lease in leases.held():
        log.warning("%s hangs; it is handed back without its thread", lease.job_id)
        with contextlib.suppress(LeaseLostError, StoreUnavailableError):
            runner.hand_back(lease)
            runner.notify_next()
    _deregister(runner.store, leases, name)
    os._exit(drain.exit_code)


def _deregister(store: Store, leases: Leases, name: str) -> None:
    """Remove this worker from the database. Stop the renewals first, because each of them registers it again."""
    leases.stop()
    with contextlib.suppress(StoreUnavailableError):
        store.workers.deregister(name)


if __name__ == "__main__":
    sys.exit(start(main))
