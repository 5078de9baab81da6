"""Texts and secrets stay inside: after real jobs of every kind, each place that people look into is searched for them.

A text is whatever a client sent or a model wrote: messages, candidates, textual losses and gradients, metadata and the
client's own names. They belong in the database and in answers to their owner, and nowhere else.
"""

import base64
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import redis

from testing.services import valkey_server
from testing.waiting import HANG_SECONDS, eventually
from tests.support.receiver import Receiver, receiving
from tests.support.stack import Up, running_up

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
# In place of the log level, which no setting lowers; and a back end that quotes its prompt when it fails.
EVERY_PROCESS = """
import logging
basic = logging.basicConfig
logging.basicConfig = lambda **how: basic(**{**how, "level": logging.DEBUG})
from tpo.backends.scripted import ScriptedPolicy
write = ScriptedPolicy._text
def fail_or_write(self, request, seed):
    said = " ".join(m.content for m in request.messages)
    if "fails-for-text" in said:
        raise RuntimeError(f"cannot go on from {said}")
    return write(self, request, seed)
ScriptedPolicy._text = fail_or_write
"""
KEY, BROKER, FLOWER = "secret-api-key-5521", "secret-broker-5522", ("ops", "secret-flower-5523")
WRONG_KEY, WEBHOOK_TOKEN = "secret-wrong-key-5524", "secret-token-5525"
TEXT = "text-zebra-7391"
SECRETS = (KEY, BROKER, FLOWER[1], WRONG_KEY, WEBHOOK_TOKEN)
LOGS = ("api", "worker", "maintenance", "flower")


class Ran:
    """What is there to be searched after everything was done once."""

    def __init__(self, up: Up, receiver: Receiver) -> None:
        self.up = up
        self.receiver = receiver
        self.api = httpx.Client(
            base_url=up.facts["api"], headers={"authorization": f"Bearer {KEY}"}, timeout=HANG_SECONDS, trust_env=False
        )
        self.problems: list[httpx.Response] = []
        self.hidden: set[str] = {TEXT, *SECRETS}

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = self.api.post(path, json=body).raise_for_status()
        found: dict[str, Any] = answer.json()
        return found

    def ended(self, job_id: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            job: dict[str, Any] = self.api.get(f"/v1/jobs/{job_id}").json()
            return job if job["completed_at"] else None

        return eventually(look, why=f"the end of {job_id}")

    def leaks(self, place: str) -> list[str]:
        """What of all that has to stay inside stands in a place."""
        return [text for text in self.hidden if text in place or json.dumps(text)[1:-1] in place]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Ran, str]]:
    """A whole system through which everything went once, and what the broker was told meanwhile."""
    folder = tmp_path_factory.mktemp("secrets")
    (folder / "sitecustomize.py").write_text(EVERY_PROCESS)
    with receiving() as receiver, valkey_server(folder / "valkey") as valkey:
        with redis.Redis(port=valkey.port) as client:
            client.config_set("requirepass", BROKER)
        broker = f"redis://:{BROKER}@127.0.0.1:{valkey.port}/0"
        settings = {
            "PYTHONPATH": f"{folder}:{ROOT}",
            "TPO_BROKER_URL": broker,
            "TPO_API_KEY": KEY,
            "TPO_FLOWER_BASIC_AUTH": ":".join(FLOWER),
            "TPO_WEBHOOK_ALLOW_PRIVATE": "true",
            "TPO_WEBHOOK_RETRY_SECONDS": "0.2",
        }
        with _Monitored(valkey.port) as told, running_up(folder / "data", **settings) as up:
            everything = Ran(up, receiver)
            with everything.api:
                _do_everything(everything)
                yield everything, _broker(valkey.port) + _opened(told)
            assert up.stop()[0] == 0


def _do_everything(ran: Ran) -> None:
    webhook = ran.post("/v1/webhooks", url=f"{ran.receiver.url}/?token={WEBHOOK_TOKEN}")
    rotated = ran.post(f"/v1/webhooks/{webhook['id']}/rotate-secret")
    ran.hidden |= {webhook["secret"], rotated["secret"]}
    ran.receiver.answers = [500]

    job = {"input": f"Where is {TEXT}?", "parameters": {"sample_size": 2, "max_iterations": 1}}
    names = {"metadata": {"ticket": TEXT}, "external_id": f"mine-{TEXT}"}
    submitted = ran.api.post("/v1/jobs", json=job | names, headers={"idempotency-key": f"once-{TEXT}"}).json()
    assert ran.ended(submitted["id"])["status"] == "completed"
    _keep_texts_of(ran, submitted["id"])
    listed = ran.api.get("/v1/jobs", params={"metadata[ticket]": TEXT}).json()["data"]
    assert [job["id"] for job in listed] == [submitted["id"]]
    with ran.api.stream("GET", f"/v1/jobs/{submitted['id']}/events") as events:
        assert "job.completed" in events.read().decode()

    failed = ran.ended(ran.post("/v1/jobs", **{**job, "input": f"{TEXT} fails-for-text"})["id"])
    assert (failed["status"], failed["error"]["code"]) == ("failed", "internal_error")
    assert not ran.leaks(json.dumps(failed["error"]))

    with openai.OpenAI(base_url=f"{ran.up.facts['api']}/v1", api_key=KEY, max_retries=0) as client:
        _as_openai_s_client(ran, client)

    for wrong in (
        ran.api.post("/v1/jobs", content=f'{{"input": "{TEXT}'),
        ran.api.post("/v1/jobs", json={**job, "parameters": {"sample_size": TEXT}}),
        ran.api.post("/v1/jobs", json={"input": [{"role": TEXT, "content": TEXT}]}),
        ran.api.post("/v1/jobs", json={**job, "metadata": {"a": [TEXT]}}),
        ran.api.post("/v1/jobs", json={**job, "input": f"{TEXT} other"}, headers={"idempotency-key": f"once-{TEXT}"}),
        ran.api.post("/v1/chat/completions", json={"model": "scripted", "messages": TEXT}),
        ran.api.get("/v1/jobs", headers={"authorization": f"Bearer {WRONG_KEY}"}),
        ran.api.post("/v1/webhooks", json={"url": f"ftp://x/?token={WEBHOOK_TOKEN}"}),
    ):
        assert 400 <= wrong.status_code < 500, wrong.text
        ran.problems.append(wrong)
    eventually(lambda: len(ran.receiver.received) >= 4, why="webhooks are told, one of them twice")


def _as_openai_s_client(ran: Ran, client: openai.OpenAI) -> None:
    said = client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": f"Hi {TEXT}"}])
    ran.hidden.add(str(said.choices[0].message.content))
    body = {"model": "scripted", "input": f"Hello {TEXT}", "tpo": {"mode": "bon", "sample_size": 1}}
    good = json.dumps({"custom_id": TEXT, "method": "POST", "url": "/v1/responses", "body": body})
    file = client.files.create(file=(f"{TEXT}.jsonl", f"{good}\nno json {TEXT}\n".encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
    eventually(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed"), why="the batch ends")


def _keep_texts_of(ran: Ran, job_id: str) -> None:
    candidates = ran.api.get(f"/v1/jobs/{job_id}/candidates").json()["data"]
    ran.hidden |= {candidate["text"] for candidate in candidates}
    for each in ran.api.get(f"/v1/jobs/{job_id}/iterations").json()["data"]:
        ran.hidden |= {each[name] for name in ("critique", "gradient") if each[name]}
    assert len(ran.hidden) > len(SECRETS) + 6


def test_they_went_through(ran: tuple[Ran, str]) -> None:
    """Or nothing below would find anything."""
    files = Path(ran[0].up.facts["logs"]).parent.glob("tpo.db*")
    stored = b"".join(file.read_bytes() for file in files)
    assert TEXT.encode() in stored
    assert "tpo.run_job" in ran[1]
    assert '[["job_' in ran[1]  # out of a message's body


@pytest.mark.parametrize("name", LOGS)
def test_no_log_holds_any_at_the_lowest_level(ran: tuple[Ran, str], name: str) -> None:
    log = (Path(ran[0].up.facts["logs"]) / f"{name}.log").read_text()
    assert " DEBUG " in log
    assert not ran[0].leaks(log)


def test_the_worker_s_log_tells_where_it_failed(ran: tuple[Ran, str]) -> None:
    log = (Path(ran[0].up.facts["logs"]) / "worker.log").read_text()
    assert "RuntimeError" in log
    assert "fail_or_write" in log


def test_the_broker_never_held_any(ran: tuple[Ran, str]) -> None:
    assert not ran[0].leaks(ran[1])


def test_no_page_of_flower_holds_any(ran: tuple[Ran, str]) -> None:
    with httpx.Client(base_url=ran[0].up.facts["flower"], auth=FLOWER, timeout=HANG_SECONDS, trust_env=False) as flower:
        _search_flower(ran[0], flower)


def _search_flower(ran: Ran, flower: httpx.Client) -> None:
    workers = eventually(lambda: _workers(flower), why="Flower knows all that it shows of each worker")
    tasks = list(flower.get("/api/tasks").json())
    assert tasks
    table = "/tasks/datatable?draw=1&start=0&length=99&search[value]=&order[0][column]=0&columns[0][data]=name"
    pages = ["/", "/workers?json=1", "/tasks", table, "/broker", "/api/tasks", "/api/workers", "/api/task/types"]
    pages += ["/metrics", *(f"/worker/{name}" for name in workers)]
    pages += [page.format(task) for task in tasks for page in ("/task/{}", "/api/task/info/{}")]
    seen = {page: flower.get(page) for page in pages}
    assert {page: answer.status_code for page, answer in seen.items() if answer.status_code != 200} == {}
    assert "tpo.run_job" in seen["/api/tasks"].text
    assert {page: found for page, answer in seen.items() if (found := ran.leaks(answer.text))} == {}


def _workers(flower: httpx.Client) -> list[str]:
    """The names of the workers, once each has answered."""
    found = flower.get("/api/workers?refresh=true").json()
    return list(found) if all("stats" in worker for worker in found.values()) else []


def test_no_page_about_the_server_holds_any(ran: tuple[Ran, str]) -> None:
    pages = ("/", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", "/v1/models", "/v1/prompt-sets")
    seen = {page: ran[0].api.get(page).text for page in pages}
    assert {page: found for page, text in seen.items() if (found := ran[0].leaks(text))} == {}


def test_no_problem_quotes_any(ran: tuple[Ran, str]) -> None:
    assert {a.text: found for a in ran[0].problems if (found := ran[0].leaks(a.text + str(a.headers)))} == {}


def test_no_process_shows_any_in_its_command(ran: tuple[Ran, str]) -> None:
    commands = [" ".join(process.cmdline()) for process in ran[0].up.family()]
    assert len(commands) >= 1 + len(LOGS)
    assert not ran[0].leaks("\n".join(commands))


class _Monitored:
    """All commands that the broker gets within the block, as a list that grows."""

    def __init__(self, port: int) -> None:
        self._client = redis.Redis(port=port, password=BROKER, socket_timeout=None)
        self.told: list[str] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._begun = threading.Event()
        self._ended = f"end-of-monitor-{time.monotonic_ns()}"

    def __enter__(self) -> list[str]:
        self._thread.start()
        assert self._begun.wait(HANG_SECONDS)
        return self.told

    def __exit__(self, *_error: object) -> None:
        with redis.Redis(port=self._client.connection_pool.connection_kwargs["port"], password=BROKER) as client:
            client.echo(self._ended)
        self._thread.join(HANG_SECONDS)
        self._client.close()

    def _listen(self) -> None:
        with self._client.monitor() as monitor:  # type: ignore[no-untyped-call]
            self._begun.set()
            for command in monitor.listen():
                self.told.append(command["command"])
                if self._ended in command["command"]:
                    return


def _broker(port: int) -> str:
    """Every key and value that is there now."""
    with redis.Redis(port=port, password=BROKER) as client:
        return " ".join(f"{key!r} {client.dump(key)!r}" for key in client.scan_iter())


def _opened(told: list[str]) -> str:
    """The commands, and beside each the bodies of its messages, which are in base64."""
    words = " ".join(told)
    parts = words.replace("\\", "").split('"')
    bodies = [parts[n + 2] for n, part in enumerate(parts[:-2]) if part == "body"]
    return words + "".join(base64.b64decode(body).decode(errors="replace") for body in bodies)
