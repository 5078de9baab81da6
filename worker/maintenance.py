"""`python -m worker.maintenance`: the maintenance loops, without models and never behind a long job."""

import sys

from tpo.batches.advance import BatchAdvancer
from tpo.broker import ADVANCE_BATCH, MAINTENANCE_QUEUE, JobNotifier
from tpo.openai.batch_lines import OpenAILines
from tpo.settings import Settings
from tpo.store import Store
from worker.celery.app import controller, make_app
from worker.celery.consumer_watch import ConsumerWatch, watch_consumer
from worker.drain import Drain
from worker.logs import log
from worker.loops import Loop, LoopWatch
from worker.startup import node_name, start
from worker.tasks.batches import ADVANCE_BATCHES_SECONDS, BatchTasks
from worker.tasks.cleaner import LONG_ROUND_SECONDS, PURGE_SECONDS, Cleaner
from worker.tasks.rescuer import Rescuer
from worker.tasks.webhooks import SEND_WEBHOOKS_SECONDS, WebhookSender

_FORCE_EXIT_SECONDS = 10.0
_SILENT_ROUNDS = 4
_MIN_SILENT_SECONDS = 5.0


def main(settings: Settings, store: Store) -> int:
    """Run the maintenance tasks until a stop signal arrives, and return the exit code."""
    name = node_name("maintenance")
    notifier = JobNotifier(settings.broker_url.get_secret_value())
    batches = BatchTasks(BatchAdvancer(store.engine, settings, notifier, OpenAILines()))
    advancing = Loop("batches", ADVANCE_BATCHES_SECONDS, batches.advance)
    loops = [
        Loop("rescuer", settings.sweep_seconds, Rescuer(settings, store, notifier).sweep),
        Loop("webhooks", SEND_WEBHOOKS_SECONDS, WebhookSender(settings, store).send_due),
        advancing,
        Loop("cleaner", PURGE_SECONDS, Cleaner(settings, store).purge, long_seconds=LONG_ROUND_SECONDS),
    ]

    def advance_batch(batch_id: str) -> None:
        batches.notify(batch_id)
        advancing.wake()

    app = make_app(settings, MAINTENANCE_QUEUE)
    consumer = ConsumerWatch(1, notifier.pending_maintenance_count)
    app.task(name=ADVANCE_BATCH, typing=False)(consumer.track(advance_batch))
    drain = Drain()

    def ready() -> None:
        watch_consumer(consumer, drain, max(_MIN_SILENT_SECONDS, _SILENT_ROUNDS * settings.sweep_seconds))
        log.info("%s is ready", name)

    worker = controller(app, name=name, threads=1, on_ready=ready)
    drain.on_signals()
    drain.force_exit_after(_FORCE_EXIT_SECONDS)
    LoopWatch(loops, drain).start()
    for loop in loops:
        loop.start()
    worker.start()
    for loop in loops:
        loop.stop()
    log.info("%s has ended", name)
    return drain.exit_code if drain.begun.is_set() else 1


if __name__ == "__main__":
    sys.exit(start(main))
