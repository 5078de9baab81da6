"""The client as the commands use it: every failure becomes one line on stderr."""

from collections.abc import Iterator
from contextlib import contextmanager

from tpo.cli.ui.output import USAGE, Failure
from tpo.client import APIConnectionError, AuthenticationError, BadRequestError, Client, ClientError

_RETRIES = 2
"""Few retries, because somebody waits at the terminal."""


@contextmanager
def connected(url: str, api_key: str | None) -> Iterator[Client]:
    """Open a client for a server. Turns its errors into Failure."""
    try:
        with Client(url, api_key, retries=_RETRIES) as client:
            yield client
    except APIConnectionError as error:
        raise Failure(f"{error}; start one with `tpo up`, or choose another with --url or TPO_URL") from None
    except AuthenticationError as error:
        raise Failure(f"{error} (set TPO_API_KEY, or use --api-key)") from None
    except BadRequestError as error:
        raise Failure(str(error), USAGE) from None
    except ClientError as error:
        raise Failure(str(error)) from None
