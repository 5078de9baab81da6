"""`python -m worker.maintenance`: beat and the maintenance tasks, without models and never behind a long job."""

import sys
import threading
from collections.abc import Callable
from typing import Any

from tpo.batches.advance import BatchAdvancer
from tpo.broker import (
    ADVANCE_BATCH,
    DELIVER_WEBHOOK,
    MAINTENANCE_QUEUE,
    NOTIFY_BATCHES,
    NOTIFY_WEBHOOKS,
    PURGE,
    SWEEP,
    JobNotifier,
)
from tpo.openai.batch_lines import OpenAILines
from tpo.settings import Settings
from tpo.store import Store
from worker.celery.app import controller, make_app
from worker.celery.consumer_watch import ConsumerWatch, watch_consumer
from worker.celery.scheduler import beat
from worker.drain import Drain
from worker.logs import log
from worker.startup import node_name, start
from worker.tasks.batches import NOTIFY_BATCHES_SECONDS, BatchTasks
from worker.tasks.cleaner import PURGE_SECONDS, Cleaner
from worker.tasks.rescuer import Rescuer
from worker.tasks.webhooks import NOTIFY_WEBHOOKS_SECONDS, WebhookSender

_FORCE_EXIT_SECONDS = 10.0
_SILENT_ROUNDS = 4
_MIN_SILENT_SECONDS = 5.0


def main(settings: Settings, store: Store) -> int:
    """Run the maintenance tasks until a stop signal arrives, and return the exit code."""
    name = node_name("maintenance")
    notifier = JobNotifier(settings.broker_url.get_secret_value())
    rescuer = Rescuer(settings, store, notifier)
    batches = BatchTasks(BatchAdvancer(store.engine, settings, notifier, OpenAILines()), notifier)
    sender = WebhookSender(settings, store, notifier)
    app = make_app(settings, MAINTENANCE_QUEUE, beat_schedule=_schedule(settings), beat_max_loop_interval=1)
    tasks: dict[str, Callable[..., None]] = {
        SWEEP: rescuer.sweep,
        NOTIFY_BATCHES: batches.notify_due,
        ADVANCE_BATCH: batches.advance,
        NOTIFY_WEBHOOKS: sender.notify_due,
        DELIVER_WEBHOOK: sender.deliver,
        PURGE: Cleaner(settings, store).purge,
    }
    consumer = ConsumerWatch(1, notifier.pending_maintenance_count)
    for task, run in tasks.items():
        app.task(name=task, typing=False)(consumer.track(run))
    drain = Drain()

    def ready() -> None:
        watch_consumer(consumer, drain, max(_MIN_SILENT_SECONDS, _SILENT_ROUNDS * settings.sweep_seconds))
        log.info("%s is ready", name)

    worker = controller(app, name=name, threads=1, on_ready=ready)
    drain.on_signals()
    drain.force_exit_after(_FORCE_EXIT_SECONDS)
    threading.Thread(target=beat, args=(app, drain), name="beat", daemon=True).start()
    worker.start()
    log.info("%s has ended", name)
    return drain.exit_code if drain.begun.is_set() else 1


def _schedule(settings: Settings) -> dict[str, Any]:
    # A message that was not consumed within its interval may expire: the next one does the same.
    intervals = {
        SWEEP: settings.sweep_seconds,
        NOTIFY_BATCHES: NOTIFY_BATCHES_SECONDS,
        NOTIFY_WEBHOOKS: NOTIFY_WEBHOOKS_SECONDS,
        PURGE: PURGE_SECONDS,
    }
    return {
        task: {"task": task, "schedule": seconds, "options": {"expires": seconds}}
        for task, seconds in intervals.items()
    }


if __name__ == "__main__":
    sys.exit(start(main))
