"""Progress of running jobs: a live table on a terminal, else a line for each change."""

from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from tpo.client import Job, JobSummary

STYLES = {"completed": "green", "failed": "red", "expired": "red", "incomplete": "yellow", "cancelled": "yellow"}


class JobTable:
    """A display of jobs that is updated while they run. Use it as a context manager."""

    def __init__(self, console: "Console") -> None:
        from rich.live import Live

        self._console = console
        self._jobs: dict[str, Job] = {}
        self._live = Live(console=console, transient=True) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def show(self, job: "Job") -> None:
        """Show the current state of a job."""
        previous = self._jobs.get(job["id"])
        self._jobs[job["id"]] = job
        if self._live:
            self._live.update(table(list(self._jobs.values())))
        elif previous is None or step_of(previous) != step_of(job):
            self._console.print(f"{job['id']}  {step_of(job)}  {best_of(job)}".rstrip(), markup=False)


def table(jobs: "Sequence[Job | JobSummary]") -> "Table":
    """Return a table with a row for each job."""
    from rich.table import Table

    rows = Table(box=None, pad_edge=False, header_style="dim")
    # A window may be narrower than a row, but an id is useful only if it is complete.
    rows.add_column("job", no_wrap=True, min_width=max((len(job["id"]) for job in jobs), default=0))
    for name in ("status", "iteration", "phase", "best"):
        rows.add_column(name, no_wrap=True)
    for job in jobs:
        status, progress = job["status"], job["progress"]
        rows.add_row(
            job["id"],
            f"[{STYLES.get(status, 'cyan')}]{status}[/]",
            f"{progress['iteration']}/{progress['max_iterations']}",
            progress["phase"] or "",
            best_of(job),
        )
    return rows


def step_of(job: "Job") -> str:
    """Return the status of a job, with its iteration and phase if it has begun."""
    progress = job["progress"]
    if not progress["phase"]:
        return str(job["status"])
    return f"{job['status']}  iteration {progress['iteration']}/{progress['max_iterations']}  {progress['phase']}"


def best_of(job: "Job | JobSummary") -> str:
    """Return the best reward so far, or an empty string if there is none."""
    best = job["best"]
    return "" if best is None or best["reward"] is None else f"{best['reward']:+.2f}"
