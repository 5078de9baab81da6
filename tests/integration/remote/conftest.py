"""One fake model server for all tests of this folder. Each test begins with its faults cleared."""

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
