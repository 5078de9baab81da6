"""Jobs whose policy and reward model are behind HTTP, from submission to the last candidate, and server failures."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from testing.ports import free_port
from testing.processes import System, marker, timeless
from testing.waiting import HANG_SECONDS, eventually
from tests.support.cutting import cutter
from tests.support.model_server import MODEL, ModelServer, model_server
from tpo.backends import load_policy, load_reward
from tpo.backends.spec import ModelSpec
from tpo.core.run import run
from tpo.core.state import State
from tpo.settings import Settings

REWARD = """
[[part]]
name = "quality"
kind = "model"
model = "vllm:{model}"
url = "{root}"
key = "reward"

[[part]]
name = "short"
kind = "length"
most = 20
weight = 0.5

[[part]]
name = "no_refund"
kind = "regex"
pattern = '(?i)\\brefund'
absent = true
weight = 0.25
"""


@pytest.fixture
def own_server() -> Iterator[ModelServer]:
    """Server that the test may kill."""
    with model_server() as server:
        yield server


def remote(system: System, server: ModelServer) -> Settings:
    """Point the system's processes at a server and return equal settings for this process."""
    system.environment |= {
        "TPO_POLICY": f"openai:{MODEL}",
        "TPO_OPENAI_URL": server.url,
        "TPO_REWARD_MODEL": f"vllm:{MODEL}",
        "TPO_REWARD_URL": server.root,
    }
    return Settings(
        policy=f"openai:{MODEL}",
        openai_url=server.url,
        reward_model=f"vllm:{MODEL}",
        reward_url=server.root,
    )


def undisturbed(state: State, settings: Settings) -> State:
    """Run the job from its start in this process and return its final state."""
    fresh = state.model_copy(update={"candidates": (), "iterations": (), "calls": ()})
    with (
        closing(load_policy(ModelSpec.from_settings(settings), settings)) as policy,
        closing(load_reward(settings, policy)) as reward,
    ):
        return timeless(run(fresh, policy, reward, lambda _state: None, lambda: None))


def test_server_killed_during_a_call_changes_no_result(sqlite_system: System, own_server: ModelServer) -> None:
    system, server = sqlite_system, own_server
    settings = remote(system, server)
    worker = system.worker()
    # One request for the samples, three for their scores, and the critique, which hangs.
    server.control({}, {}, {}, {}, {"hangs": True})
    job_id = system.submit(sample_size=3, max_iterations=2)
    eventually(lambda: len(server.seen()) == 5, why="the critique should be requested")
    server.kill()
    worker.wait_for("the server of the model at")
    server.start()
    job = system.wait_for_end(job_id)
    assert (job.status, job.attempt) == ("completed", 1)
    state = system.store.jobs.state(job_id)
    assert timeless(state) == undisturbed(state, settings)
    assert len(state.candidates) == 9


def test_cancelled_job_closes_its_connection(sqlite_system: System, own_server: ModelServer) -> None:
    system, server = sqlite_system, own_server
    remote(system, server)
    system.worker()
    server.control({"hangs": True})
    job_id = system.submit()
    eventually(server.seen, why="the server should receive the request")
    system.store.jobs.cancel(job_id)
    assert system.wait_for_end(job_id).status == "cancelled"
    assert eventually(server.left, why="the connection should be closed") == 1


def test_rejected_prompt_fails_only_its_job(sqlite_system: System, own_server: ModelServer) -> None:
    system, server = sqlite_system, own_server
    remote(system, server)
    worker = system.worker()
    server.control(window=600)
    too_long, fits = system.submit("word " * 700), system.submit("Why?", max_tokens=40, critique_max_tokens=8192)
    job = system.wait_for_end(too_long)
    assert (job.status, job.error_code) == ("failed", "context_too_long")
    assert "Shorten the conversation" in (job.error_message or "")
    assert system.wait_for_end(fits).status == "completed"
    assert worker.stop() == 0


def test_unusable_server_is_reported_at_startup(sqlite_system: System, own_server: ModelServer) -> None:
    remote(sqlite_system, own_server)
    right, wrong = marker(), marker()
    own_server.control(key=right)
    for settings, message in (
        ({"openai_api_key": wrong, "reward_api_key": right}, "refused the key (401). Set TPO_OPENAI_API_KEY"),
        (
            {"openai_api_key": right, "reward_url": "http://127.0.0.1:1", "remote_start_seconds": 0.3},
            "Check its address",
        ),
    ):
        process = sqlite_system.start("-m", "worker", **settings)
        assert process.popen.wait(HANG_SECONDS) == 1
        assert message in process.output
        assert not [key for key in (right, wrong) if key in process.output]


def test_shipped_models_behind_http_score_each_part(sqlite_system: System, tmp_path: Path) -> None:
    with model_server("demo") as server:
        system, key = sqlite_system, marker()
        server.control(key=key)
        file = tmp_path / "quality.toml"
        file.write_text(REWARD.format(model=MODEL, root=server.root))
        system.environment |= {
            "TPO_POLICY": f"openai:{MODEL}",
            "TPO_OPENAI_URL": server.url,
            "TPO_OPENAI_API_KEY": key,
            "TPO_OPENAI_SAMPLES": "separate",
            "TPO_PROMPT_SET": "tiny",
            "TPO_REWARD_MODEL": "quality",
            "TPO_REWARD_FILE": str(file),
            "TPO_SERVER_API_KEYS": f'{{"reward": "{key}"}}',
        }
        port = free_port()
        system.start("-m", "api", port=port).wait_for("Listening on")
        system.worker()
        body = {
            "input": "My name is Clara. My lamp is now broken. Can I get a quick refund?",
            "parameters": {"sample_size": 4, "max_iterations": 2, "seed": 1},
        }
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=HANG_SECONDS, trust_env=False) as api:
            job_id = api.post("/v1/jobs", json=body).raise_for_status().json()["id"]
            system.wait_for_end(job_id)
            job = api.get(f"/v1/jobs/{job_id}").json()
            candidates = api.get(f"/v1/jobs/{job_id}/candidates").json()["data"]
        assert job["status"] == "completed"
        assert (job["model"], job["parameters"]["reward_model"]) == (f"openai:{MODEL}", "quality")
        assert len(candidates) == 12
        scored = [c for c in candidates if c["reward"] is not None]
        assert len(scored) > 6
        for candidate in scored:
            parts = {part["name"]: part for part in candidate["parts"]}
            assert list(parts) == ["quality", "short", "no_refund"]
            assert candidate["reward"] == pytest.approx(sum(p["value"] * p["weight"] for p in candidate["parts"]))
            assert parts["no_refund"]["value"] == float("refund" not in candidate["text"].lower())
        initial_best = max(c["reward"] for c in scored if c["iteration"] == 0)
        assert job["best"]["reward"] > initial_best
        state = system.store.jobs.state(job_id)
        settings = Settings(
            policy=f"openai:{MODEL}",
            openai_url=server.url,
            openai_api_key=key,
            openai_samples="separate",
            reward_model="quality",
            reward_file=file,
            server_api_keys={"reward": key},
        )
        # Only the last bits of scores depend on the batch.
        for candidate, repeated in zip(state.candidates, undisturbed(state, settings).candidates, strict=True):
            assert (candidate.id, candidate.text, candidate.unusable) == (repeated.id, repeated.text, repeated.unusable)
            assert candidate.reward == pytest.approx(repeated.reward, abs=1e-4)
        output = "".join(process.output for process in system.processes)
        assert key not in output
        assert candidates[0]["text"] not in output


def test_job_ends_after_its_link_to_the_model_server_froze(sqlite_system: System, own_server: ModelServer) -> None:
    system, server = sqlite_system, own_server
    settings = remote(system, server)
    with cutter(urlsplit(server.url).port or 80) as proxy:
        system.environment |= {"TPO_OPENAI_URL": f"{proxy.url}/v1", "TPO_REWARD_URL": proxy.url}
        system.worker(remote_read_seconds=2)
        system.wait_for_end(system.submit())
        proxy.freeze()  # the connections that the worker keeps open: they are silent, and never reset
        job_id = system.submit(seed=1)
        job = system.wait_for_end(job_id)
    state = system.store.jobs.state(job_id)
    assert (job.status, job.attempt) == ("completed", 1)
    assert timeless(state) == undisturbed(state, settings)
