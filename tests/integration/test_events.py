"""A job's events over HTTP: the list, the stream, cuts, listeners that do not read, a database that goes away."""

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
    """The frames of a stream; comments are left out."""
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


def test_the_list_is_paged_by_number(system: System, api: Api) -> None:
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
    assert [e["sequence_number"] for e in both["data"]] == [3], "the header comes first"
    for params in ({"limit": 0}, {"limit": 1001}, {"starting_after": -1}, {"starting_after": "x"}, {"after": 1}):
        assert_problem(api.client.get(path, params=params), 422, "invalid_input", next(iter(params)))
    refused = api.client.get(path, headers={"last-event-id": "x"})
    assert_problem(refused, 422, "invalid_input", "Last-Event-ID")


def test_a_stream_tells_a_whole_job_and_closes(system: System, api: Api) -> None:
    system.worker(scripted_latency=0.05)
    job_id = api.submit().json()["id"]
    with api.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
        assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert response.headers["x-request-id"]
        told = list(frames(response))
    listed = api.client.get(f"/v1/jobs/{job_id}/events", params={"limit": 1000}).json()["data"]
    assert [json.loads(frame["data"]) for frame in told] == listed
    assert [int(frame["id"]) for frame in told] == list(range(1, len(listed) + 1))
    assert [frame["event"] for frame in told] == [event["type"] for event in listed]
    assert told[-1]["event"] == "job.completed"
    assert all("error" not in event for event in listed)
    # Of a job that has ended: the same at once, from any number on, and nothing beyond the last one.
    assert read(api, job_id) == told
    assert read(api, job_id, starting_after=3) == told[3:]
    assert read(api, job_id, starting_after=len(told)) == read(api, job_id, starting_after=10_000) == []


def test_a_stream_that_is_cut_anywhere_is_resumed_without_a_gap(system: System, api: Api) -> None:
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
                    break  # in the middle of whatever it was
        whole = received.decode().rpartition("\n\n")[0]
        seen += [int(line[4:]) for line in whole.splitlines() if line.startswith("id: ")]
        cut += 1
        if "job.completed" in whole:
            break
        assert cut < 200
    last = system.store.jobs.get(job_id).last_event
    assert seen == list(range(1, last + 1))
    assert cut > 2


def test_a_comment_now_and_then(sqlite_system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    from api.streaming import sse
    from tests.support.api_client import api_client

    monkeypatch.setattr(sse, "COMMENT_SECONDS", 0.05)
    url = str(sqlite_system.engine.url)
    with api_client(database_url=url, broker_url=sqlite_system.broker.url) as client, ThreadPoolExecutor(1) as pool:
        job_id = client.post("/v1/jobs", json={"input": "x"}).json()["id"]
        streamed = pool.submit(client.get, f"/v1/jobs/{job_id}/events?stream=true")
        feed = client.app.state.feed  # type: ignore[attr-defined]
        eventually(lambda: feed.listeners == 1, why="it listens")
        time.sleep(0.2)
        client.post(f"/v1/jobs/{job_id}/cancel")
        text = streamed.result().text
        assert text.startswith("id: 1\nevent: job.queued\n")
        assert "\n\n: still here\n\n" in text
        assert text.rstrip().splitlines()[-2] == "event: job.cancelled"
        eventually(lambda: feed.listeners == 0, why="it has left")


def test_the_server_ends_while_streams_are_open(system: System, api: Api) -> None:
    job_id = api.submit().json()["id"]
    with api.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
        told = frames(response)
        assert next(told)["event"] == "job.queued"
        assert api.process.stop() == 0
        assert json.loads(next(told)["data"]) == {"type": "stream.closed", "reason": "server_stopping"}


def test_a_job_that_is_deleted_ends_its_streams(system: System, api: Api) -> None:
    job_id = api.submit().json()["id"]
    with api.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
        told = frames(response)
        next(told)
        with system.engine.begin() as connection:
            connection.exec_driver_sql(f"DELETE FROM jobs WHERE id = '{job_id}'")
        assert json.loads(next(told)["data"]) == {"type": "stream.closed", "reason": "job_deleted"}


@pytest.mark.processes
def test_a_database_that_goes_away_in_the_middle(tmp_path: Path) -> None:
    with postgres_server() as postgres:
        schema.upgrade(postgres.url)
        with running_system(postgres.url, tmp_path) as system, started_api(system) as api:
            job_id = api.submit().json()["id"]
            with api.client.stream("GET", f"/v1/jobs/{job_id}/events", headers=STREAM) as response:
                told = frames(response)
                assert next(told)["event"] == "job.queued"
                postgres.stop()
                api.process.wait_for("the event streams wait")
                assert_problem(httpx.get(f"{api.url}/v1/jobs/{job_id}/events"), 503, "database_unavailable")
                postgres.start()
                cancelled = eventually(
                    lambda: r if (r := httpx.post(f"{api.url}/v1/jobs/{job_id}/cancel")).status_code == 200 else None,
                    why="it is back",
                )
                assert cancelled.json()["status"] == "cancelled"
                assert [frame["event"] for frame in told] == ["job.cancelled"]


def test_a_listener_that_stops_reading_is_dropped_and_its_memory_bounded(
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
    job_id = sqlite_system.submit(ring=False)
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect(("127.0.0.1", port))
        deaf.sendall(f"GET /v1/jobs/{job_id}/events?stream=true HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        before = psutil.Process(process.pid).memory_info().rss
        _tell_much(store, job_id)
        # Told once the answer is over, though nobody has read it: because a send took too long or, where many events
        # were read at once, because the listener's own buffer was full.
        process.wait_for(f"GET /v1/jobs/{job_id}/events 200")
        grown = psutil.Process(process.pid).memory_info().rss - before
    assert grown < 30_000_000
    assert httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200


def test_a_listener_that_reads_again_is_told_why_it_was_dropped(store: Store) -> None:
    job_id = create(store)

    async def meanwhile(_feed: EventBroadcaster, listener: Subscription) -> None:
        await asyncio.to_thread(_tell_much, store, job_id)
        while listener.end is None:
            await asyncio.sleep(0.001)

    numbers, closing = _told_to_one_that_rests(store, job_id, meanwhile)
    assert closing == {"type": "stream.closed", "reason": "slow_listener"}
    assert numbers == list(range(1, len(numbers) + 1))
    assert 1 < len(numbers) < 2900


def test_a_listener_that_ends_before_it_has_seen_what_is_recorded_misses_no_number(store: Store) -> None:
    job_id = create(store)
    _tell_much(store, job_id, 2, 602)

    async def meanwhile(feed: EventBroadcaster, listener: Subscription) -> None:
        await asyncio.to_thread(_tell_much, store, job_id, 602, 702)
        while listener.seen < 701:
            await asyncio.sleep(0.001)
        feed.stop()

    numbers, closing = _told_to_one_that_rests(store, job_id, meanwhile)
    assert closing == {"type": "stream.closed", "reason": "server_stopping"}
    assert numbers == list(range(1, len(numbers) + 1))


def _told_to_one_that_rests(
    store: Store, job_id: str, meanwhile: Callable[[EventBroadcaster, Subscription], Awaitable[None]]
) -> tuple[list[int], Any]:
    """The numbers that a listener is told who takes nothing after the first `meanwhile`, and how its stream closes."""
    sent: list[bytes] = []

    async def listens() -> None:
        reads = asyncio.Event()
        reads.set()

        async def send(message: Any) -> None:
            await reads.wait()
            sent.append(message.get("body", b""))
            if b"id: 1\n" in sent[-1]:
                reads.clear()

        feed = EventBroadcaster(store)
        async with feed.running():
            scope = {"type": "http", "state": {"request_id": "req_1"}}
            stream = EventStream(feed, store, store.jobs.get(job_id), 0)
            streaming = asyncio.create_task(stream.tell(scope, asyncio.Event().wait, send))  # type: ignore[arg-type]
            while reads.is_set():
                await asyncio.sleep(0.001)
            (listener,) = feed._listeners[job_id]
            await meanwhile(feed, listener)
            reads.set()
            await streaming
            assert feed.listeners == 0

    asyncio.run(listens())
    told = [frame.splitlines() for frame in b"".join(sent).decode().split("\n\n") if frame]
    return [int(frame[0].removeprefix("id: ")) for frame in told[:-1]], json.loads(told[-1][1].removeprefix("data: "))


@pytest.mark.parametrize("hangs", [False, True])
def test_a_look_at_the_database_ends_before_the_database_is_let_go(
    hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.streaming.broadcaster._LAST_LOOK_SECONDS", 0.1 if hangs else 60)
    looks, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    class Slow:
        def new_events(self, _seen: dict[str, int]) -> None:
            looks.set()
            may_end.wait(HANG_SECONDS)
            ended.set()
            raise StoreUnavailableError

    async def listens() -> None:
        async with EventBroadcaster(SimpleNamespace(events=Slow())).running() as feed, feed.listening("job_1", 0):  # type: ignore[arg-type]
            await asyncio.to_thread(looks.wait)
            if not hangs:
                asyncio.get_running_loop().call_later(0.1, may_end.set)
        assert ended.is_set() != hangs
        may_end.set()

    asyncio.run(listens())


def _tell_much(store: Store, job_id: str, start: int = 2, stop: int = 3002) -> None:
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


def test_a_thousand_listeners_of_one_process(sqlite_system: System) -> None:
    with started_api(sqlite_system) as api:
        process = psutil.Process(api.process.pid)
        jobs = [api.submit().json()["id"] for _ in range(20)]
        # Threads and connections come with the first requests, whatever those ask for: they are no listener's.
        with ThreadPoolExecutor(60) as pool:
            assert {r.status_code for r in pool.map(api.client.get, [f"/v1/jobs/{jobs[0]}"] * 600)} == {200}
        before = process.memory_info().rss

        async def listen(job_id: str, ready: asyncio.Semaphore) -> list[int]:
            reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
            writer.write(f"GET /v1/jobs/{job_id}/events?stream=true HTTP/1.1\r\nhost: x\r\n\r\n".encode())
            await reader.readuntil(b"event: job.queued")
            ready.release()
            rest = await reader.readuntil(b"event: job.cancelled")
            writer.close()
            return [int(line[4:]) for line in rest.decode().splitlines() if line.startswith("id: ")]

        async def all_of_them() -> tuple[list[list[int]], int]:
            ready = asyncio.Semaphore(0)
            listening = [asyncio.create_task(listen(jobs[i % 20], ready)) for i in range(1000)]
            for _ in range(1000):
                await ready.acquire()
            grown = process.memory_info().rss - before
            for job_id in jobs:
                await asyncio.to_thread(sqlite_system.store.jobs.pause, job_id)
                await asyncio.to_thread(sqlite_system.store.jobs.cancel, job_id)
            return await asyncio.gather(*listening), grown

        received, grown = asyncio.run(all_of_them())
        print(f"1,000 listeners: {grown / 1000:.0f} bytes each")
        assert received == [[2, 3]] * 1000
        assert grown < 1000 * 50_000
