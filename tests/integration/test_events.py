"""Events of a job over HTTP: list, stream, cut connections, slow subscribers and an unreachable database."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest

from api.streaming.broadcaster import EventBroadcaster, Subscription
from api.streaming.sse import EventStream
from testing.jobs import create
from testing.ports import free_port
from testing.processes import System, running_system
from testing.services import postgres_server
from testing.waiting import HANG_SECONDS, eventually
from tests.integration.test_api_process import Api, started_api
from tests.support.api_client import assert_problem
from tpo.core.errors import StoreUnavailableError
from tpo.db import schema
from tpo.store import Store

STREAM = {"accept": "text/event-stream"}


@pytest.fixture
def api(system: System) -> Iterator[Api]:
    with started_api(system) as api:
        yield api


def frames(response: httpx.Response) -> Iterator[dict[str, str]]:
    """Yield the frames of a stream, without comments."""
    frame: dict[str, str] = {}
    for line in response.iter_lines():
        if line and not line.startswith(":"):
            name, _, value = line.partition(": ")
            frame[name] = value
        elif frame:
            yield frame
            frame = {}


def read(api: Api, job_id: str, **params: Any) -> list[dict[str, str]]:
    with api.client.stream("GET", f"/v1/jobs/{job_id}/events", params={"stream": True, **params}) as response:
        return list(frames(response))


def test_list_paginates_by_number(system: System, api: Api) -> None:
    job_id = api.submit().json()["id"]
    api.client.post(f"/v1/jobs/{job_id}/pause")
    api.client.post(f"/v1/jobs/{job_id}/cancel")
    path = f"/v1/jobs/{job_id}/events"
    listed = api.client.get(path).json()
    assert [e["type"] for e in listed["data"]] == ["job.queued", "job.paused", "job.cancelled"]
    assert [e["sequence_number"] for e in listed["data"]] == [1, 2, 3]
    assert listed["data"][0].keys() == {"object", "type", "sequence_number", "job_id", "created_at"}
    assert listed["has_more"] is False
    page = api.client.get(path, params={"starting_after": 1, "limit": 1}).json()
    assert ([e["sequence_number"] for e in page["data"]], page["has_more"]) == ([2], True)
    assert api.client.get(path, params={"starting_after": 99}).json()["data"] == []
    both = api.client.get(path, params={"starting_after": 1}, headers={"last-event-id": "2"}).json()
    assert [e["sequence_number"] for e in both["data"]] == [3], "the header should take precedence"
    for params in ({"limit": 0}, {"limit": 1001}, {"starting_after": -1}, {"starting_after": "x"}, {"after": 1}):
        assert_problem(api.client.get(path, params=params), 422, "invalid_input", next(iter(params)))
    rejected = api.client.get(path, headers={"last-event-id": "x"})
    assert_problem(rejected, 422, "invalid_input", "Last-Event-ID")


def test_stream_sends_all_events_of_a_job_and_closes(system: System, api: Api) -> None:
    system.worker(scripted_latency=0.05)
    job_id = api.submit().json()["id"]
    with api.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["x-request-id"]
        sent = list(frames(response))
    listed = api.client.get(f"/v1/jobs/{job_id}/events", params={"limit": 1000}).json()["data"]
    assert [json.loads(frame["data"]) for frame in sent] == listed
    assert [int(frame["id"]) for frame in sent] == list(range(1, len(listed) + 1))
    assert [frame["event"] for frame in sent] == [event["type"] for event in listed]
    assert sent[-1]["event"] == "job.completed"
    assert all("error" not in event for event in listed)
    # For an ended job: the same events immediately, from any number, and none after the last one.
    assert read(api, job_id) == sent
    assert read(api, job_id, starting_after=3) == sent[3:]
    assert read(api, job_id, starting_after=len(sent)) == read(api, job_id, starting_after=10_000) == []


def test_stream_cut_anywhere_resumes_without_a_gap(system: System, api: Api) -> None:
    system.worker(scripted_latency=0.02)
    job_id = api.submit().json()["id"]
    seen: list[int] = []
    cut = 1
    while True:
        headers = {**STREAM, **({"last-event-id": str(seen[-1])} if seen else {})}
        with api.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=headers) as response:
            received = b""
            for piece in response.iter_raw():
                received += piece
                if len(received) > 150 * cut:
                    break  # in the middle of a frame
        whole = received.decode().rpartition("\n\n")[0]
        seen += [int(line[4:]) for line in whole.splitlines() if line.startswith("id: ")]
        cut += 1
        if "job.completed" in whole:
            break
        assert cut < 200
    last = system.store.jobs.get(job_id).last_event
    assert seen == list(range(1, last + 1))
    assert cut > 2


def test_stream_sends_keepalive_comments(sqlite_system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    from api.streaming import sse
    from tests.support.api_client import api_client

    monkeypatch.setattr(sse, "COMMENT_SECONDS", 0.05)
    url = str(sqlite_system.engine.url)
    with api_client(database_url=url, broker_url=sqlite_system.broker.url) as client, ThreadPoolExecutor(1) as pool:
        job_id = client.post("/v1/jobs", json={"input": "x"}).json()["id"]
        streamed = pool.submit(client.get, f"/v1/jobs/{job_id}/events?stream=true")
        broadcaster = client.app.state.broadcaster  # type: ignore[attr-defined]
        eventually(lambda: broadcaster.subscriptions == 1, why="the stream should be subscribed")
        time.sleep(0.2)
        client.post(f"/v1/jobs/{job_id}/cancel")
        text = streamed.result().text
        assert text.startswith("id: 1\nevent: job.queued\n")
        assert "\n\n: still here\n\n" in text
        assert text.rstrip().splitlines()[-2] == "event: job.cancelled"
        eventually(lambda: broadcaster.subscriptions == 0, why="the stream should be unsubscribed")


def test_server_shutdown_closes_streams(system: System, api: Api) -> None:
    job_id = api.submit().json()["id"]
    with api.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
        events = frames(response)
        assert next(events)["event"] == "job.queued"
        assert api.process.stop() == 0
        assert json.loads(next(events)["data"]) == {"type": "stream.closed", "reason": "server_stopping"}


def test_deleting_a_job_closes_its_streams(system: System, api: Api) -> None:
    job_id = api.submit().json()["id"]
    with api.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
        events = frames(response)
        next(events)
        with system.engine.begin() as connection:
            connection.exec_driver_sql(f"DELETE FROM jobs WHERE id = '{job_id}'")
        assert json.loads(next(events)["data"]) == {"type": "stream.closed", "reason": "job_deleted"}


@pytest.mark.processes
def test_stream_survives_a_database_outage(tmp_path: Path) -> None:
    with postgres_server() as postgres:
        schema.upgrade(postgres.url)
        with running_system(postgres.url, tmp_path) as system, started_api(system) as api:
            job_id = api.submit().json()["id"]
            with api.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
                events = frames(response)
                assert next(events)["event"] == "job.queued"
                postgres.stop()
                api.process.wait_for("event streams wait for the database")
                assert_problem(httpx.get(f"{api.url}/v1/jobs/{job_id}/events"), 503, "database_unavailable")
                postgres.start()
                cancelled = eventually(
                    lambda: r if (r := httpx.post(f"{api.url}/v1/jobs/{job_id}/cancel")).status_code == 200 else None,
                    why="the database should be reachable again",
                )
                assert cancelled.json()["status"] == "cancelled"
                assert [frame["event"] for frame in events] == ["job.cancelled"]


def test_subscriber_that_stops_reading_is_dropped(
    sqlite_system: System,
) -> None:
    program = (
        "import sys, api.streaming.sse; api.streaming.sse.SEND_SECONDS = 1.0;"
        "from api.__main__ import main; sys.exit(main())"
    )
    port = free_port()
    process = sqlite_system.start("-c", program, port=port)
    process.wait_for("Listening on")
    store = sqlite_system.store
    job_id = sqlite_system.submit(notify=False)
    with socket.socket() as subscriber:
        subscriber.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        subscriber.connect(("127.0.0.1", port))
        subscriber.sendall(f"GET /v1/jobs/{job_id}/events?stream=true HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
        before = psutil.Process(process.pid).memory_info().rss
        _insert_events(store, job_id)
        # Logged at the end of the response, although nobody has read it: either a send took too long, or many events
        # were read in one query and filled the subscription's buffer.
        process.wait_for(f"GET /v1/jobs/{job_id}/events 200")
        grown = psutil.Process(process.pid).memory_info().rss - before
    assert grown < 30_000_000
    assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200


def test_dropped_subscriber_gets_the_reason(store: Store) -> None:
    job_id = create(store)

    async def meanwhile(_broadcaster: EventBroadcaster, subscription: Subscription) -> None:
        await asyncio.to_thread(_insert_events, store, job_id)
        while subscription.close_reason is None:
            await asyncio.sleep(0.001)

    numbers, closing = _events_of_paused_subscriber(store, job_id, meanwhile)
    assert closing == {"type": "stream.closed", "reason": "slow_listener"}
    assert numbers == list(range(1, len(numbers) + 1))
    assert 1 < len(numbers) < 2900


def test_subscriber_at_shutdown_misses_no_number(store: Store) -> None:
    job_id = create(store)
    _insert_events(store, job_id, 2, 602)

    async def meanwhile(broadcaster: EventBroadcaster, subscription: Subscription) -> None:
        await asyncio.to_thread(_insert_events, store, job_id, 602, 702)
        while subscription.seen < 701:
            await asyncio.sleep(0.001)
        broadcaster.stop()

    numbers, closing = _events_of_paused_subscriber(store, job_id, meanwhile)
    assert closing == {"type": "stream.closed", "reason": "server_stopping"}
    assert numbers == list(range(1, len(numbers) + 1))


def _events_of_paused_subscriber(
    store: Store, job_id: str, meanwhile: Callable[[EventBroadcaster, Subscription], Awaitable[None]]
) -> tuple[list[int], Any]:
    """Return the event numbers that a subscriber receives and the closing event of its stream.

    The subscriber stops reading after the first event until `meanwhile` has returned.
    """
    sent: list[bytes] = []

    async def subscribe() -> None:
        reading = asyncio.Event()
        reading.set()

        async def send(message: Any) -> None:
            await reading.wait()
            sent.append(message.get("body", b""))
            if b"id: 1\n" in sent[-1]:
                reading.clear()

        broadcaster = EventBroadcaster(store)
        async with broadcaster.running():
            scope = {"type": "http", "state": {"request_id": "req_1"}}
            stream = EventStream(broadcaster, store, store.jobs.get(job_id), 0)
            streaming = asyncio.create_task(stream.send_events(scope, asyncio.Event().wait, send))  # type: ignore[arg-type]
            while reading.is_set():
                await asyncio.sleep(0.001)
            (subscription,) = broadcaster._subscriptions[job_id]
            await meanwhile(broadcaster, subscription)
            reading.set()
            await streaming
            assert broadcaster.subscriptions == 0

    asyncio.run(subscribe())
    *received, closing = [frame.splitlines() for frame in b"".join(sent).decode().split("\n\n") if frame]
    return [int(frame[0].removeprefix("id: ")) for frame in received], json.loads(closing[1].removeprefix("data: "))


@pytest.mark.parametrize("hangs", [False, True])
def test_shutdown_waits_for_the_last_query_but_not_forever(hangs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.streaming.broadcaster._LAST_POLL_SECONDS", 0.1 if hangs else 60)
    queried, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    class Slow:
        def new_events(self, _seen: dict[str, int]) -> None:
            queried.set()
            may_end.wait(HANG_SECONDS)
            ended.set()
            raise StoreUnavailableError

    async def subscribe() -> None:
        store: Any = SimpleNamespace(events=Slow())
        async with EventBroadcaster(store).running() as broadcaster, broadcaster.subscribe("job_1", 0):
            await asyncio.to_thread(queried.wait)
            if not hangs:
                asyncio.get_running_loop().call_later(0.1, may_end.set)
        assert ended.is_set() != hangs
        may_end.set()

    asyncio.run(subscribe())


def _insert_events(store: Store, job_id: str, start: int = 2, stop: int = 3002) -> None:
    from sqlalchemy import insert, update

    from tpo.db import writing
    from tpo.jobs.tables import EventRow, Job

    for first in range(start, stop, 100):
        with writing(store.engine) as session:
            rows = [
                {"job_id": job_id, "number": n, "type": "job.phase", "data": {"pad": "x" * 5000}, "created_at": 1.0}
                for n in range(first, first + 100)
            ]
            session.execute(insert(EventRow), rows)
            session.execute(update(Job).where(Job.id == job_id).values(last_event=first + 99))


def test_1000_subscribers_of_one_process(sqlite_system: System) -> None:
    with started_api(sqlite_system) as api:
        process = psutil.Process(api.process.pid)
        jobs = [api.submit().json()["id"] for _ in range(20)]
        # The first requests create threads and connections. Exclude them from the memory of a subscriber.
        with ThreadPoolExecutor(60) as pool:
            assert {r.status_code for r in pool.map(api.client.get, [f"/v1/jobs/{jobs[0]}"] * 600)} == {200}
        before = process.memory_info().rss

        async def listen(job_id: str, ready: asyncio.Semaphore) -> list[int]:
            reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
            writer.write(f"GET /v1/jobs/{job_id}/events?stream=true HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
            await reader.readuntil(b"event: job.queued")
            ready.release()
            rest = await reader.readuntil(b"event: job.cancelled")
            writer.close()
            return [int(line[4:]) for line in rest.decode().splitlines() if line.startswith("id: ")]

        async def subscribe_all() -> tuple[list[list[int]], int]:
            ready = asyncio.Semaphore(0)
            subscribers = [asyncio.create_task(listen(jobs[i % 20], ready)) for i in range(1000)]
            for _ in range(1000):
                await ready.acquire()
            grown = process.memory_info().rss - before
            for job_id in jobs:
                await asyncio.to_thread(sqlite_system.store.jobs.pause, job_id)
                await asyncio.to_thread(sqlite_system.store.jobs.cancel, job_id)
            return await asyncio.gather(*subscribers), grown

        received, grown = asyncio.run(subscribe_all())
        print(f"1,000 subscribers: {grown / 1000:.0f} bytes each")
        assert received == [[2, 3]] * 1000
        assert grown < 1000 * 50_000
