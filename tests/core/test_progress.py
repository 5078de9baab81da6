"""The table of jobs that the CLI shows."""

import io
from typing import Any

import pytest
from rich.console import Console

from tpo.cli.ui.progress import table


@pytest.mark.parametrize("width", [45, 80])
def test_table_shows_whole_id_at_any_width(width: int) -> None:
    job: Any = {
        "id": "job_" + "a" * 32,
        "status": "in_progress",
        "progress": {"iteration": 1, "max_iterations": 2, "phase": "critique"},
        "best": {"reward": 1.5},
    }
    console = Console(width=width, file=io.StringIO())
    console.print(table([job]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert job["id"] in shown
    assert ("in_progress  1/2        critique  +1.50" in shown) == (width == 80)
