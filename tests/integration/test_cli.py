"""Commands of `tpo` as users and programs run them: stdout, stderr and exit codes."""

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tpo as library
from testing.forking import run_python
from testing.ports import free_port
from testing.services import valkey_server
from testing.waiting import HANG_SECONDS, eventually
from tests.support.model_server import MODEL, model_server
from tests.support.stack import TPO, Up, all_gone, environment, running_up, tpo

pytestmark = pytest.mark.processes

KEY = "a-key-of-this-test"
ACTIONS = ("cancel", "pause", "resume", "retry", "extend", "delete")
HEAVY = ("torch", "transformers", "sqlalchemy", "fastapi", "celery", "pydantic", "httpx")


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """Running `tpo up` with an API key."""
    with running_up(tmp_path_factory.mktemp("up") / "data", TPO_API_KEY=KEY) as running:
        yield running


# Start-up


@pytest.mark.parametrize("module", ["tpo", "tpo.cli"])
def test_command_imports_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_names_every_command() -> None:
    done = tpo("--help")
    assert done.returncode == 0
    for command in ("run", "up", "submit", "jobs", "show", *ACTIONS, "doctor", "demo", "db"):
        assert f" {command} " in done.stdout
        assert tpo(command, "--help").returncode == 0


def test_scripted_run_never_imports_torch() -> None:
    code = (
        "import sys; from tpo.cli import app\n"
        "try: app(['run', 'x'])\n"
        "except SystemExit: print([m for m in ('torch', 'transformers', 'sqlalchemy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# tpo run


def test_run_shows_the_answer_and_each_iteration() -> None:
    done = tpo("run", "Where is my order?", "--n", "3", "--iterations", "2", "--seed", "5")
    assert done.returncode == 0
    for part in ("First answer", "Critique", "Gradient", "Final answer", "mean reward", "best so far", "won"):
        assert part in done.stdout
    # Stderr has a line for each model call: three of samples, three of scores, two critiques, two gradients.
    assert len(done.stderr.splitlines()) == 10


def test_run_json_is_reproducible() -> None:
    words = ("run", "Where is my order?", "--n", "4", "-d", "1", "--seed", "9", "--json")
    first, again, other = tpo(*words), tpo(*words), tpo(*words[:-2], "10", "--json")
    value = json.loads(first.stdout)
    assert value["status"] == "completed"
    assert value["output"] == value["best"]["text"]
    assert len(value["candidates"]) == 8
    assert len(value["mean_rewards"]) == 2
    assert json.loads(again.stdout)["output"] == value["output"]
    assert json.loads(other.stdout)["output"] != value["output"]


def test_run_json_does_not_depend_on_stdout_encoding() -> None:
    words = ("run", "Größe 😀", "-n", "1", "-d", "0", "--seed", "9", "--json")
    values = [json.loads(tpo(*words, env=environment(PYTHONIOENCODING=name)).stdout) for name in ("ascii", "utf-8")]
    assert values[0]["input"] == values[1]["input"] == [{"role": "user", "content": "Größe 😀"}]


def test_run_reads_stdin_and_files(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Wo ist mein Päckchen?")
    outputs = [
        json.loads(done.stdout)
        for done in (
            tpo("run", "Wo ist mein Päckchen?", "--json"),
            tpo("run", "-", "--json", stdin="Wo ist mein Päckchen?"),
            tpo("run", "--file", str(tmp_path / "prompt.txt"), "--json"),
        )
    ]
    assert {value["input"][0]["content"] for value in outputs} == {"Wo ist mein Päckchen?"}
    assert len({value["output"] for value in outputs}) == 1


def test_run_supports_best_of_n_and_a_system_message() -> None:
    done = tpo("run", "hello", "--mode", "bon", "--system", "Be brief.", "--json")
    value = json.loads(done.stdout)
    assert [m["role"] for m in value["input"]] == ["system", "user"]
    assert value["iterations"] == []
    assert {c["kind"] for c in value["calls"]} == {"sample", "score"}


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["run"], "prompt"),
        (["run", "   "], "prompt"),
        (["run", "x", "--n", "0"], "sample_size"),
        (["run", "x", "--temperature", "-1"], "temperature"),
        (["run", "x", "--mode", "magic"], "--mode"),
        (["run", "x", "--prompt-set", "nope"], "prompt_set"),
        (["run", "--file", "/does/not/exist"], "/does/not/exist"),
        (["submit"], "prompt"),
        (["up", "--port", "0"], "--port"),
        (["up", "--port", "99999"], "--port"),
    ],
)
def test_wrong_usage_exits_2_and_names_the_option(words: list[str], named: str) -> None:
    done = tpo(*words)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("command", ["run", "submit"])
def test_undecodable_stdin_is_a_one_line_error(command: str) -> None:
    words = [*TPO, command, "-"]
    done = subprocess.run(words, input=b"\xff\xfe", env=environment(LC_ALL="C"), capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"tpo: cannot read stdin: not UTF-8 text\n"


def test_missing_model_is_a_one_line_error() -> None:
    done = tpo("run", "x", "--model", "/does/not/exist")
    assert done.returncode == 1
    assert "/does/not/exist" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_ctrl_c_ends_a_run_with_the_best_so_far() -> None:
    with subprocess.Popen(
        [*TPO, "run", "hello", "-d", "50", "--json"],
        env=environment(TPO_SCRIPTED_LATENCY="0.3"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        next(line for line in process.stderr if "rewards" in line)
        process.send_signal(signal.SIGINT)
        value = json.loads(process.stdout.read())
        assert process.wait(HANG_SECONDS) == 130
    assert value["status"] == "incomplete"
    assert value["output"] == value["best"]["text"]
    assert len(value["iterations"]) < 50


# A server


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
    assert "line 1" in done.stderr


def test_cancel_ends_a_job_but_ctrl_c_does_not(tmp_path: Path) -> None:
    with running_up(tmp_path / "data", TPO_SCRIPTED_LATENCY="0.5") as slow:
        words = [*TPO, "submit", "--wait", "hello", "-d", "50"]
        with subprocess.Popen(
            words, env=slow.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as waiting:
            assert waiting.stderr is not None
            job_id = next(line for line in waiting.stderr if "in_progress" in line).split()[0]
            waiting.send_signal(signal.SIGINT)
            assert "goes on" in waiting.stderr.read()
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


# The rest


def test_db_upgrade_is_idempotent_and_check_reports(database_url: str) -> None:
    env = environment(TPO_DATABASE_URL=database_url)
    before = tpo("db", "check", env=env)
    assert before.returncode == 1
    assert "tpo db upgrade" in before.stderr
    assert tpo("db", "upgrade", env=env).returncode == 0
    assert tpo("db", "upgrade", env=env).returncode == 0
    assert json.loads(tpo("db", "check", "--json", env=env).stdout)["ok"] is True


def test_doctor_passes_on_a_working_machine() -> None:
    done = tpo("doctor", "--json", env=environment(TPO_PORT=str(free_port()), TPO_FLOWER_PORT=str(free_port())))
    assert done.returncode == 0
    assert {finding["verdict"] for finding in json.loads(done.stdout)} == {"ok"}


def test_doctor_reports_each_failure(tmp_path: Path) -> None:
    env = environment(
        TPO_POLICY=str(tmp_path),
        TPO_BROKER_URL=f"redis://127.0.0.1:{free_port()}/0",
        TPO_DATABASE_URL="postgresql+psycopg://nobody:secret-word@127.0.0.1:1/none",
    )
    done = tpo("doctor", "--json", env=env)
    failed = {f["what"]: f["message"] for f in json.loads(done.stdout) if f["verdict"] == "fail"}
    assert done.returncode == 1
    assert set(failed) == {"policy", "broker", "database"}
    assert "secret-word" not in done.stdout + done.stderr
    assert tpo("doctor", env=environment(TPO_LEASE_SECONDS="-1")).returncode == 1


def test_doctor_checks_model_servers(tmp_path: Path) -> None:
    file = tmp_path / "reward.toml"
    file.write_text("[[part]]")
    with model_server() as server:
        base = {"TPO_POLICY": f"openai:{MODEL}", "TPO_OPENAI_URL": server.url}
        for more, verdicts in (
            ({"TPO_REWARD_MODEL": f"vllm:{MODEL}", "TPO_REWARD_URL": server.root}, ("ok", "ok")),
            ({"TPO_REWARD_MODEL": "vllm:other", "TPO_REWARD_URL": server.root}, ("ok", "fail")),
            ({"TPO_REWARD_MODEL": "quality", "TPO_REWARD_FILE": str(file)}, ("ok", "fail")),
            ({"TPO_POLICY": "openai:other"}, ("fail", "ok")),
        ):
            done = tpo("doctor", "--json", env=environment(**{**base, **more}))
            findings = {f["what"]: f["verdict"] for f in json.loads(done.stdout)}
            assert (findings["policy"], findings["reward"]) == verdicts


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+psycopg://me:secret-word@127.0.0.1:1/none?colour=red", "the driver refuses colour"),
        ("sqlite:///{folder}/file/tpo.db", "cannot be made: "),
    ],
)
def test_unusable_database_url_is_a_one_line_error(url: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    env = environment(TPO_DATABASE_URL=url.format(folder=tmp_path))
    broker = ["--broker-port", str(free_port())]
    for words in (
        ["db", "upgrade"],
        ["db", "check"],
        ["keys", "list"],
        ["up", "--data-dir", str(tmp_path / "data"), *broker],
    ):
        done = tpo(*words, env=env)
        assert done.returncode == 1
        (line,) = [line for line in done.stderr.splitlines() if "starting in" not in line]
        assert line.startswith("tpo: TPO_DATABASE_URL: ")
        assert message in line
        assert "secret-word" not in line
    for module in ("api", "worker", "worker.maintenance"):
        process = run_python("-m", module, env=env)
        assert process.returncode == 1
        assert message in process.stderr.splitlines()[-1]
        assert "Traceback" not in process.stderr
        assert "secret-word" not in process.stderr


def test_file_that_is_no_database_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "tpo.db").write_bytes(b"no database " * 1000)
    env = environment(TPO_DATABASE_URL=f"sqlite:///{tmp_path}/tpo.db")
    broker = ["--broker-port", str(free_port())]
    for words in (["db", "upgrade"], ["db", "check"], ["keys", "list"], ["up", "--data-dir", str(tmp_path), *broker]):
        done = tpo(*words, env=env)
        assert done.returncode == 1
        (line,) = [line for line in done.stderr.splitlines() if "starting in" not in line]
        assert "no SQLite database" in line
    done = tpo("doctor", "--json", env=env)
    assert "no SQLite database" in {f["what"]: f["message"] for f in json.loads(done.stdout)}["database"]
    for module in ("api", "worker", "worker.maintenance"):
        process = run_python("-m", module, env=env)
        assert process.returncode == 1
        assert "no SQLite database" in process.stderr.splitlines()[-1]
        assert "Traceback" not in process.stderr


def test_doctor_reaches_real_servers(tmp_path: Path) -> None:
    with valkey_server(tmp_path / "valkey") as valkey:
        env = environment(TPO_BROKER_URL=valkey.url, TPO_DATABASE_URL=f"sqlite:///{tmp_path}/tpo.db")
        assert tpo("db", "upgrade", env=env).returncode == 0
        findings = {f["what"]: f for f in json.loads(tpo("doctor", "--json", env=env).stdout)}
    assert (findings["broker"]["verdict"], findings["database"]["verdict"]) == ("ok", "ok")


@pytest.mark.slow
def test_demo_recovers_from_a_killed_worker(tmp_path: Path) -> None:
    env = environment(TPO_SCRIPTED_LATENCY="0.15", TMPDIR=str(tmp_path))
    done = tpo("demo", "--json", env=env)
    assert done.returncode == 0, done.stderr
    jobs = [json.loads(line) for line in done.stdout.splitlines()]
    assert [job["status"] for job in jobs] == ["completed"] * 3
    assert [job["attempt"] for job in jobs] == [1, 1, 2]
    assert all(len(job["iterations"]) == 3 for job in jobs)
    assert "kill -9" in done.stderr
    assert "word for word" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_ends_cleanly_when_interrupted(tmp_path: Path, number: int) -> None:
    import psutil

    env = environment(TPO_SCRIPTED_LATENCY="1", TMPDIR=str(tmp_path))
    with subprocess.Popen([*TPO, "demo"], env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as demo:
        assert demo.stderr is not None
        next(line for line in demo.stderr if "in_progress" in line)
        family = psutil.Process(demo.pid).children(recursive=True)
        assert len(family) == 6
        demo.send_signal(number)
        demo.communicate(timeout=HANG_SECONDS)
        assert demo.returncode == 130
    assert all_gone(family)
    assert not list(tmp_path.iterdir())


def test_version_equals_package_version() -> None:
    from importlib.metadata import version

    assert version("tpo") == library.__version__


def _json(up: Up, *words: str) -> Any:
    done = tpo(*words, "--json", env=up.env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _ended(up: Up, job_id: str) -> Any:
    def ended() -> Any:
        job = _json(up, "show", job_id)
        return job if job["status"] in ("completed", "cancelled", "failed") else None

    return eventually(ended, why="the job should end")
