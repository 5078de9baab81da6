"""Startup check of a server: it is up, accepts the key and has the model."""

import logging
import time
from typing import Any

from pydantic import SecretStr

from tpo.backends.remote.server import Limits, Malformed, Refused, Server
from tpo.core.errors import BackendUnavailableError, BadReplyError, ModelRefusedError
from tpo.settings import Settings

_log = logging.getLogger(__name__)

_FIRST_SECONDS = 3.0
"""Seconds after which the log says what the start is waiting for."""

_LAST_SECONDS = 1.0
_SHOWN_MODELS = 10
_WRONG_KEY = (401, 403)


def limits_from_settings(settings: Settings) -> Limits:
    """Build the limits of a server from the settings."""
    return Limits(
        connect=settings.remote_connect_seconds,
        read=settings.remote_read_seconds,
        call=settings.remote_call_seconds,
        tries=settings.remote_tries,
        connections=settings.remote_connections,
    )


def secret(key: SecretStr | None) -> str | None:
    """Return the key in plain text, for the Authorization header only."""
    return key.get_secret_value() if key else None


def connect(server: Server, model: str, seconds: float, *, setting: str, path: str = "models") -> int | None:
    """Wait until the server answers, and check that it has the model.

    Return the model's context window in tokens, or None if the server does not report it. A server that lists no models
    is assumed to have the model. Raises ModelRefusedError if the server does not answer within `seconds`, refuses the
    key (`setting` names the setting to correct), or lacks the model.
    """
    end = time.monotonic() + seconds
    timeout = min(seconds, _FIRST_SECONDS)
    while True:
        try:
            listed = server.call(server.get(path, _models, timeout), lambda: None)
        except BackendUnavailableError as error:
            timeout = end - time.monotonic()
            if timeout < _LAST_SECONDS:
                raise ModelRefusedError(f"{error} TPO waited {seconds:g} s for it. Check its address.") from error
            _log.warning("the server of %s at %s cannot be used yet; waiting for it", model, server.url)
        except Refused as refused:
            if refused.status in _WRONG_KEY:
                raise ModelRefusedError(
                    f"The server of {model} at {server.url} refused the key ({refused.status}). Set {setting}."
                ) from refused
            return None
        except BadReplyError:
            return None
        else:
            break
    if model not in listed:
        names = ", ".join(list(listed)[:_SHOWN_MODELS]) or "none"
        raise ModelRefusedError(f"The server at {server.url} has no model {model}. It has: {names}.")
    return listed[model]


def _models(reply: Any) -> dict[str, int | None]:
    """Read the models in the reply of `/v1/models`, with their context windows (reported by vLLM and SGLang)."""
    try:
        windows = {str(one["id"]): one.get("max_model_len") for one in reply["data"]}
    except (TypeError, KeyError, AttributeError):
        raise Malformed("not with a list of models") from None
    return {name: window if isinstance(window, int) else None for name, window in windows.items()}
