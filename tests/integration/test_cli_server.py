"""Commands of `tpo` that use a server."""

import json
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from testing.ports import free_port
from testing.waiting import HANG_SECONDS, eventually
from tests.support.stack import TPO, Up, running_up, tpo

pytestmark = pytest.mark.processes

KEY = "a-key-of-this-test"


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Start `tpo up` with an API key."""
    with running_up(tmp_path_factory.mktemp("up") / "data", TPO_API_KEY=KEY) as running:
        yield running


def test_submit_wait_prints_only_the_answer(up: Up) -> None:
    done = tpo("submit", "--wait", "Where is my order?", env=up.env)
    assert done.returncode == 0
    assert done.stdout.startswith("Draft ")
    assert len(done.stdout.splitlines()) == 1
    assert "completed" in done.stderr


def test_submit_prints_ids_for_show_jobs_and_cancel(up: Up) -> None:
    done = tpo("submit", "one", "two", "--n", "3", "-d", "1", env=up.env)
    ids = done.stdout.split()
    assert len(ids) == 2
    listed = _json(up, "jobs", "--limit", "2")
    assert [job["id"] for job in listed] == ids[::-1]
    assert ids[0] in tpo("jobs", env=up.env).stdout
    assert _ended(up, ids[0])["parameters"]["sample_size"] == 3
    shown = tpo("show", ids[0], env=up.env).stdout
    for part in (ids[0], "completed", "iteration 0", "iteration 1", "Critique", "Gradient", "1-2", "mean reward"):
        assert part in shown
    record = _json(up, "show", ids[0])
    assert len(record["candidates"]) == 6
    assert record["iterations"][1]["critique"]
    assert tpo("cancel", ids[0], env=up.env).stdout.strip() == f"{ids[0]} is completed"


def test_submit_reads_jsonl(up: Up, tmp_path: Path) -> None:
    lines = ['"a plain prompt"', "", '{"input": "a body", "parameters": {"seed": 3}, "metadata": {"row": "2"}}']
    (tmp_path / "jobs.jsonl").write_text("\n".join(lines))
    done = tpo("submit", "--file", str(tmp_path / "jobs.jsonl"), "--mode", "bon", "--wait", "--json", env=up.env)
    jobs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [job["input"] for job in jobs] == ["a plain prompt", "a body"]
    assert {job["parameters"]["mode"] for job in jobs} == {"bon"}
    assert (jobs[1]["parameters"]["seed"], jobs[1]["metadata"]) == (3, {"row": "2"})
    (tmp_path / "broken.jsonl").write_text("not json")
    done = tpo("submit", "--file", str(tmp_path / "broken.jsonl"), env=up.env)
    assert done.returncode == 2
    assert "broken.jsonl:1: is not JSON" in done.stderr


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"input": "b", "sample_size": 4}', "sample_size: belongs under parameters"),
        ('{"input": "b", "parameters": {"sample_size": 0}}', "parameters.sample_size: "),
        ('{"input": " "}', "input: is blank"),
        ("7", "is neither a prompt nor the body of a request"),
    ],
)
def test_submit_file_with_a_bad_line_submits_nothing(up: Up, tmp_path: Path, line: str, reason: str) -> None:
    file = tmp_path / "jobs.jsonl"
    file.write_text(f'"a"\n{line}\n')
    before = [job["id"] for job in _json(up, "jobs")]
    done = tpo("submit", "--file", str(file), env=up.env)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"tpo: {file}:2: {reason}")
    assert [job["id"] for job in _json(up, "jobs")] == before


def test_submit_file_again_continues_without_duplicates(up: Up, tmp_path: Path) -> None:
    file = tmp_path / "again.jsonl"
    file.write_text('"again"\n')
    first = tpo("submit", "--file", str(file), env=up.env).stdout.split()
    file.write_text('"again"\n"again"\n"other"\n')  # as after an interruption: the first line was submitted
    second = tpo("submit", "--file", str(file), env=up.env).stdout.split()
    assert second[:1] == first
    assert len(set(second)) == 3
    assert tpo("submit", "--file", str(file), env=up.env).stdout.split() == second
    assert not set(tpo("submit", "--file", str(file), "--resubmit", env=up.env).stdout.split()) & set(second)


def test_cancel_ends_a_job_but_ctrl_c_does_not(tmp_path: Path) -> None:
    with running_up(tmp_path / "data", TPO_SCRIPTED_LATENCY="0.5") as slow:
        words = [*TPO, "submit", "--wait", "hello", "-d", "50"]
        with subprocess.Popen(
            words, env=slow.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as waiting:
            assert waiting.stderr is not None
            job_id = next(line for line in waiting.stderr if "in_progress" in line).split()[0]
            waiting.send_signal(signal.SIGINT)
            assert "continues with the jobs" in waiting.stderr.read()
            assert waiting.wait(HANG_SECONDS) == 130
        assert _json(slow, "show", job_id)["status"] == "in_progress"
        assert tpo("cancel", job_id, env=slow.env).returncode == 0
        assert _ended(slow, job_id)["status"] == "cancelled"


def test_rejected_job_is_a_one_line_error_with_the_field(up: Up) -> None:
    done = tpo("submit", "x", "--n", "1000", env=up.env)
    assert done.returncode == 2
    assert done.stderr.startswith("tpo: parameters.sample_size: ")
    assert len(done.stderr.strip().splitlines()) == 1
    assert "no-such-policy" in tpo("submit", "x", "--model", "no-such-policy", env=up.env).stderr
    assert tpo("submit", "x", "--temperature", "nan", env=up.env).stderr.startswith("tpo: parameters.temperature: ")


def test_job_is_paused_resumed_extended_and_deleted(up: Up) -> None:
    ended = json.loads(tpo("submit", "x", "--wait", "--json", "--n", "2", "-d", "1", env=up.env).stdout)
    extended = _json(up, "extend", ended["id"], "--iterations", "2")
    assert (extended["source_id"], extended["parameters"]["max_iterations"]) == (ended["id"], 3)
    assert tpo("extend", ended["id"], env=up.env).returncode == 2
    assert "cannot be paused" in tpo("pause", ended["id"], env=up.env).stderr
    assert tpo("retry", ended["id"], env=up.env).returncode == 1
    job_id = tpo("submit", "x", "-d", "50", "--n", "64", env=up.env).stdout.strip()
    assert job_id in tpo("pause", job_id, env=up.env).stdout
    assert job_id in tpo("resume", job_id, env=up.env).stdout
    assert tpo("cancel", job_id, env=up.env).returncode == 0
    assert _ended(up, job_id)["status"] == "cancelled"
    retried = _json(up, "retry", job_id)
    assert retried["source_id"] == job_id
    _json(up, "cancel", retried["id"])
    assert tpo("delete", job_id, env=up.env).stdout == f"{job_id} is deleted\n"
    assert tpo("show", job_id, env=up.env).returncode == 1


def test_submit_and_run_share_their_options(up: Up) -> None:
    words = ("x", "--n", "2", "-d", "9", "--seed", "1", "--patience", "1", "--min-gain", "1000", "--stop-on-decline")
    served = json.loads(tpo("submit", *words, "--wait", "--json", env=up.env).stdout)
    local = json.loads(tpo("run", *words, "--json", env=up.env).stdout)
    for job in (served, local):
        assert (job["status"], job["stop_reason"], job["incomplete_details"]) == ("completed", "early_stop", None)
    assert served["output"] == local["output"]
    assert local["params"]["early_stop"] == served["parameters"]["early_stop"] == {"patience": 1, "min_gain": 1000.0}
    assert "the best reward no longer rose" in tpo("run", *words, env=up.env).stderr
    assert "the best reward no longer rose" in tpo("show", served["id"], env=up.env).stdout
    budget = ("x", "--max-total-tokens", "1", "--max-output-tokens", "90000", "--max-seconds", "600")
    served = json.loads(tpo("submit", *budget, "--deadline", "600", "--wait", "--json", env=up.env).stdout)
    local = json.loads(tpo("run", *budget, "--json", env=up.env).stdout)
    assert served["deadline_at"]
    for job in (served, local):
        assert (job["status"], job["incomplete_details"]) == ("incomplete", {"reason": "max_total_tokens"})
    for command, named in (("submit", "parameters.early_stop.patience"), ("run", "early_stop.patience")):
        rejected = tpo(command, "x", "--patience", "0", env=up.env)
        assert (rejected.returncode, named in rejected.stderr) == (2, True)


def test_unknown_job_is_a_one_line_error(up: Up) -> None:
    for command in ("show", "cancel", "pause", "resume", "retry", "delete"):
        done = tpo(command, "job_00000000000000000000000000000000", env=up.env)
        assert (done.returncode, done.stdout) == (1, "")
        assert "job_00000000000000000000000000000000" in done.stderr


def test_wrong_key_error_names_the_setting(up: Up) -> None:
    done = tpo("jobs", env={**up.env, "TPO_API_KEY": "another-key-of-16"})
    assert done.returncode == 1
    assert "TPO_API_KEY" in done.stderr
    assert "another-key-of-16" not in done.stderr


@pytest.mark.parametrize("words", [["jobs"], ["submit", "x"], ["show", "job_1"], ["cancel", "job_1"]])
def test_unreachable_server_is_a_one_line_error(words: list[str]) -> None:
    done = tpo(*words, "--url", f"http://127.0.0.1:{free_port()}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "tpo up" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def _json(up: Up, *words: str) -> Any:
    done = tpo(*words, "--json", env=up.env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _ended(up: Up, job_id: str) -> Any:
    def ended() -> Any:
        job = _json(up, "show", job_id)
        return job if job["status"] in ("completed", "cancelled", "failed") else None

    return eventually(ended, why="the job should end")
