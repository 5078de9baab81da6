"""The server as the commands use it: the client, and each way to fail as one clear line."""

from collections.abc import Iterator
from contextlib import contextmanager

from tpo.cli.ui.output import USAGE, Failure
from tpo.client import APIConnectionError, AuthenticationError, BadRequestError, Client, ClientError

_RETRIES = 2
"""Of a person who waits for a line."""


@contextmanager
def connected(url: str, api_key: str | None) -> Iterator[Client]:
    """A client of that server."""
    try:
        with Client(url, api_key, retries=_RETRIES) as client:
            yield client
    except APIConnectionError as error:
        raise Failure(f"{error}; start one with `tpo up`, or name another by --url or TPO_URL") from None
    except AuthenticationError as error:
        raise Failure(f"{error} (set TPO_API_KEY, or give --api-key)") from None
    except BadRequestError as error:
        raise Failure(str(error), USAGE) from None
    except ClientError as error:
        raise Failure(str(error)) from None
