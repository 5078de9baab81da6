"""One large batch through `/v1/files` and `/v1/batches`: how long each part takes, and whether memory stays flat.

    python -m bench.batches [--lines 50000] [--database sqlite|postgresql] [--ingest-only]

A request is one call of the scripted back end, which takes no time: what is measured is the way in and out. With
`--ingest-only` there is no worker and no limit of jobs under way: every line becomes a job, and none of them runs.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import httpx
import psutil

from bench.api import database, running_quietly, serving
from testing.processes import System

ENDED = ("completed", "failed", "cancelled", "expired")
UPLOAD_SECONDS = 600


class Memory:
    """The resident memory of some processes over time."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self.samples: dict[str, list[float]] = {name: [] for name in pids}

    def look(self) -> None:
        """Take a sample, in MB."""
        for name, process in self._processes.items():
            self.samples[name].append(process.memory_info().rss / 1e6)

    def told(self, name: str) -> str:
        """At the start, a quarter and three quarters through, at the end, and at its highest."""
        taken = self.samples[name]
        at = [taken[int(share * (len(taken) - 1))] for share in (0, 0.25, 0.75, 1)]
        return f"{name}: " + " → ".join(f"{value:.0f}" for value in at) + f" MB, highest {max(taken):.0f}"


def write_requests(path: Path, count: int) -> int:
    """A file of so many requests. Gives its size in bytes."""
    with path.open("w") as file:
        for number in range(count):
            options = {"sample_size": 1, "max_iterations": 0, "seed": number}
            body = {"model": "scripted", "input": f"Where is my parcel {number}?", "tpo": options}
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/responses", "body": body}
            file.write(json.dumps(line) + "\n")
    return path.stat().st_size


def measure(system: System, folder: Path, count: int, *, ingest_only: bool) -> None:
    """Run one batch and print."""
    size = write_requests(folder / "requests.jsonl", count)
    maintenance = system.maintenance(batch_jobs=count if ingest_only else 100, max_batch_lines=count)
    pids = {"maintenance": maintenance.pid}
    if not ingest_only:
        pids["worker"] = system.worker(scripted_latency=0, concurrency=16).pid
    with (
        serving(system) as (port, pid),
        httpx.Client(base_url=f"http://127.0.0.1:{port}/v1", timeout=UPLOAD_SECONDS) as client,
    ):
        client.get("/models")
        memory = Memory({"API": pid, **pids})
        memory.look()
        began = time.perf_counter()
        with (folder / "requests.jsonl").open("rb") as file:
            answer = client.post("/files", data={"purpose": "batch"}, files={"file": file})
        uploaded = answer.raise_for_status().json()
        memory.look()
        print(f"upload of {count} lines, {size / 1e6:.1f} MB: {time.perf_counter() - began:.2f} s", flush=True)

        began = time.perf_counter()
        asked = {"input_file_id": uploaded["id"], "endpoint": "/v1/responses", "completion_window": "24h"}
        batch = client.post("/batches", json=asked).raise_for_status().json()
        told = {"in_progress": "counted"}
        while batch["status"] not in ENDED:
            time.sleep(0.5)
            memory.look()
            batch = client.get(f"/batches/{batch['id']}").json()
            if batch["status"] in told:
                print(f"{told.pop(batch['status'])}: {time.perf_counter() - began:.1f} s", flush=True)
            row = system.store.batches.get(batch["id"])
            if ingest_only and row is not None and row.line == count:
                break
        took = time.perf_counter() - began
        print(
            f"{batch['status']} after {took:.1f} s: {count / took:.0f} lines/s, {batch['request_counts']}", flush=True
        )
        if batch["output_file_id"]:
            lines = 0
            began = time.perf_counter()
            with client.stream("GET", f"/files/{batch['output_file_id']}/content") as results:
                for lines, line in enumerate(results.iter_lines(), 1):
                    if json.loads(line)["custom_id"] != f"r{lines - 1}":
                        raise SystemExit(f"line {lines} is out of order")
            memory.look()
            print(f"download of {lines} results: {time.perf_counter() - began:.2f} s")
        for name in memory.samples:
            print(memory.told(name))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="One large batch: seconds and memory.")
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite", help="a new one of that kind")
    parser.add_argument("--ingest-only", action="store_true", help="no worker: every line becomes a job that waits")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="tpo-bench-") as name,
        database(arguments.database, Path(name)) as url,
        running_quietly(url, Path(name)) as system,
    ):
        measure(system, Path(name), arguments.lines, ingest_only=arguments.ingest_only)


if __name__ == "__main__":
    main()
