"""Requests and their retries: with jitter, after `Retry-After`, and only if a repeated request does no harm."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
from httpx_sse import SSEError

from tpo.backoff import backoff_seconds
from tpo.client.errors import APIConnectionError, ClientError, error_from_response

Value = TypeVar("Value")

FIRST_DELAY = 0.25
LONGEST_DELAY = 8.0
LONGEST_RETRY_AFTER = 120.0
"""Longest `Retry-After` that the client waits for, in seconds."""


@dataclass(frozen=True)
class Backoff:
    """Number of retries and the pauses between them."""

    retries: int

    def wait(self, attempt: int, error: ClientError) -> None:
        """Sleep before the next attempt. Raises the error if no attempt is left, or if none would help."""
        after = error.retry_after or 0.0
        if not error.retryable or attempt >= self.retries or after > LONGEST_RETRY_AFTER:
            raise error
        time.sleep(after + backoff_seconds(attempt, first=FIRST_DELAY, longest=LONGEST_DELAY))


class Transport:
    """HTTP connection pool of one server. It is thread-safe."""

    def __init__(self, url: str, api_key: str | None, *, retries: int, timeout: float) -> None:
        self.url = url.rstrip("/")
        self.backoff = Backoff(retries)
        self._timeout = timeout
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise ClientError("the API key contains a character that a header cannot carry, such as a line break")
        try:
            self._http = httpx.Client(
                base_url=self.url,
                headers={"authorization": f"Bearer {api_key}"} if api_key else {},
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=32),
                # A proxy of the environment cannot reach loopback addresses of this machine.
                trust_env=urlsplit(self.url).hostname not in ("127.0.0.1", "localhost", "::1"),
            )
        except (httpx.InvalidURL, ValueError):
            raise APIConnectionError(f"{url} is not an address like http://127.0.0.1:8000") from None

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    def json(self, method: str, path: str, **options: Any) -> Any:
        """Send a request and return the parsed response. Raises ClientError."""
        return self.parse_json(self.request(method, path, **options).content)

    def parse_json(self, content: str | bytes) -> Any:
        """Parse what the server sent. Raises ClientError if it is not JSON, because then it is another server's."""
        try:
            return json.loads(content)
        except ValueError:
            raise self._not_tpo() from None

    def post(self, path: str, body: Any, headers: Mapping[str, str]) -> Any:
        """Send a JSON body and return the parsed response. Raises ClientError."""
        # NaN and lone surrogates are sent too, in a form that JSON parsers accept: the server names the wrong field.
        try:
            content = json.dumps(body, ensure_ascii=False).encode("utf-8", "backslashreplace")
        except (TypeError, ValueError) as error:
            raise ClientError(f"the request cannot be written as JSON: {error}") from None
        return self.json("POST", path, content=content, headers={**headers, "content-type": "application/json"})

    def request(
        self,
        method: str,
        path: str,
        *,
        extra_seconds: float = 0.0,
        success_on_retry: frozenset[int] = frozenset(),
        **options: Any,
    ) -> httpx.Response:
        """Send a request, with retries, and return its successful response or a 304. Raises ClientError.

        `extra_seconds` are added to the timeout. `success_on_retry` are error statuses that, in response to a retry,
        mean that an earlier attempt succeeded.
        """
        timeout = httpx.Timeout(self._timeout + extra_seconds, connect=min(5.0, self._timeout))
        built = self.translate_errors(lambda: self._http.build_request(method, path, timeout=timeout, **options))
        attempt = 0
        while True:
            try:
                response = self.translate_errors(lambda: self._http.send(built))
                if response.is_success or response.status_code == httpx.codes.NOT_MODIFIED:
                    return response
                if attempt and response.status_code in success_on_retry:
                    return response
                raise error_from_response(response)
            except ClientError as error:
                self.backoff.wait(attempt, error)
            attempt += 1

    def open(self, path: str, headers: Mapping[str, str], silence: float) -> httpx.Response:
        """Open a stream, without retries. The caller closes it. Raises ClientError.

        `silence` is the longest time between two bytes of the stream, in seconds.
        """
        timeout = httpx.Timeout(silence, connect=min(5.0, self._timeout))
        request = self._http.build_request("GET", path, headers=dict(headers), timeout=timeout)
        response = self.translate_errors(lambda: self._http.send(request, stream=True))
        if response.is_success:
            return response
        try:
            self.translate_errors(response.read)
        finally:
            response.close()
        raise error_from_response(response)

    def translate_errors(self, call: Callable[[], Value]) -> Value:
        """Return the result of a call. Errors of httpx are raised as ClientError."""
        try:
            return call()
        except (httpx.UnsupportedProtocol, httpx.InvalidURL):
            raise ClientError(f"{self.url} is not an address like http://127.0.0.1:8000") from None
        except UnicodeEncodeError:
            raise ClientError("an id, a key or a filter contains a character that cannot be sent") from None
        except SSEError:
            raise self._not_tpo() from None
        except httpx.TimeoutException:
            raise APIConnectionError(f"the server at {self.url} does not respond") from None
        except httpx.TransportError:
            raise APIConnectionError(f"no server can be reached at {self.url}") from None

    def _not_tpo(self) -> ClientError:
        return ClientError(f"the server at {self.url} is no TPO server")
