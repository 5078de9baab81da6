"""Commands of `tpo` that check the machine: `db`, `doctor` and `demo`, and unusable databases."""

import json
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from testing.forking import run_python
from testing.ports import free_port
from testing.services import valkey_server
from testing.waiting import HANG_SECONDS
from tests.support.model_server import MODEL, model_server
from tests.support.stack import TPO, all_gone, environment, tpo

pytestmark = pytest.mark.processes


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
    ("url", "message", "message_of_upgrade"),
    [
        ("postgresql+psycopg://me:secret-word@127.0.0.1:1/none?colour=red", *["the driver refuses colour"] * 2),
        ("sqlite:///{folder}/file/tpo.db", "there is no database ", "cannot be created: "),
    ],
)
def test_unusable_database_url_is_a_one_line_error(
    url: str, message: str, message_of_upgrade: str, tmp_path: Path
) -> None:
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
        assert (message_of_upgrade if words[-1] == "upgrade" or words[0] == "up" else message) in line
        assert "secret-word" not in line
    for module in ("api", "worker", "worker.maintenance"):
        process = run_python("-m", module, env=env)
        assert process.returncode == 1
        assert message in process.stderr.splitlines()[-1]
        assert "Traceback" not in process.stderr
        assert "secret-word" not in process.stderr


def test_command_in_another_folder_creates_no_database(tmp_path: Path) -> None:
    env = environment()
    env.pop("TPO_DATABASE_URL", None)
    for words in (["keys", "list"], ["keys", "create", "me"], ["queues", "list"], ["db", "check"]):
        done = run_python("-m", "tpo", *words, env=env, cwd=tmp_path)
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert f"there is no database {tmp_path}/.tpo/tpo.db" in line
        assert "tpo db upgrade" in line
    for module in ("api", "worker", "worker.maintenance"):
        process = run_python("-m", module, env=env, cwd=tmp_path)
        assert process.returncode == 1
        assert "there is no database" in process.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_upgrade_creates_a_private_folder(tmp_path: Path) -> None:
    env = environment()
    env.pop("TPO_DATABASE_URL", None)
    for _ in range(2):
        assert run_python("-m", "tpo", "db", "upgrade", env=env, cwd=tmp_path).returncode == 0
        assert stat.S_IMODE((tmp_path / ".tpo").stat().st_mode) == 0o700


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
