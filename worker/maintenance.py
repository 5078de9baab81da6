"""`python -m worker.maintenance`: beat and the sweeper, without models and behind no long job."""

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
from worker.celery.consumer_watch import Consumer, watch_consumer
from worker.celery.scheduler import beat
from worker.drain import Drain
from worker.logs import log
from worker.startup import node_name, start
from worker.tasks.batches import NOTIFY_SECONDS, BatchTasks
from worker.tasks.cleaner import PURGE_SECONDS, Cleaner
from worker.tasks.rescuer import Rescuer
from worker.tasks.webhooks import RING_SECONDS as RING_WEBHOOKS_SECONDS
from worker.tasks.webhooks import WebhookSender

_END_SECONDS = 10.0
_SILENT_ROUNDS = 4
_SILENT_SECONDS = 5.0


def main(settings: Settings, store: Store) -> int:
    """Sweep until somebody asks for the end. Gives the exit code."""
    name = node_name("maintenance")
    notifier = JobNotifier(settings.broker_url.get_secret_value())
    sweeper = Rescuer(settings, store, notifier)
    batches = BatchTasks(BatchAdvancer(store.engine, settings, notifier, OpenAILines()), notifier)
    courier = WebhookSender(settings, store, notifier)
    app = make_app(settings, MAINTENANCE_QUEUE, beat_schedule=_schedule(settings), beat_max_loop_interval=1)
    tasks: dict[str, Callable[..., None]] = {
        SWEEP: sweeper.sweep,
        NOTIFY_BATCHES: batches.notify_due,
        ADVANCE_BATCH: batches.advance,
        NOTIFY_WEBHOOKS: courier.notify_due,
        DELIVER_WEBHOOK: courier.deliver,
        PURGE: Cleaner(settings, store).purge,
    }
    consumer = Consumer(1, notifier.pending_maintenance_count)
    for task, do in tasks.items():
        app.task(name=task, typing=False)(consumer.track(do))
    drain = Drain()

    def ready() -> None:
        watch_consumer(consumer, drain, max(_SILENT_SECONDS, _SILENT_ROUNDS * settings.sweep_seconds))
        log.info("%s is ready", name)

    worker = controller(app, name=name, threads=1, on_ready=ready)
    drain.on_signals()
    drain.force_exit_after(_END_SECONDS)
    threading.Thread(target=beat, args=(app, drain), name="beat", daemon=True).start()
    worker.start()
    log.info("%s has ended", name)
    return drain.exit_code if drain.begun.is_set() else 1


def _schedule(settings: Settings) -> dict[str, Any]:
    # A message that nobody took in time is worth nothing: the next one does the same.
    rounds = {
        SWEEP: settings.sweep_seconds,
        NOTIFY_BATCHES: NOTIFY_SECONDS,
        NOTIFY_WEBHOOKS: RING_WEBHOOKS_SECONDS,
        PURGE: PURGE_SECONDS,
    }
    return {task: {"task": task, "schedule": often, "options": {"expires": often}} for task, often in rounds.items()}


if __name__ == "__main__":
    sys.exit(start(main))
