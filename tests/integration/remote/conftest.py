"""One stand-in for model servers for all tests here; each begins with one that behaves."""

import contextlib
from collections.abc import Iterator

import pytest

from tests.support import selection
from tests.support.model_server import ModelServer, model_server


@pytest.fixture(scope="session")
def shared_server() -> Iterator[ModelServer]:
    with contextlib.ExitStack() as stack:
        with selection.shared_server():
            server = stack.enter_context(model_server())
        yield server


@pytest.fixture
def server(shared_server: ModelServer) -> ModelServer:
    shared_server.control()
    return shared_server
