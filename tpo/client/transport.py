"""One request and its retries: with jitter, after what `Retry-After` says, and only where a repeat does no harm."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from tpo.backoff import backoff_seconds
from tpo.client.errors import APIConnectionError, ClientError, of_response

Given = TypeVar("Given")

FIRST_DELAY = 0.25
LONGEST_DELAY = 8.0
LONGEST_RETRY_AFTER = 120.0
"""A server that asks for more than this is not waited for."""


@dataclass(frozen=True)
class Backoff:
    """How often something is tried again, and after how long."""

    retries: int

    def wait(self, attempt: int, error: ClientError) -> None:
        """Sleep before another attempt; raises the error where none is left, or none would help."""
        after = error.retry_after or 0.0
        if not error.again or attempt >= self.retries or after > LONGEST_RETRY_AFTER:
            raise error
        time.sleep(after + backoff_seconds(attempt, first=FIRST_DELAY, longest=LONGEST_DELAY))


class Transport:
    """HTTP to one server. Threads may share it."""

    def __init__(self, url: str, api_key: str | None, *, retries: int, timeout: float) -> None:
        self.url = url.rstrip("/")
        self.backoff = Backoff(retries)
        self._timeout = timeout
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ClientError("the API key holds a character that no header can carry; a line break is one")
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers={"authorization": f"Bearer {api_key}"} if api_key else {},
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
                # A proxy of the environment cannot know this machine's own addresses.
                trust_env=urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1"),
            )
        except (httpx.InvalidURL, ValueError):
            raise APIConnectionError(f"{url} is not an address") from None

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def json(self, method: str, path: str, **request: Any) -> Any:
        """What the server answers. Raises ClientError."""
        return self.parsed(self.ask(method, path, **request))

    def parsed(self, response: httpx.Response) -> Any:
        """What a success says. Raises ClientError where that is not JSON: another server stands at the address."""
        try:
            return response.json()
        except ValueError:
            raise ClientError(f"what answers at {self.url} is no TPO server") from None

    def post(self, path: str, body: Any, headers: Mapping[str, str]) -> Any:
        """What the server answers to a body. Raises ClientError."""
        # NaN and half a surrogate pair go out too, as what JSON readers take: the server says which field is wrong.
        try:
            content = json.dumps(body, ensure_ascii=False).encode("utf-8", "backslashreplace")
        except (TypeError, ValueError) as error:
            raise ClientError(f"the request cannot be written as JSON: {error}") from None
        return self.json("POST", path, content=content, headers={**headers, "content-type": "application/json"})

    def ask(
        self, method: str, path: str, *, patience: float = 0.0, settled: frozenset[int] = frozenset(), **request: Any
    ) -> httpx.Response:
        """A success, or a 304. `patience`: seconds that the server may take on top. Raises ClientError.

        `settled`: what the server answers to a repeated request of which the first has come through.
        """
        timeout = httpx.Timeout(self._timeout + patience, connect=min(5.0, self._timeout))
        built = self.explained(lambda: self._http.build_request(method, path, timeout=timeout, **request))
        attempt = 0
        while True:
            try:
                response = self.explained(lambda: self._http.send(built))
                if response.is_success or response.status_code == httpx.codes.NOT_MODIFIED:
                    return response
                if attempt and response.status_code in settled:
                    return response
                raise of_response(response)
            except ClientError as error:
                self.backoff.wait(attempt, error)
            attempt += 1

    def open(self, path: str, headers: Mapping[str, str], silence: float) -> httpx.Response:
        """A stream that has begun; the caller closes it. `silence`: the longest time between two of its bytes.

        Tried once. Raises ClientError.
        """
        timeout = httpx.Timeout(silence, connect=min(5.0, self._timeout))
        request = self._http.build_request("GET", path, headers=dict(headers), timeout=timeout)
        response = self.explained(lambda: self._http.send(request, stream=True))
        if response.is_success:
            return response
        try:
            self.explained(response.read)
        finally:
            response.close()
        raise of_response(response)

    def explained(self, what: Callable[[], Given]) -> Given:
        """What `what` gives, with each fault of the transport told as one of ours."""
        try:
            return what()
        except (httpx.UnsupportedProtocol, httpx.InvalidURL):
            raise ClientError(f"{self.url} is not an address like http://127.0.0.1:8000") from None
        except UnicodeEncodeError:
            raise ClientError("an id, a key or a filter holds a character that cannot be sent") from None
        except httpx.TimeoutException:
            raise APIConnectionError(f"the server at {self.url} does not answer") from None
        except httpx.TransportError:
            raise APIConnectionError(f"no server at {self.url}") from None
