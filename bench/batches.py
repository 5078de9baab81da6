"""Time and memory of one large batch through `/v1/files` and `/v1/batches`.

    python -m bench.batches [--lines 50000] [--database sqlite|postgresql] [--ingest-only]

Each request makes one call of the scripted back end, which takes no time, so only input and output are measured. With
`--ingest-only` there is no worker and no limit on live jobs: every line becomes a job, and none of them runs.
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
    """The resident memory of several processes over time."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in pids.items()}
        self.samples: dict[str, list[float]] = {name: [] for name in pids}

    def take_sample(self) -> None:
        """Record the current memory of each process, in MB."""
        for name, process in self._processes.items():
            self.samples[name].append(process.memory_info().rss / 1e6)

    def summary(self, name: str) -> str:
        """Format one process's memory at the start, after 25 % and 75 % of the samples, at the end, and its peak."""
        samples = self.samples[name]
        selected = [samples[int(share * (len(samples) - 1))] for share in (0, 0.25, 0.75, 1)]
        return f"{name}: " + " → ".join(f"{value:.0f}" for value in selected) + f" MB, peak {max(samples):.0f}"


def write_requests(path: Path, count: int) -> int:
    """Write a file of `count` requests. Returns its size in bytes."""
    with path.open("w") as file:
        for number in range(count):
            options = {"sample_size": 1, "max_iterations": 0, "seed": number}
            body = {"model": "scripted", "input": f"Where is my lamp {number}?", "tpo": options}
            line = {"custom_id": f"r{number}", "method": "POST", "url": "/v1/responses", "body": body}
            file.write(json.dumps(line) + "\n")
    return path.stat().st_size


def measure(system: System, folder: Path, count: int, *, ingest_only: bool) -> None:
    """Run one batch and print the times and the memory."""
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
        memory.take_sample()
        began = time.perf_counter()
        with (folder / "requests.jsonl").open("rb") as file:
            response = client.post("/files", data={"purpose": "batch"}, files={"file": file})
        uploaded = response.raise_for_status().json()
        memory.take_sample()
        print(f"upload of {count} lines, {size / 1e6:.1f} MB: {time.perf_counter() - began:.2f} s", flush=True)

        began = time.perf_counter()
        body = {"input_file_id": uploaded["id"], "endpoint": "/v1/responses", "completion_window": "24h"}
        batch = client.post("/batches", json=body).raise_for_status().json()
        unreported = {"in_progress": "counted"}
        while batch["status"] not in ENDED:
            time.sleep(0.5)
            memory.take_sample()
            batch = client.get(f"/batches/{batch['id']}").json()
            if batch["status"] in unreported:
                print(f"{unreported.pop(batch['status'])}: {time.perf_counter() - began:.1f} s", flush=True)
            row = system.store.batches.get(batch["id"])
            if ingest_only and row.line == count:
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
            memory.take_sample()
            print(f"download of {lines} results: {time.perf_counter() - began:.2f} s")
        for name in memory.samples:
            print(memory.summary(name))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Measure time and memory of one large batch.")
    parser.add_argument("--lines", type=int, default=50_000)
    parser.add_argument(
        "--database", choices=["sqlite", "postgresql"], default="sqlite", help="kind of the new database"
    )
    parser.add_argument(
        "--ingest-only", action="store_true", help="start no worker: every line becomes a job that stays queued"
    )
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="tpo-bench-") as name,
        database(arguments.database, Path(name)) as url,
        running_quietly(url, Path(name)) as system,
    ):
        measure(system, Path(name), arguments.lines, ingest_only=arguments.ingest_only)


if __name__ == "__main__":
    main()
