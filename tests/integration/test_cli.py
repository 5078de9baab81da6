"""Commands of `tpo` as users and programs run them: stdout, stderr and exit codes."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import tpo as library
from testing.waiting import HANG_SECONDS
from tests.support.stack import TPO, environment, tpo

pytestmark = pytest.mark.processes

ACTIONS = ("cancel", "pause", "resume", "retry", "extend", "delete")
HEAVY = ("torch", "transformers", "sqlalchemy", "fastapi", "celery", "pydantic", "httpx")


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


def test_version_equals_package_version() -> None:
    from importlib.metadata import version

    assert version("tpo") == library.__version__
