"""A run in words: a Markdown table, and what was wrong."""

import math
from collections import Counter
from collections.abc import Sequence

from tests.chaos import points
from tests.chaos.run import Result, Sample
from tests.chaos.verdict import Told

_DETECTION_SLACK = 5.0
_DRAIN_SECONDS = 30.0
_CANCEL_SECONDS = 2.0
_GROWTH = 1.25
_SPARE_BYTES = 24 * 2**20
_SPARE_HANDLES = 16
_FEWEST_SAMPLES = 24
"""Fewer looks tell nothing about growth: a process takes its memory in its first minutes."""

_MENDING = ("job.retrying", "job.cancelled", "job.failed", "job.paused")


def violations(result: Result) -> list[str]:
    """What must not be; none: the run has passed."""
    verdict, monkey = result.verdict, result.monkey
    found = [*verdict.wrong, *result.load.wrong, *monkey.wrong]
    found += [f"{name} ended with {code} after SIGTERM" for name, code in result.ends.items() if code != 0]
    found += [text for text in monkey.by_themselves if not text.startswith("worker")]
    quiet, _ = detections(result)
    if quiet and percentile(quiet, 99) > result.plan.lease + _DETECTION_SLACK:
        found.append(f"dead workers were noticed after {percentile(quiet, 99):.1f} s at p99")
    if monkey.drains and max(monkey.drains) > _DRAIN_SECONDS:
        found.append(f"a drain took {max(monkey.drains):.1f} s")
    cancels, _ = cancel_latencies(result)
    if cancels and percentile(cancels, 99) > _CANCEL_SECONDS:
        found.append(f"a cancel took {percentile(cancels, 99):.1f} s at p99 with no fault near")
    return found + [f"{name}: {what}" for name, samples in result.samples.items() for what in growth(samples)]


def table(result: Result) -> str:
    """What happened, and what came of it."""
    verdict, monkey, plan = result.verdict, result.monkey, result.plan
    kinds = Counter(trouble.kind for trouble in monkey.troubles)
    quiet, all_detections = detections(result)
    cancels, all_cancels = cancel_latencies(result)
    lines = [
        f"| {plan.database}, seed {plan.seed}, {result.seconds / 60:.1f} minutes | |",
        "|---|---|",
        f"| faults | {sum(kinds.values())} of {len(kinds)} kinds |",
        *(f"| – {kind} | {count} |" for kind, count in sorted(kinds.items())),
        f"| labelled points at which a process was killed or stopped | {_labels(monkey.labels)} |",
        f"| jobs | {sum(verdict.statuses.values())}: {_counts(verdict.statuses)} |",
        f"| steps recorded | {verdict.steps} |",
        f"| claims that did not end their job (lost, handed back, paused) | {verdict.lost_claims} |",
        f"| model calls repeated (at most one for each of those) | {verdict.repeated_calls} |",
        f"| **jobs lost** | **{verdict.lost}** |",
        f"| **jobs or steps doubled** | **{verdict.doubled}** |",
        f"| **jobs whose rows are not an uninterrupted run's** | **{verdict.inexact}** |",
        f"| all findings | {len(violations(result))} |",
        f"| dead worker noticed, all else up | {_times(quiet)}, lease {plan.lease:g} s |",
        f"| dead worker noticed, whatever else was down | {_times(all_detections)} |",
        f"| drain after SIGTERM | {_times(monkey.drains)} |",
        f"| cancel of a running job, with no fault near | {_times(cancels)} |",
        f"| cancel of a running job, whatever was down | {_times(all_cancels)} |",
        f"| workers that restarted themselves | {len(monkey.by_themselves)} |",
        f"| last job ended after the last fault | {result.settled_in:.1f} s |",
        f"| clients' answers | {_counts(result.load.answers)} |",
        *(
            f"| {name}, never killed: memory, handles, threads | {_flat(s)} |"
            for name, s in result.samples.items()
            if s
        ),
    ]
    return "\n".join(lines)


def notes(result: Result) -> str:
    """What was wrong, what ended by itself, and what the processes have logged as errors."""
    wrong = violations(result)
    lines = [f"{len(wrong)} VIOLATIONS" if wrong else "no violation", *wrong[:40]]
    lines += [f"errors in the logs: {count} x {alarm}" for alarm, count in sorted(result.alarms.items())]
    return "\n".join([*lines, *result.monkey.by_themselves[:10]])


def detections(result: Result) -> tuple[list[float], list[float]]:
    """Seconds from a kill to the event that took each of its jobs away; in quiet times, and in all."""
    quiet, everything = [], []
    for kill in result.monkey.kills:
        for job_id, attempt in kill.held.items():
            told = result.verdict.events.get(job_id, [])
            if (taken := _taken_away(told, kill.at, attempt)) is not None:
                everything.append(taken)
                limit = result.plan.lease + _DETECTION_SLACK
                if result.monkey.quiet(kill.at - result.plan.lease, kill.at + limit):
                    quiet.append(taken)
    return quiet, everything


def _taken_away(told: Sequence[Told], killed: float, attempt: int) -> float | None:
    before = [event for event in told if event.at <= killed]
    claims = [event for event in before if event.type == "job.started"]
    after = [event for event in told if event.at > killed]
    # The worker may have handed the job back just before it died, its log line unwritten.
    if not claims or claims[-1].attempt != attempt or before[-1].type in _MENDING or not after:
        return None
    return after[0].at - killed if after[0].type in _MENDING else None


def cancel_latencies(result: Result) -> tuple[list[float], list[float]]:
    """Seconds from a cancel of a running job to its end; with no trouble near, and in all."""
    quiet, everything = [], []
    for told in result.verdict.events.values():
        asked = next((event.at for event in told if event.type == "job.cancelling"), None)
        if asked is not None and told[-1].type == "job.cancelled":
            everything.append(told[-1].at - asked)
            if result.monkey.quiet(asked - 2 * result.plan.lease, asked + _CANCEL_SECONDS, of=None):
                quiet.append(told[-1].at - asked)
    return quiet, everything


def growth(samples: Sequence[Sample]) -> list[str]:
    """What has grown from the first third of a run to its last."""
    if len(samples) < _FEWEST_SAMPLES:
        return []
    third = len(samples) // 3
    first, last = samples[third // 3 : third], samples[-third:]
    rss = [_median([s.rss for s in part]) for part in (first, last)]
    handles = [_median([s.handles for s in part]) for part in (first, last)]
    found = []
    if rss[1] > rss[0] * _GROWTH + _SPARE_BYTES:
        found.append(f"its memory grew from {rss[0] / 2**20:.0f} to {rss[1] / 2**20:.0f} MiB")
    if handles[1] > handles[0] + _SPARE_HANDLES:
        found.append(f"its open files and connections grew from {handles[0]:.0f} to {handles[1]:.0f}")
    return found


def percentile(values: Sequence[float], p: float) -> float:
    """The smallest value that so many per cent do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * p / 100) - 1)]


def _median(values: Sequence[float]) -> float:
    return percentile(values, 50)


def _times(values: Sequence[float]) -> str:
    if not values:
        return "none"
    return f"p50 {percentile(values, 50):.2f} s, p99 {percentile(values, 99):.2f} s, of {len(values)}"


def _counts(counts: "Counter[str]") -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _labels(hit: "Counter[str]") -> str:
    known = [label for labels in points.LABELS.values() for label in labels]
    return f"{len(set(hit) & set(known))} of {len(known)}, {sum(hit.values())} times"


def _flat(samples: Sequence[Sample]) -> str:
    third = max(1, len(samples) // 3)
    parts = (samples[:third], samples[-third:])
    rss = " to ".join(f"{_median([s.rss for s in p]) / 2**20:.0f}" for p in parts)
    handles = " to ".join(f"{_median([s.handles for s in p]):.0f}" for p in parts)
    threads = " to ".join(f"{_median([s.threads for s in p]):.0f}" for p in parts)
    return f"{rss} MiB, {handles}, {threads} (medians of the first and the last third)"
