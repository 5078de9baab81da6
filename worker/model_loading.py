"""Load the policy and the reward model, before the worker claims any job."""

import time

from tpo.backends import LoadedPolicy, LoadedRewardModel, load_models
from tpo.settings import Settings
from worker.logs import log


def load(settings: Settings) -> tuple[LoadedPolicy, LoadedRewardModel]:
    """Load both models. Raises ModelRefusedError."""
    started = time.monotonic()
    models = load_models(settings)
    log.info("models loaded in %.1f s: %s, %s", time.monotonic() - started, settings.policy, settings.reward_model)
    return models
