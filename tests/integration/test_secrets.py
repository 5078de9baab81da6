"""Texts and secrets do not leak: after real jobs of every kind, all logs, messages and pages are searched for them.

A text is anything that a client sent or a model wrote: messages, candidates, critiques and gradients, metadata and the
client's own names. Texts belong only in the database and in responses to their owner.
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
from tests.support.webhooks import ANY_TARGET

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
# Sets the lowest log level, which no setting can, and makes the back end quote its prompt in an exception.
EVERY_PROCESS = """
import logging
basic = logging.basicConfig
logging.basicConfig = lambda **options: basic(**{**options, "level": logging.DEBUG})
from tpo.backends.scripted import ScriptedPolicy
write = ScriptedPolicy._text
def fail_or_write(self, request, seed):
    prompt = " ".join(m.content for m in request.messages)
    if "fails-for-text" in prompt:
        raise RuntimeError(f"cannot continue from {prompt}")
    return write(self, request, seed)
ScriptedPolicy._text = fail_or_write
"""
KEY, BROKER, FLOWER = "secret-api-key-5521", "secret-broker-5522", ("ops", "secret-flower-5523")
WRONG_KEY, WEBHOOK_TOKEN = "secret-wrong-key-5524", "secret-token-5525"
TEXT = "text-zebra-7391"
SECRETS = (KEY, BROKER, FLOWER[1], WRONG_KEY, WEBHOOK_TOKEN)
LOGS = ("api", "worker", "maintenance", "flower")


class Run:
    """Running system, and the texts and secrets that its output must not contain."""

    def __init__(self, up: Up, receiver: Receiver) -> None:
        self.up = up
        self.receiver = receiver
        self.api = httpx.Client(
            base_url=up.facts["api"], headers={"authorization": f"Bearer {KEY}"}, timeout=HANG_SECONDS, trust_env=False
        )
        self.problems: list[httpx.Response] = []
        self.hidden: set[str] = {TEXT, *SECRETS}

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        response = self.api.post(path, json=body).raise_for_status()
        found: dict[str, Any] = response.json()
        return found

    def ended(self, job_id: str) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            job: dict[str, Any] = self.api.get(f"/v1/jobs/{job_id}").json()
            return job if job["completed_at"] else None

        return eventually(ended, why=f"{job_id} should end")

    def leaks(self, place: str) -> list[str]:
        """Return the hidden texts and secrets that `place` contains."""
        return [text for text in self.hidden if text in place or json.dumps(text)[1:-1] in place]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Run, str]]:
    """System that has processed every kind of request, and everything that its broker received."""
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
            **{f"TPO_{name.upper()}": value for name, value in ANY_TARGET.items()},
            "TPO_WEBHOOK_RETRY_SECONDS": "0.2",
        }
        with _Monitored(valkey.port) as commands, running_up(folder / "data", **settings) as up:
            run = Run(up, receiver)
            with run.api:
                _use_everything(run)
                yield run, _broker(valkey.port) + _decoded(commands)
            assert up.stop()[0] == 0


def _use_everything(run: Run) -> None:
    webhook = run.post("/v1/webhooks", url=f"{run.receiver.url}/?token={WEBHOOK_TOKEN}")
    rotated = run.post(f"/v1/webhooks/{webhook['id']}/rotate-secret")
    run.hidden |= {webhook["secret"], rotated["secret"]}
    run.receiver.answers = [500]

    job = {"input": f"Where is {TEXT}?", "parameters": {"sample_size": 2, "max_iterations": 1}}
    names = {"metadata": {"ticket": TEXT}, "external_id": f"mine-{TEXT}"}
    submitted = run.api.post("/v1/jobs", json=job | names, headers={"idempotency-key": f"key-{TEXT}"}).json()
    assert run.ended(submitted["id"])["status"] == "completed"
    _hide_texts_of(run, submitted["id"])
    listed = run.api.get("/v1/jobs", params={"metadata[ticket]": TEXT}).json()["data"]
    assert [job["id"] for job in listed] == [submitted["id"]]
    with run.api.stream("GET", f"/v1/jobs/{submitted['id']}/events") as events:
        assert "job.completed" in events.read().decode()

    failed = run.ended(run.post("/v1/jobs", **{**job, "input": f"{TEXT} fails-for-text"})["id"])
    assert (failed["status"], failed["error"]["code"]) == ("failed", "internal_error")
    assert not run.leaks(json.dumps(failed["error"]))

    with openai.OpenAI(base_url=f"{run.up.facts['api']}/v1", api_key=KEY, max_retries=0) as client:
        _use_openai_client(run, client)

    for wrong in (
        run.api.post("/v1/jobs", content=f'{{"input": "{TEXT}'),
        run.api.post("/v1/jobs", json={**job, "parameters": {"sample_size": TEXT}}),
        run.api.post("/v1/jobs", json={"input": [{"role": TEXT, "content": TEXT}]}),
        run.api.post("/v1/jobs", json={**job, "metadata": {"a": [TEXT]}}),
        run.api.post("/v1/jobs", json={**job, "input": f"{TEXT} other"}, headers={"idempotency-key": f"key-{TEXT}"}),
        run.api.post("/v1/chat/completions", json={"model": "scripted", "messages": TEXT}),
        run.api.get("/v1/jobs", headers={"authorization": f"Bearer {WRONG_KEY}"}),
        run.api.post("/v1/webhooks", json={"url": f"ftp://x/?token={WEBHOOK_TOKEN}"}),
    ):
        assert 400 <= wrong.status_code < 500, wrong.text
        run.problems.append(wrong)
    eventually(lambda: len(run.receiver.received) >= 4, why="webhooks should be delivered, one of them twice")


def _use_openai_client(run: Run, client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model="scripted", messages=[{"role": "user", "content": f"Hi {TEXT}"}])
    run.hidden.add(str(completion.choices[0].message.content))
    body = {"model": "scripted", "input": f"Hello {TEXT}", "tpo": {"mode": "bon", "sample_size": 1}}
    good = json.dumps({"custom_id": TEXT, "method": "POST", "url": "/v1/responses", "body": body})
    file = client.files.create(file=(f"{TEXT}.jsonl", f"{good}\nno json {TEXT}\n".encode()), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/responses", completion_window="24h")
    eventually(lambda: client.batches.retrieve(batch.id).status in ("completed", "failed"), why="the batch should end")


def _hide_texts_of(run: Run, job_id: str) -> None:
    candidates = run.api.get(f"/v1/jobs/{job_id}/candidates").json()["data"]
    run.hidden |= {candidate["text"] for candidate in candidates}
    for each in run.api.get(f"/v1/jobs/{job_id}/iterations").json()["data"]:
        run.hidden |= {each[name] for name in ("critique", "gradient") if each[name]}
    assert len(run.hidden) > len(SECRETS) + 6


def test_run_stored_and_sent_the_texts(run: tuple[Run, str]) -> None:
    """Check that the searches below could find a text."""
    files = Path(run[0].up.facts["logs"]).parent.glob("tpo.db*")
    stored = b"".join(file.read_bytes() for file in files)
    assert TEXT.encode() in stored
    assert "tpo.run_job" in run[1]
    assert '[["job_' in run[1]  # from the body of a message


@pytest.mark.parametrize("name", LOGS)
def test_logs_contain_no_secret_at_the_lowest_level(run: tuple[Run, str], name: str) -> None:
    log = (Path(run[0].up.facts["logs"]) / f"{name}.log").read_text()
    assert " DEBUG " in log
    assert not run[0].leaks(log)


def test_worker_log_contains_the_traceback_of_a_failure(run: tuple[Run, str]) -> None:
    log = (Path(run[0].up.facts["logs"]) / "worker.log").read_text()
    assert "RuntimeError" in log
    assert "fail_or_write" in log


def test_broker_never_receives_a_secret(run: tuple[Run, str]) -> None:
    assert not run[0].leaks(run[1])


def test_flower_pages_contain_no_secret(run: tuple[Run, str]) -> None:
    with httpx.Client(base_url=run[0].up.facts["flower"], auth=FLOWER, timeout=HANG_SECONDS, trust_env=False) as flower:
        _search_flower(run[0], flower)


def _search_flower(run: Run, flower: httpx.Client) -> None:
    workers = eventually(lambda: _workers(flower), why="Flower should have the details of each worker")
    tasks = list(flower.get("/api/tasks").json())
    assert tasks
    table = "/tasks/datatable?draw=1&start=0&length=99&search[value]=&order[0][column]=0&columns[0][data]=name"
    pages = ["/", "/workers?json=1", "/tasks", table, "/broker", "/api/tasks", "/api/workers", "/api/task/types"]
    pages += ["/metrics", *(f"/worker/{name}" for name in workers)]
    pages += [page.format(task) for task in tasks for page in ("/task/{}", "/api/task/info/{}")]
    responses = {page: flower.get(page) for page in pages}
    assert {page: response.status_code for page, response in responses.items() if response.status_code != 200} == {}
    assert "tpo.run_job" in responses["/api/tasks"].text
    assert {page: found for page, response in responses.items() if (found := run.leaks(response.text))} == {}


def _workers(flower: httpx.Client) -> list[str]:
    """Return the names of the workers, or none until each has answered."""
    found = flower.get("/api/workers?refresh=true").json()
    return list(found) if all("stats" in worker for worker in found.values()) else []


def test_server_pages_contain_no_secret(run: tuple[Run, str]) -> None:
    pages = ("/", "/healthz", "/readyz", "/metrics", "/docs", "/openapi.json", "/v1/models", "/v1/prompt-sets")
    seen = {page: run[0].api.get(page).text for page in pages}
    assert {page: found for page, text in seen.items() if (found := run[0].leaks(text))} == {}


def test_errors_contain_no_secret(run: tuple[Run, str]) -> None:
    assert {a.text: found for a in run[0].problems if (found := run[0].leaks(a.text + str(a.headers)))} == {}


def test_process_commands_contain_no_secret(run: tuple[Run, str]) -> None:
    commands = [" ".join(process.cmdline()) for process in run[0].up.family()]
    assert len(commands) >= 1 + len(LOGS)
    assert not run[0].leaks("\n".join(commands))


class _Monitored:
    """Collects the commands that the broker receives within the block."""

    def __init__(self, port: int) -> None:
        self._client = redis.Redis(port=port, password=BROKER, socket_timeout=None)
        self.commands: list[str] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._begun = threading.Event()
        self._ended = f"end-of-monitor-{time.monotonic_ns()}"

    def __enter__(self) -> list[str]:
        self._thread.start()
        assert self._begun.wait(HANG_SECONDS)
        return self.commands

    def __exit__(self, *_error: object) -> None:
        with redis.Redis(port=self._client.connection_pool.connection_kwargs["port"], password=BROKER) as client:
            client.echo(self._ended)
        self._thread.join(HANG_SECONDS)
        self._client.close()

    def _listen(self) -> None:
        with self._client.monitor() as monitor:  # type: ignore[no-untyped-call]
            self._begun.set()
            for command in monitor.listen():
                self.commands.append(command["command"])
                if self._ended in command["command"]:
                    return


def _broker(port: int) -> str:
    """Return every key and value that the broker holds."""
    with redis.Redis(port=port, password=BROKER) as client:
        return " ".join(f"{key!r} {client.dump(key)!r}" for key in client.scan_iter())


def _decoded(commands: list[str]) -> str:
    """Return the commands, followed by the bodies of their messages, decoded from base64."""
    words = " ".join(commands)
    parts = words.replace("\\", "").split('"')
    bodies = [parts[n + 2] for n, part in enumerate(parts[:-2]) if part == "body"]
    return words + "".join(base64.b64decode(body).decode(errors="replace") for body in bodies)
