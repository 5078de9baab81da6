"""Where models are chosen by name. A back end is imported when its name is first used, and torch with it."""

from collections.abc import Callable
from importlib import resources
from typing import Protocol, TypeVar

from tpo.backends.model_source import check_place
from tpo.backends.scripted import ScriptedPolicy, ScriptedRewardModel
from tpo.core.errors import ModelRefusedError
from tpo.core.ports import Policy, RewardModel
from tpo.settings import DEMO, OPENAI, REMOTE_REWARDS, SCRIPTED, Settings

T = TypeVar("T")


class Loaded(Protocol):
    """What a process that holds a model needs of it beside its answers."""

    @property
    def healthy(self) -> bool:
        """False when every further request would fail, so that the process had better be started anew."""
        ...

    def close(self) -> None:
        """Stop the model's threads; requests that wait raise BackendUnavailableError."""
        ...


class LoadedPolicy(Policy, Loaded, Protocol):
    """A policy in memory, ready to answer."""


class LoadedRewardModel(RewardModel, Loaded, Protocol):
    """A reward model in memory, ready to answer."""


def load_policy(spec: str, settings: Settings) -> LoadedPolicy:
    """The policy of that name: demo, scripted, a folder, a name on the Hugging Face Hub, or openai:MODEL.

    Raises ModelRefusedError.
    """
    if spec == SCRIPTED:
        return ScriptedPolicy(settings.scripted_latency, settings.scripted_log)
    if spec.startswith(OPENAI):
        from tpo.backends.remote.policy import OpenAIPolicy

        return OpenAIPolicy.load(spec.removeprefix(OPENAI), settings)
    place = _demo_folder("policy") if spec == DEMO else spec
    check_place(place, "policy")
    try:
        from tpo.backends.local.policy import LocalPolicy
    except ImportError as error:
        raise _not_installed(spec, error) from error
    return LocalPolicy.load(place, settings)


def load_reward_model(spec: str, settings: Settings, policy: Policy | None = None) -> LoadedRewardModel:
    """The reward model of that name: demo, scripted, a folder, a name on the Hub, or one behind HTTP.

    With `reward_file`, what that file says; a judge in it may be this process's own policy. Raises ModelRefusedError.
    """
    if settings.reward_file is not None:
        from tpo.backends.rewards import load_combined

        here = settings.model_copy(update={"reward_file": None})
        return load_combined(settings.reward_file, here, load_reward_model, load_policy, policy)
    if spec == SCRIPTED:
        return ScriptedRewardModel(settings.scripted_latency, settings.scripted_log)
    if spec.startswith(REMOTE_REWARDS):
        from tpo.backends.remote.reward import RemoteRewardModel

        return RemoteRewardModel.load(spec, settings)
    place = _demo_folder("reward") if spec == DEMO else spec
    check_place(place, "reward model")
    try:
        from tpo.backends.local.reward import LocalRewardModel
    except ImportError as error:
        raise _not_installed(spec, error) from error
    return LocalRewardModel.load(place, settings)


def load_models(settings: Settings) -> tuple[LoadedPolicy, LoadedRewardModel]:
    """Both models of a process. Raises ModelRefusedError.

    The policy comes last: on a GPU its engine takes the memory that is left. A reward that is made of parts may need
    the policy, and comes after it.
    """
    if settings.reward_file is not None:
        policy = load_policy(settings.policy, settings)
        return policy, _or_close(policy, lambda: load_reward_model(settings.reward_model, settings, policy))
    reward = load_reward_model(settings.reward_model, settings)
    return _or_close(reward, lambda: load_policy(settings.policy, settings)), reward


def _or_close(first: Loaded, load: Callable[[], T]) -> T:
    try:
        return load()
    except BaseException:
        first.close()
        raise


def _demo_folder(part: str) -> str:
    return str(resources.files("demo") / "models" / part)


def _not_installed(spec: str, error: ImportError) -> ModelRefusedError:
    return ModelRefusedError(
        f"{spec!r} needs torch and transformers on this machine ({error}). Install torch in the build that fits your "
        'hardware, then: pip install ".[local]". The back end "scripted" needs neither.'
    )
