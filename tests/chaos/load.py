"""Clients of a run: they submit, cancel, pause and resume jobs over HTTP, and retry until they get a response."""

import heapq
import itertools
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import httpx

_RESPONSE_SECONDS = 3.0
_IMPATIENT_SECONDS = 0.01
_CLIENTS = 4


@dataclass
class Client:
    """A job, as its client knows it."""

    number: int
    key: str
    body: dict[str, Any]
    actions: list[tuple[float, str]]
    """Actions on the job, each with its time in seconds after acceptance."""
    job_id: str | None = None
    cancelled: bool = False
    """True if a cancel was requested."""


@dataclass
class Load:
    """Submits jobs at a fixed rate until it is stopped. The seed determines each job and its actions."""

    urls: Sequence[str]
    seed: int
    jobs_per_second: float
    most_open: int
    clients: list[Client] = field(default_factory=list)
    responses: "Counter[str]" = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    priorities: bool = False
    open_jobs: Callable[[], int] = lambda: 0

    def __post_init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[httpx.Client], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._stopping = threading.Event()
        self._busy = 0
        self._threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(_CLIENTS)]

    def start(self) -> None:
        """Begin to submit."""
        with httpx.Client(trust_env=False, timeout=10) as http:
            schemas = http.get(f"{self.urls[0]}/openapi.json").json()["components"]["schemas"]
            self.priorities = "priority" in schemas["Submit"]["properties"]
        for thread in self._threads:
            thread.start()
        self._later(0, lambda http: self._submit_next(http, 0))

    def stop(self) -> None:
        """Stop submitting. Actions on submitted jobs continue."""
        self._stopping.set()

    def idle(self) -> bool:
        """Return whether it was stopped and no action is left."""
        with self._changed:
            return self._stopping.is_set() and not self._due and not self._busy

    def accepted(self) -> dict[str, Client]:
        """Return the clients of accepted jobs, by job id."""
        return {c.job_id: c for c in list(self.clients) if c.job_id}

    def resume(self, job_id: str) -> None:
        """Resume a job that its client has left paused."""
        client = self.accepted()[job_id]
        self._later(0, lambda http: self._act(http, client, "resume", 0))

    def _later(self, seconds: float, do: Callable[[httpx.Client], None]) -> None:
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._numbers), do))
            self._changed.notify()

    def _serve(self) -> None:
        with httpx.Client(trust_env=False, timeout=_RESPONSE_SECONDS) as http:
            while True:
                with self._changed:
                    while not self._due or self._due[0][0] > time.monotonic():
                        self._changed.wait(max(0.0, self._due[0][0] - time.monotonic()) if self._due else None)
                    _, _, do = heapq.heappop(self._due)
                    self._busy += 1
                try:
                    do(http)
                except Exception as error:
                    self.wrong.append(f"the client failed: {error!r}")
                finally:
                    with self._changed:
                        self._busy -= 1

    def _submit_next(self, http: httpx.Client, number: int) -> None:
        if self._stopping.is_set():
            return
        self._later(1 / self.jobs_per_second, lambda http: self._submit_next(http, number + 1))
        if self.open_jobs() >= self.most_open:
            return
        client = planned(self.seed, number, priorities=self.priorities)
        self.clients.append(client)
        self._submit(http, client, 0)

    def _submit(self, http: httpx.Client, client: Client, tries: int) -> None:
        # Some clients do not wait for the response. The same key must still give the same job.
        impatient = tries == 0 and client.number % 8 == 0
        response = self._post(
            http, client, tries, "", client.body, _IMPATIENT_SECONDS if impatient else _RESPONSE_SECONDS
        )
        if response is None:
            self._later(0.3, lambda http: self._submit(http, client, tries + 1))
        elif response.status_code != 202:
            self.wrong.append(f"POST of job {client.number}: {response.status_code} {response.text[:200]}")
        else:
            client.job_id = response.json()["id"]
            for seconds, act in client.actions:
                self._later(seconds, partial(self._act, client=client, act=act, tries=0))

    def _act(self, http: httpx.Client, client: Client, act: str, tries: int) -> None:
        client.cancelled |= act == "cancel"
        response = self._post(http, client, tries, f"/{client.job_id}/{act}", None, _RESPONSE_SECONDS)
        if response is None:
            self._later(0.3, lambda http: self._act(http, client, act, tries + 1))
        elif response.status_code not in (200, 409):
            self.wrong.append(f"{act} of {client.job_id}: {response.status_code} {response.text[:200]}")

    def _post(
        self, http: httpx.Client, client: Client, tries: int, path: str, body: dict[str, Any] | None, seconds: float
    ) -> httpx.Response | None:
        """Send a POST. Returns None if it should be retried: without a response, or after a 503."""
        url = self.urls[(client.number + tries) % len(self.urls)]
        headers = {} if path else {"Idempotency-Key": client.key}
        try:
            response = http.post(f"{url}/v1/jobs{path}", json=body, headers=headers, timeout=seconds)
        except httpx.TransportError as error:
            self.responses[type(error).__name__] += 1
            return None
        self.responses[str(response.status_code)] += 1
        return None if response.status_code == 503 else response


def planned(seed: int, number: int, *, priorities: bool) -> Client:
    """Return the client of this number, with its job and actions. They depend only on the seed."""
    rng = random.Random(f"{seed}/{number}")
    mode = rng.choices(("tpo", "revision", "bon"), (5, 2, 2))[0]
    body: dict[str, Any] = {
        "input": f"Question {number} of run {seed}: why is the sky blue?",
        "parameters": {
            "mode": mode,
            "sample_size": rng.randint(1, 4),
            "max_iterations": rng.randint(1, 2),
            "seed": rng.getrandbits(32),
        },
    }
    if priorities:
        body["priority"] = rng.randint(0, 2)
    actions: list[tuple[float, str]] = []
    match rng.choices(("run", "cancel", "pause", "pause twice", "cancel paused"), (64, 14, 14, 4, 4))[0]:
        case "cancel":
            actions = [(rng.uniform(0, 3), "cancel")]
        case "pause" | "pause twice" as often:
            paused = rng.uniform(0, 2)
            actions = [(paused, "pause"), (paused + rng.uniform(0.1, 4), "resume")]
            if often == "pause twice":
                actions += [(actions[1][0] + 1, "pause"), (actions[1][0] + 2, "resume")]
        case "cancel paused":
            actions = [(0.5, "pause"), (2.0, "cancel")]
    return Client(number, f"chaos-{seed}-{number}", body, actions)
