"""Throughput of the API, as ratios to a no-op endpoint of the same server in the same run.

A separate process sends the load over raw sockets; the server is one process. Each slice of a request is measured
between two slices of the no-op endpoint, so the ratios hold even on a machine that does other work.

    python -m bench.api [--databases sqlite postgresql] [--seconds 0.5] [--rounds 9] [--listeners 1000]

The last line contains all results as JSON.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

import httpx
import psutil

from testing.ports import free_port
from testing.processes import System, running_system
from testing.services import new_database, postgres_server
from tpo.db import schema

# The server under test, with an additional no-op route behind the same middleware.
SERVER = """
import sys, api.app, api.__main__
create_original = api.__main__.create_app
def create_app(settings):
    app = create_original(settings)
    app.add_api_route("/bare", lambda: {"ok": True}, methods=["GET"], include_in_schema=False)
    async def bare(): return {"ok": True}
    app.add_api_route("/bare-async", bare, methods=["GET"], include_in_schema=False)
    return app
api.__main__.create_app = create_app
sys.exit(api.__main__.main())
"""
BODY = json.dumps({"input": "Where is my lamp?", "parameters": {"sample_size": 2, "max_iterations": 1}})
FIRST_CALL = json.dumps({"input": "Where is my lamp?", "parameters": {"mode": "bon", "sample_size": 2}})
CONNECTIONS = 8
JOBS_OF_LISTENERS = 20
WARM_UP_SUBMISSIONS = 5
LARGEST_BODY = 12 * 200_000 + 256 * 1024
"""Bytes of the largest body that a server with default settings accepts."""


@dataclass(frozen=True)
class Request:
    """A request that is sent repeatedly, and the beginning of the expected response."""

    name: str
    payload: bytes
    status: bytes


def request(name: str, method: str, path: str, *, status: int = 200, body: str = "") -> Request:
    """Return a request in the bytes of HTTP/1.1."""
    head = f"{method} {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json"
    return Request(name, f"{head}\r\ncontent-length: {len(body)}\r\n\r\n{body}".encode(), f"HTTP/1.1 {status}".encode())


def _send(connection: socket.socket, request: Request) -> None:
    connection.sendall(request.payload)
    response = b""
    while b"\r\n\r\n" not in response:
        response += _receive(connection)
    head, _, body = response.partition(b"\r\n\r\n")
    if not head.startswith(request.status):
        raise SystemExit(f"{request.name}: expected {request.status.decode()}, received {response[:500]!r}")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while length > len(body):
        body += _receive(connection)


def _receive(connection: socket.socket) -> bytes:
    if not (received := connection.recv(262144)):
        raise SystemExit("the server closed the connection")
    return received


def _load(port: int, request: Request, seconds: float) -> float:
    """Send one request repeatedly over several connections for `seconds`, and return the responses per second."""
    counts = [0] * CONNECTIONS
    begin = time.perf_counter()

    def send_repeatedly(index: int) -> None:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while time.perf_counter() - begin < seconds:
                _send(connection, request)
                counts[index] += 1

    threads = [threading.Thread(target=send_repeatedly, args=(i,)) for i in range(CONNECTIONS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / (time.perf_counter() - begin)


@contextlib.contextmanager
def serving(system: System, **settings: object) -> Iterator[tuple[int, int]]:
    """Run the API with its no-op endpoint. Yields its port and process id."""
    port = free_port()
    process = system.start("-c", SERVER, port=port, **settings)
    process.wait_for("Listening on")
    yield port, process.pid
    process.stop()


def rates(system: System, port: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Measure each request's rate as a ratio to the no-op endpoint's just before and after; medians of the rounds."""
    url = f"http://127.0.0.1:{port}"
    job_id = httpx.post(f"{url}/v1/jobs", content=BODY, headers={"content-type": "application/json"}).json()["id"]
    for _ in range(20):
        system.submit(notify=False)
    bare = request("bare", "GET", "/bare")
    measured = [
        request("bare, no thread", "GET", "/bare-async"),
        request("GET job", "GET", f"/v1/jobs/{job_id}"),
        request("GET list of 20", "GET", "/v1/jobs?limit=20"),
        request("POST, durable and enqueued", "POST", "/v1/jobs", status=202, body=BODY),
    ]
    ratios: dict[str, list[float]] = {each.name: [] for each in measured}
    with multiprocessing.get_context("spawn").Pool(1) as load:
        for each in (bare, *measured):
            _rate(load, port, each, seconds)  # warm up
        absolute = [_rate(load, port, bare, seconds)]
        for _ in range(rounds):
            for each in measured:
                rate = _rate(load, port, each, seconds)
                absolute.append(_rate(load, port, bare, seconds))
                ratios[each.name].append(rate / statistics.mean(absolute[-2:]))
    return {
        "bare_per_second": round(statistics.median(absolute)),
        "of_bare": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
    }


def _rate(load: Pool, port: int, request: Request, seconds: float) -> float:
    return load.apply(_load, (port, request, seconds))


def listeners(system: System, port: int, pid: int, count: int) -> dict[str, Any]:
    """Measure the delay and the memory of many event streams on one process."""
    process = psutil.Process(pid)
    jobs = [system.submit(notify=False) for _ in range(JOBS_OF_LISTENERS)]

    async def listen(job_id: str, ready: asyncio.Semaphore) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"GET /v1/jobs/{job_id}/events?stream=true HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())
        await reader.readuntil(b"event: job.queued")
        ready.release()
        await reader.readuntil(b"event: job.cancelled")
        arrived = time.time()
        writer.close()
        return arrived

    async def all_of_them() -> tuple[list[float], int]:
        before = process.memory_info().rss
        ready = asyncio.Semaphore(0)
        listening = [asyncio.create_task(listen(jobs[i % len(jobs)], ready)) for i in range(count)]
        for _ in range(count):
            await ready.acquire()
        grown = process.memory_info().rss - before
        written = {}
        for job_id in jobs:
            await asyncio.to_thread(system.store.jobs.cancel, job_id)
            written[job_id] = time.time()
        arrived = await asyncio.gather(*listening)
        return sorted(at - written[jobs[i % len(jobs)]] for i, at in enumerate(arrived)), grown

    delays, grown = asyncio.run(all_of_them())
    return {"count": count, "delay_ms": _quantiles(delays), "kB_each": round(grown / count / 1000, 1)}


def first_calls(system: System, port: int, count: int) -> dict[str, Any]:
    """Measure the time from a submission's first byte to the start of its first model call, on an idle worker."""
    worker = system.worker(scripted_latency=0.05)
    log = system.calls_log
    log.touch()
    delays = []
    with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
        for number in range(count + WARM_UP_SUBMISSIONS):
            before = log.stat().st_size
            sent = time.perf_counter()
            response = client.post("/v1/jobs", content=FIRST_CALL, headers={"content-type": "application/json"})
            while log.stat().st_size == before:  # each call logs a line at its start; the next one is 50 ms later
                time.sleep(0.0003)
            if number >= WARM_UP_SUBMISSIONS:
                delays.append(time.perf_counter() - sent)
            system.wait_for_end(response.raise_for_status().json()["id"])
    worker.stop()
    return {"count": count, "ms": _quantiles(sorted(delays))}


def _shapes() -> Iterator[tuple[str, str, bytes]]:
    """Yield bodies that are expensive to read, up to the largest that is accepted: name, path and content."""

    def filled(start: str, item: str, end: str) -> bytes:
        count = (LARGEST_BODY - len(start) - len(end)) // (len(item) + 1)
        return (start + ",".join([item] * count) + end).encode()

    def fields(start: str, value: str, end: str) -> bytes:
        return (start + ",".join(f'"{number:x}":{value}' for number in range(240_000)) + end).encode()

    jobs, chat, responses = "/v1/jobs", "/v1/chat/completions", "/v1/responses"
    for name, item in (("numbers", "1"), ("objects", "{}"), ("lists", "[]"), ("texts", '""'), ("nulls", "null")):
        yield f"stop of {name}", jobs, filled('{"input":"x","parameters":{"stop":[', item, "]}}")
        yield f"messages of {name}", chat, filled('{"messages":[', item, "]}")
    part = '{"type":"text","text":"x"}'
    yield "parts", responses, filled('{"input":[{"role":"user","content":[', part, "]}]}")
    yield "unknown fields", jobs, fields('{"input":"x",', "0", "}")
    yield "unknown parameters", jobs, fields('{"input":"x","parameters":{', "0", "}}")
    yield "metadata", jobs, fields('{"input":"x","metadata":{', '"x"', "}}")
    yield "tpo", responses, fields('{"input":"x","tpo":{', "0", "}}")
    yield "events", "/v1/webhooks", filled('{"url":"https://example.com","events":[', "1", "]}")
    yield "deep", jobs, b'{"input":' + b"[" * 1_200_000
    yield "open text", jobs, b'{"input":' + b'"\\' * 1_200_000
    yield "escaped text", jobs, b'{"input":"' + b"\\u0001" * 200_000 + b'"}'
    yield "commas in a text", jobs, b'{"input":"' + b"," * 200_000 + b'"}'


def delays_by_bodies(port: int) -> dict[str, Any]:
    """Measure the longest time that another request takes while a body of each shape is sent."""
    url = f"http://127.0.0.1:{port}"
    health = request("health", "GET", "/healthz")
    longest: dict[str, float] = {}
    with httpx.Client(base_url=url, timeout=600) as client:
        for name, path, content in _shapes():
            delays: list[float] = []
            ended = threading.Event()

            def probe(delays: list[float] = delays, ended: threading.Event = ended) -> None:
                with socket.create_connection(("127.0.0.1", port)) as connection:
                    while not ended.is_set():
                        began = time.perf_counter()
                        _send(connection, health)
                        delays.append(time.perf_counter() - began)

            thread = threading.Thread(target=probe)
            thread.start()
            for _ in range(3):
                client.post(path, content=content, headers={"content-type": "application/json"})
            ended.set()
            thread.join()
            longest[name] = round(max(delays) * 1000, 1)
    return {"count": len(longest), "longest_ms": max(longest.values()), "by_shape_ms": longest}


def _quantiles(ordered: Sequence[float]) -> dict[str, float]:
    def at(share: float) -> float:
        return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1000, 1)

    return {"p50": at(0.5), "p99": at(0.99)}


@contextlib.contextmanager
def database(kind: str, folder: Path) -> Iterator[str]:
    """Create a database of that kind with the schema. Yields its URL."""
    with contextlib.ExitStack() as stack:
        url = f"sqlite:///{folder}/tpo.db"
        if kind == "postgresql":
            url = stack.enter_context(new_database(stack.enter_context(postgres_server(durable=True)).admin_url))
        schema.upgrade(url)
        yield url


@contextlib.contextmanager
def served(kind: str) -> Iterator[tuple[System, int, int]]:
    """Run a new system on a database of that kind. Yields it with the port and process id of its API."""
    with (
        tempfile.TemporaryDirectory(prefix="tpo-bench-") as name,
        database(kind, Path(name)) as url,
        running_quietly(url, Path(name)) as system,
        serving(system) as (port, pid),
    ):
        yield system, port, pid


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure the API's throughput, as ratios to a no-op endpoint.")
    parser.add_argument("--databases", nargs="+", choices=["sqlite", "postgresql"], default=["sqlite", "postgresql"])
    parser.add_argument("--seconds", type=float, default=0.5, help="duration of each slice")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--listeners", type=int, default=1000, help="number of event streams")
    parser.add_argument("--submissions", type=int, default=200, help="submissions in sequence to an idle worker")
    arguments = parser.parse_args()
    figures: dict[str, dict[str, Any]] = {}
    for kind in arguments.databases:
        figures[kind] = {}
        with served(kind) as (system, port, pid):
            figures[kind]["rates"] = rates(system, port, arguments.seconds, arguments.rounds)
            print(kind, figures[kind]["rates"], flush=True)
            figures[kind]["delays_by_bodies"] = delays_by_bodies(port)
            print(kind, figures[kind]["delays_by_bodies"], flush=True)
            figures[kind]["listeners"] = listeners(system, port, pid, arguments.listeners)
            print(kind, figures[kind]["listeners"], flush=True)
        with served(kind) as (system, port, _):
            figures[kind]["submit_to_first_call"] = first_calls(system, port, arguments.submissions)
            print(kind, figures[kind]["submit_to_first_call"], flush=True)
    print(json.dumps(figures))


@contextlib.contextmanager
def running_quietly(url: str, folder: Path) -> Iterator[System]:
    """Run a system without printing its logs at the end."""
    with running_system(url, folder) as system:
        try:
            yield system
        finally:
            system.processes, ended = [], system.processes
            for process in ended:
                if process.popen.poll() is None:
                    process.kill()


if __name__ == "__main__":
    main()
