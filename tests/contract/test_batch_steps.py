"""Each step of a batch reads a bounded part of its file, on both databases, whatever the file contains."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pytest
from sqlalchemy import Engine

from testing.jobs import SERVES, claim, create
from tests.support.worker_harness import RecordingNotifier
from tpo.batches import advance
from tpo.batches.advance import BatchAdvancer
from tpo.batches.lines import RawLine, split_lines
from tpo.batches.tables import Batch
from tpo.openai.batch_lines import OpenAILines
from tpo.settings import Settings
from tpo.store import Store
from worker.tasks.batches import BatchTasks
from worker.tasks.rescuer import Rescuer

LINE = b'{"custom_id": "%d", "method": "POST", "url": "/v1/responses", "body": {"model": "policy", "input": "s"}}'
SETTINGS = Settings(
    policy=SERVES["model"], reward_model=SERVES["reward_model"], max_input_characters=100, renotify_seconds=3600
)
LONGEST = SETTINGS.max_body_bytes
PART = 256 * 1024


class Work(NamedTuple):
    """Bytes and lines read by one step."""

    size: int
    lines: int


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Work]:
    """Return the work of all steps so far."""
    done: list[Work] = []

    def counted(parts: Iterable[bytes], longest: int, *, inside_line: bool = False) -> Iterator[RawLine]:
        done.append(Work(0, 0))

        def sized() -> Iterator[bytes]:
            for part in parts:
                done[-1] = done[-1]._replace(size=done[-1].size + len(part))
                yield part

        for line in split_lines(sized(), longest, inside_line=inside_line):
            done[-1] = done[-1]._replace(lines=done[-1].lines + 1)
            yield line

    monkeypatch.setattr(advance, "split_lines", counted)
    return done


def start(store: Store, *parts: bytes) -> str:
    """Upload a file and create a batch of it. Returns the batch's id."""
    file_id = store.files.begin("lines.jsonl", "batch")
    data = b"".join(parts)
    for offset in range(0, len(data), PART):
        store.files.append_part(file_id, data[offset : offset + PART])
    store.files.complete(file_id)
    options = {"endpoint": "/v1/responses", "window": "24h", "seconds": 3600.0, "metadata": {}}
    return store.batches.create(input_file_id=file_id, **options).batch.id  # type: ignore[arg-type]


def tasks_of(engine: Engine, settings: Settings = SETTINGS) -> BatchTasks:
    return BatchTasks(BatchAdvancer(engine, settings, RecordingNotifier(), OpenAILines()))


def end(store: Store, engine: Engine, batch_id: str, settings: Settings = SETTINGS) -> Batch:
    """Advance a batch until its jobs are created or it has ended."""
    advancer = BatchAdvancer(engine, settings, RecordingNotifier(), OpenAILines())
    while advancer.advance(batch_id):
        pass
    return store.batches.get(batch_id)


def test_blank_lines_delay_no_other_batch(engine: Engine, store: Store, steps: list[Work]) -> None:
    large = start(store.for_tenant("hostile"), b"\n" * 20_000_000)
    small = start(store, LINE % 1)
    lost = claim(store, create(store), seconds=-1)[0].job_id
    tasks, rescuer = tasks_of(engine), Rescuer(SETTINGS, store, RecordingNotifier())
    tasks.notify(large)
    tasks.notify(small)
    for _ in range(3):
        assert tasks.advance()
        rescuer.sweep()
    assert store.for_tenant("hostile").batches.get(large).status == "validating"
    assert store.batches.get(small).total == 1
    assert next(job.input[0].content for job in store.jobs.page(limit=9, statuses=["queued"])) == "s"
    assert store.jobs.get(lost).status == "queued", "the rescuer runs between two steps"
    assert max(step.lines for step in steps) <= 50_000
    assert max(step.size for step in steps) <= 2**20 + PART


@pytest.mark.parametrize("ended", [True, False])
def test_bounded_steps_read_every_line(
    engine: Engine, store: Store, steps: list[Work], monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    monkeypatch.setattr(advance, "_STEP_LINES", 7)
    monkeypatch.setattr(advance, "_STEP_BYTES", 1000)
    overlong = b"x" * (3 * LONGEST)
    parts = [b"\n" * 20, LINE % 1, b"\n", overlong, b"\n\r\n \n", LINE % 2, b"\n" * 30, LINE % 3, b"\n", overlong]
    batch = end(store, engine, start(store, *parts, b"\n" * ended))
    assert (batch.status, batch.total, batch.failed) == ("in_progress", 5, 2)
    jobs = store.jobs.page(limit=9)
    assert len(jobs) == 3
    assert max(step.lines for step in steps) <= 7
    assert max(step.size for step in steps) <= LONGEST + 2 * PART


def test_batch_cancelled_while_counted_lists_every_line(
    engine: Engine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advance, "_STEP_LINES", 2)
    batch_id = start(store, b"\n".join(LINE % number for number in range(5)))
    advancer = BatchAdvancer(engine, SETTINGS, RecordingNotifier(), OpenAILines())
    assert advancer.advance(batch_id)
    assert store.batches.get(batch_id).total == 2
    store.batches.cancel(batch_id)
    batch = end(store, engine, batch_id)
    assert (batch.status, batch.total, batch.failed) == ("cancelled", 5, 5)


def test_too_many_or_no_requests_are_refused_across_steps(
    engine: Engine, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advance, "_STEP_LINES", 2)
    many = start(store, b"\n".join(LINE % number for number in range(5)))
    few = SETTINGS.model_copy(update={"max_batch_lines": 4})
    assert end(store, engine, many, few).error_code == "too_many_requests"
    assert end(store, engine, start(store, b"\n" * 9)).error_code == "empty_file"
