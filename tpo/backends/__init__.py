"""Load models by name. A back end, and torch with it, is imported when its name is first used."""

from collections.abc import Callable
from importlib import resources
from typing import Protocol, TypeVar

from tpo.backends.model_source import check_source
from tpo.backends.scripted import ScriptedPolicy, ScriptedRewardModel
from tpo.backends.spec import ModelSpec, RewardSpec
from tpo.core.errors import ModelRefusedError
from tpo.core.ports import Policy, RewardModel
from tpo.settings import DEMO, OPENAI, REMOTE_REWARDS, SCRIPTED, Settings

T = TypeVar("T")


class LoadedModel(Protocol):
    """Lifecycle of a model in this process: its health and its shutdown."""

    @property
    def healthy(self) -> bool:
        """False when every further request would fail and the process should be restarted."""
        ...

    def close(self) -> None:
        """Stop the model's threads. Pending requests raise BackendUnavailableError."""
        ...


class LoadedPolicy(Policy, LoadedModel, Protocol):
    """A policy that is loaded and ready to answer."""


class LoadedRewardModel(RewardModel, LoadedModel, Protocol):
    """A reward model that is loaded and ready to answer."""


def load_policy(spec: ModelSpec, settings: Settings) -> LoadedPolicy:
    """Load a policy. Raises ModelRefusedError if it cannot be loaded."""
    name = spec.name
    if name == SCRIPTED:
        return ScriptedPolicy(settings.scripted_latency, settings.scripted_log)
    if name.startswith(OPENAI):
        from tpo.backends.remote.policy import OpenAIPolicy

        return OpenAIPolicy.load(spec, settings)
    source = _demo_folder("policy") if name == DEMO else name
    check_source(source, "policy")
    try:
        from tpo.backends.local.policy import LocalPolicy
    except ImportError as error:
        raise _not_installed(name, error) from error
    return LocalPolicy.load(source, settings)


def load_reward_model(spec: RewardSpec, settings: Settings) -> LoadedRewardModel:
    """Load a reward model. Raises ModelRefusedError if it cannot be loaded."""
    name = spec.name
    if name == SCRIPTED:
        return ScriptedRewardModel(settings.scripted_latency, settings.scripted_log)
    if name.startswith(REMOTE_REWARDS):
        from tpo.backends.remote.reward import RemoteRewardModel

        return RemoteRewardModel.load(spec, settings)
    source = _demo_folder("reward") if name == DEMO else name
    check_source(source, "reward model")
    try:
        from tpo.backends.local.reward import LocalRewardModel
    except ImportError as error:
        raise _not_installed(name, error) from error
    return LocalRewardModel.load(source, settings)


def load_reward(settings: Settings, policy: Policy | None = None) -> LoadedRewardModel:
    """Load the reward of the settings: one model, or the weighted sum that `reward_file` describes.

    A judge in that file may be `policy`, the policy of this process. Raises ModelRefusedError if a model cannot be
    loaded.
    """
    if settings.reward_file is None:
        return load_reward_model(RewardSpec.from_settings(settings), settings)
    from tpo.backends.rewards import load_combined

    return load_combined(settings.reward_file, settings, load_reward_model, load_policy, policy)


def load_models(settings: Settings) -> tuple[LoadedPolicy, LoadedRewardModel]:
    """Load both models of a process. Raises ModelRefusedError if one cannot be loaded.

    The policy is loaded last, because on a GPU its engine takes the memory that is left. A combined reward may use the
    policy as a judge and is therefore loaded after it.
    """
    spec = ModelSpec.from_settings(settings)
    if settings.reward_file is not None:
        policy = load_policy(spec, settings)
        return policy, _or_close(policy, lambda: load_reward(settings, policy))
    reward = load_reward(settings)
    return _or_close(reward, lambda: load_policy(spec, settings)), reward


def _or_close(first: LoadedModel, load: Callable[[], T]) -> T:
    """Call `load`; if it fails, close the model that was loaded first."""
    try:
        return load()
    except BaseException:
        first.close()
        raise


def _demo_folder(part: str) -> str:
    return str(resources.files("demo") / "models" / part)


def _not_installed(name: str, error: ImportError) -> ModelRefusedError:
    return ModelRefusedError(
        f"{name!r} needs torch and transformers on this machine ({error}). Install the torch build for your hardware, "
        'then run: pip install ".[local]". The back end "scripted" needs neither.'
    )
