"""Run functions in threads that start at the same time."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tpo.core.errors import LeaseLostError


def run_together(*actions: Callable[[], object]) -> list[object]:
    """Run each action in a thread of its own, all started together.

    Return what each action returned, or the LeaseLostError that it raised. Other errors are raised.
    """
    barrier = threading.Barrier(len(actions))

    def act(action: Callable[[], object]) -> object:
        barrier.wait()
        try:
            return action()
        except LeaseLostError as error:
            return error

    with ThreadPoolExecutor(len(actions)) as threads:
        return list(threads.map(act, actions))
