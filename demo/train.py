"""Train both demo models from a fixed seed for a fixed number of steps: `python -m demo.train`.

Each model has its own process and uses one core. The reward model starts from an early snapshot of the policy. An
interrupted training continues from its last checkpoint; `demo/work` contains the checkpoints and is removed at the end.
"""

import os
import shutil
import sys
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import multiprocessing

from demo.policy_training import train_policy
from demo.reward_training import train_reward
from demo.settings import MODELS, WORK


def main() -> int:
    """Train both models. Returns 0 if both are written, else 1."""
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    policy = context.Process(target=train_policy, name="policy")
    reward = context.Process(target=train_reward, name="reward")
    policy.start()
    reward.start()
    policy.join()
    if policy.exitcode:
        reward.terminate()
    reward.join()
    if policy.exitcode or reward.exitcode:
        print("the training failed; run the same command again to continue from the last checkpoint", file=sys.stderr)
        return 1
    shutil.rmtree(WORK)
    print(f"both models are in {MODELS} after {(time.monotonic() - started) / 60:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
