"""`python -m tests.chaos.process KIND FOLDER`: an API, a worker or a maintenance worker with points in FOLDER.

Its clock is wrong by `CHAOS_CLOCK_OFF` seconds.
"""

import os
import sys
import time
from pathlib import Path

import api.__main__
import api.app
import worker.__main__
import worker.maintenance
from tests.chaos.points import Points, PolicyWithPoints, RewardModelWithPoints
from tpo.settings import Settings
from tpo.store import Store
from worker.startup import start


def main(kind: str, folder: Path) -> int:
    """Run a process of this kind and return its exit code."""
    points = Points(folder, kind)
    match kind:
        case "worker":
            return start(lambda settings, store: _work(settings, points.on(store.engine), points))
        case "maintenance":
            return start(lambda settings, store: worker.maintenance.main(settings, points.on(store.engine)))
        case _:
            vars(api.app)["Store"] = points.on
            return api.__main__.main()


def _work(settings: Settings, store: Store, points: Points) -> int:
    policy = PolicyWithPoints(settings.scripted_latency, settings.scripted_log)
    reward = RewardModelWithPoints(settings.scripted_latency, settings.scripted_log)
    policy.points = reward.points = points
    return worker.__main__.serve(settings, store, policy, reward)


def _set_clock(off: float) -> None:
    seconds, nanoseconds = time.time, time.time_ns
    time.time = lambda: seconds() + off
    time.time_ns = lambda: nanoseconds() + int(off * 1e9)


if __name__ == "__main__":
    _set_clock(float(os.environ.get("CHAOS_CLOCK_OFF", "0")))
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
