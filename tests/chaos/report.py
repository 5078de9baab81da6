"""Report of a run: a Markdown table, and violations."""

import math
from collections import Counter
from collections.abc import Sequence

from tests.chaos import points
from tests.chaos.run import Result, Sample
from tests.chaos.verdict import JobEvent

_DETECTION_SLACK = 5.0
_DRAIN_SECONDS = 30.0
_CANCEL_SECONDS = 2.0
_GROWTH = 1.25
_SPARE_BYTES = 24 * 2**20
_SPARE_HANDLES = 16
_FEWEST_SAMPLES = 24
"""Fewer samples say nothing about growth: a process allocates most of its memory in its first minutes."""

_RECOVERY = ("job.retrying", "job.cancelled", "job.failed", "job.paused")


def violations(result: Result) -> list[str]:
    """Return the violations of a run. It has passed if there are none."""
    verdict, monkey = result.verdict, result.monkey
    found = [*verdict.wrong, *result.load.wrong, *monkey.wrong]
    found += [f"{name} ended with {code} after SIGTERM" for name, code in result.ends.items() if code != 0]
    found += [text for text in monkey.self_ended if not text.startswith("worker")]
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
    """Return a Markdown table of the faults and the results of a run."""
    verdict, monkey, plan = result.verdict, result.monkey, result.plan
    kinds = Counter(fault.kind for fault in monkey.faults)
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
        f"| workers that restarted themselves | {len(monkey.self_ended)} |",
        f"| last job ended after the last fault | {result.settled_in:.1f} s |",
        f"| clients' answers | {_counts(result.load.responses)} |",
        *(
            f"| {name}, never killed: memory, handles, threads | {_flat(s)} |"
            for name, s in result.samples.items()
            if s
        ),
    ]
    return "\n".join(lines)


def notes(result: Result) -> str:
    """Return the violations, the logged errors and the processes that ended by themselves."""
    wrong = violations(result)
    lines = [f"{len(wrong)} VIOLATIONS" if wrong else "no violation", *wrong[:40]]
    lines += [f"errors in the logs: {count} x {alarm}" for alarm, count in sorted(result.alarms.items())]
    return "\n".join([*lines, *result.monkey.self_ended[:10]])


def detections(result: Result) -> tuple[list[float], list[float]]:
    """Return the seconds from each kill to the recovery of its jobs: without other faults near, and in all."""
    quiet, everything = [], []
    for kill in result.monkey.kills:
        for job_id, attempt in kill.held.items():
            events = result.verdict.events.get(job_id, [])
            if (seconds := _recovery_seconds(events, kill.at, attempt)) is not None:
                everything.append(seconds)
                limit = result.plan.lease + _DETECTION_SLACK
                if result.monkey.quiet(kill.at - result.plan.lease, kill.at + limit):
                    quiet.append(seconds)
    return quiet, everything


def _recovery_seconds(events: Sequence[JobEvent], killed: float, attempt: int) -> float | None:
    before = [event for event in events if event.at <= killed]
    claims = [event for event in before if event.type == "job.started"]
    after = [event for event in events if event.at > killed]
    # The worker may have released the job just before it died, without logging it.
    if not claims or claims[-1].attempt != attempt or before[-1].type in _RECOVERY or not after:
        return None
    return after[0].at - killed if after[0].type in _RECOVERY else None


def cancel_latencies(result: Result) -> tuple[list[float], list[float]]:
    """Return the seconds from each cancel of a running job to its end: without faults near, and in all."""
    quiet, everything = [], []
    for events in result.verdict.events.values():
        requested = next((event.at for event in events if event.type == "job.cancelling"), None)
        if requested is not None and events[-1].type == "job.cancelled":
            everything.append(events[-1].at - requested)
            if result.monkey.quiet(requested - 2 * result.plan.lease, requested + _CANCEL_SECONDS, of=None):
                quiet.append(events[-1].at - requested)
    return quiet, everything


def growth(samples: Sequence[Sample]) -> list[str]:
    """Return what has grown from the first third of the run to its last third."""
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
    """Return the smallest value that `p` per cent of the values do not exceed."""
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
