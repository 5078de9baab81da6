"""Output of the commands: what reaches a terminal, JSON errors, and shell completion."""

import json
from typing import Any

import pytest

from tests.support.stack import environment, tpo
from tpo.cli.ui import output
from tpo.cli.ui.progress import table
from tpo.cli.ui.record import Record, print_record

BIDI = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
CONTROLS = "".join(map(chr, [*range(9), *range(11, 32), *range(127, 160)])) + BIDI + "\u2028\u2029\ud800\U000e0041"
EVIL = f"a{CONTROLS}b\x1b[2J\x1b]0;owned\x07"
JOB: dict[str, Any] = {
    "id": EVIL,
    "status": EVIL,
    "attempt": EVIL,
    "error": {"code": EVIL, "message": EVIL},
    "stop_reason": EVIL,
    "incomplete_details": None,
    "declined_iteration": 1,
    "output": EVIL,
    "progress": {"iteration": EVIL, "max_iterations": EVIL, "phase": EVIL},
    "best": None,
}
CANDIDATE = {"id": EVIL, "iteration": 0, "text": EVIL, "reward": None, "unusable": EVIL}
ITERATION = {"number": 0, "chosen": {"id": EVIL}, "rejected": {"id": EVIL}, "critique": EVIL, "gradient": EVIL}


def test_no_text_of_a_job_controls_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output.console.cache_clear()
    console = output.console()
    print_record(console, JOB, Record.of_api([ITERATION], [CANDIDATE]))
    console.print(table([JOB]))  # type: ignore[list-item]
    console.print(EVIL, markup=False)
    output.console.cache_clear()
    shown = capsys.readouterr().out
    assert "owned" in shown
    assert not set(CONTROLS) & set(shown)


@pytest.mark.parametrize("character", CONTROLS)
def test_json_is_lossless_and_holds_no_control(character: str, capsys: pytest.CaptureFixture[str]) -> None:
    output.print_json({character: [f"x{character}y"]})
    line = capsys.readouterr().out
    assert json.loads(line) == {character: [f"x{character}y"]}
    assert character not in line


def test_error_holds_no_control(capsys: pytest.CaptureFixture[str]) -> None:
    output._print_error(EVIL, 1, None)
    assert not set(CONTROLS) & set(capsys.readouterr().err)


@pytest.mark.processes
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_run_ends_with_0_in_any_encoding(encoding: str) -> None:
    done = tpo("run", "Gr\u00f6\u00dfe \U0001f600", "-n", "1", "-d", "0", env=environment(PYTHONIOENCODING=encoding))
    assert done.returncode == 0, done.stderr


@pytest.mark.processes
@pytest.mark.parametrize(
    ("words", "exit_code"),
    [
        (("jobs", "--limit", "x"), 2),
        (("no-such-command",), 2),
        (("submit",), 2),
        (("keys", "revoke"), 2),
        (("jobs",), 1),
        (("run", "x", "--temperature", "9"), 2),
    ],
)
def test_json_makes_every_error_json(words: tuple[str, ...], exit_code: int) -> None:
    done = tpo(*words, "--json")
    assert (done.returncode, done.stdout) == (exit_code, "")
    error = json.loads(done.stderr)["error"]
    assert error["exit_code"] == exit_code
    assert error["message"]
    assert tpo(*words).returncode == exit_code


@pytest.mark.processes
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_shown_for_each_shell(shell: str) -> None:
    # A test process may have no shell above it that could be detected.
    env = environment(_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    done = tpo("--show-completion", shell, env=env)
    assert done.returncode == 0, done.stderr
    assert "_TPO_COMPLETE" in done.stdout
