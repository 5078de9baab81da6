"""The first word with a server: is it there, does it take the key, does it have the model?"""

import logging
import time
from typing import Any

from pydantic import SecretStr

from tpo.backends.remote.server import Limits, Malformed, Refused, Server
from tpo.core.errors import BackendUnavailableError, BadReplyError, ModelRefusedError
from tpo.settings import Settings

_log = logging.getLogger(__name__)

_FIRST_SECONDS = 3.0
"""After so long a log line tells what a start waits for."""

_LAST_SECONDS = 1.0
_SHOWN_MODELS = 10
_WRONG_KEY = (401, 403)


def limits_of(settings: Settings) -> Limits:
    """The limits that the settings say."""
    return Limits(
        connect=settings.remote_connect_seconds,
        read=settings.remote_read_seconds,
        call=settings.remote_call_seconds,
        tries=settings.remote_tries,
        connections=settings.remote_connections,
    )


def secret(key: SecretStr | None) -> str | None:
    """A key in clear, for the one header that it stands in."""
    return key.get_secret_value() if key else None


def connect(server: Server, model: str, seconds: float, *, setting: str, path: str = "models") -> int | None:
    """Wait until the server answers, and see that it has the model. Gives the model's window, where it is told.

    A server that lists no models is taken at its word. Raises ModelRefusedError.
    """
    end = time.monotonic() + seconds
    patience = min(seconds, _FIRST_SECONDS)
    while True:
        try:
            listed = server.call(server.get(path, _models, patience), lambda: None)
        except BackendUnavailableError as error:
            patience = end - time.monotonic()
            if patience < _LAST_SECONDS:
                raise ModelRefusedError(f"{error} It was waited for {seconds:g} s; is its address right?") from error
            _log.warning("the server of %s at %s cannot be used yet; it is waited for", model, server.url)
        except Refused as refused:
            if refused.status in _WRONG_KEY:
                raise ModelRefusedError(
                    f"The server of {model} at {server.url} refused the key ({refused.status}): set {setting}."
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


def _models(answer: Any) -> dict[str, int | None]:
    """The models of `/v1/models` and their windows (vLLM and SGLang tell them)."""
    try:
        windows = {str(one["id"]): one.get("max_model_len") for one in answer["data"]}
    except (TypeError, KeyError, AttributeError):
        raise Malformed("not with a list of models") from None
    return {name: window if isinstance(window, int) else None for name, window in windows.items()}
