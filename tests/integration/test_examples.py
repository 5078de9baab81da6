"""The programs in examples/ run against a real server with the demo models, and their answers make sense."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from demo.grammar import check
from testing.forking import run_python
from testing.ports import free_port
from testing.processes import running_system
from testing.waiting import HANG_SECONDS
from tests.support.demo_messages import facts_of

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
MESSAGES = EXAMPLES / "messages.jsonl"
JUDGE = "http://127.0.0.1:8001/v1"

pytestmark = [pytest.mark.processes, pytest.mark.slow]


class Server(NamedTuple):
    """A running API with a worker that has the demo models and a judge."""

    url: str

    def run(self, module: str, *words: str) -> list[str]:
        """Run an example to its end and return the lines that it prints."""
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TPO_URL": self.url,
            "OPENAI_BASE_URL": f"{self.url}/v1",
            "OPENAI_API_KEY": "none",
        }
        done = run_python("-m", f"examples.{module}", *words, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not done.stderr
        return done.stdout.splitlines()


@pytest.fixture(scope="module")
def server(sqlite_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Server, worker and judge for all tests of this file. The reward of all jobs has the judge's part."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copy(sqlite_template, folder / "tpo.db")
    judge = free_port()
    text = (EXAMPLES / "judge.toml").read_text()
    assert JUDGE in text
    (folder / "judge.toml").write_text(text.replace(JUDGE, f"http://127.0.0.1:{judge}/v1"))
    with running_system(f"sqlite:///{folder}/tpo.db", folder) as system:
        system.environment |= {"TPO_POLICY": "demo", "TPO_REWARD_MODEL": "judged"}
        port = free_port()
        started = [
            (system.start("-m", "examples.judge_server", str(judge)), "ready"),
            (system.start("-m", "api", port=port), "Listening on"),
            (system.start("-m", "worker", reward_file=folder / "judge.toml", threads=1), "is ready"),
        ]
        for process, text in started:
            process.wait_for(text)
        yield Server(f"http://127.0.0.1:{port}")


def assert_makes_sense(message: str, answer: str, qualities: int) -> None:
    """Check that an answer has no wrong fact, no unknown sentence, and at least this number of the 14 qualities."""
    facts = facts_of(message)
    assert facts, message
    findings = check(answer, facts)
    assert not findings.wrong + findings.unknown, answer
    assert len(findings.met) >= qualities, answer


def test_align_dataset_answers_every_message(server: Server) -> None:
    rows = [json.loads(line) for line in MESSAGES.read_text().splitlines()]
    lines = server.run("align_dataset", str(MESSAGES))
    aligned = [json.loads(line) for line in lines]
    assert [{name: each[name] for name in rows[0]} for each in aligned] == rows
    for each in aligned:
        assert_makes_sense(each["message"], each["answer"], 10)
        assert each["reward"] > 10
    # The jobs have names, so a second run reads those of the first.
    assert server.run("align_dataset", str(MESSAGES)) == lines


def test_preference_pairs_prefer_the_better_answer(server: Server) -> None:
    pairs = [json.loads(line) for line in server.run("preference_pairs", str(MESSAGES))]
    assert len(pairs) == 3
    for each in pairs:
        facts = facts_of(each["prompt"])
        assert facts
        assert set(each) == {"prompt", "chosen", "rejected"}
        assert check(each["chosen"], facts).value > check(each["rejected"], facts).value


def test_openai_client_gets_both_answers(server: Server) -> None:
    from examples.openai_client import MESSAGE

    chat, response = server.run("openai_client")
    assert_makes_sense(MESSAGE, chat.removeprefix("chat: "), 6)
    assert_makes_sense(MESSAGE, response.removeprefix("response: "), 9)


def test_judge_adds_its_part_to_the_reward(server: Server) -> None:
    from examples.judged import MESSAGE

    lines = server.run("judged")
    assert len(lines) == 8
    rewards = []
    for line in lines:
        reward, _, rest = line.partition(" = quality ")
        quality, _, tone = rest.partition(", tone ")
        assert float(reward) == pytest.approx(float(quality) + 2 * float(tone.partition(":")[0]), abs=0.11)
        rewards.append(float(reward))
    assert rewards == sorted(rewards, reverse=True)
    assert_makes_sense(MESSAGE, lines[0].partition(": ")[2], 7)


def test_own_reward_is_installed_and_used(tmp_path: Path) -> None:
    assert len((EXAMPLES / "own_reward" / "on_topic.py").read_text().splitlines()) <= 20
    shutil.copytree(EXAMPLES / "own_reward", tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--target", str(tmp_path / "installed")]
    subprocess.run(
        [sys.executable, "-m", "pip", "install", *options, str(tmp_path / "source")], check=True, timeout=HANG_SECONDS
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT), str(tmp_path / "installed"))),
        "TPO_REWARD_FILE": str(EXAMPLES / "own_reward" / "reward.toml"),
        "TPO_REWARD_MODEL": "on-topic",
    }
    message = "My name is Clara. My lamp is now broken. Can I get a quick refund?"
    words = ("run", "--json", "--seed", "1", "-n", "4", "-d", "1", message)
    done = run_python("-m", "tpo", *words, env=environment)
    assert done.returncode == 0, done.stderr
    best = json.loads(done.stdout)["best"]
    quality, on_topic = best["parts"]
    assert (on_topic["name"], on_topic["weight"]) == ("on_topic", 5.0)
    assert 0 < on_topic["value"] <= 1
    assert best["reward"] == pytest.approx(quality["value"] + 5 * on_topic["value"])
    assert_makes_sense(message, best["text"], 7)
