"""The snippets of docs/webhooks.md run and receive the documented event."""

import re
from pathlib import Path
from typing import Any

import pytest

from testing.ports import free_port
from testing.processes import System
from testing.waiting import eventually
from tests.support.api_client import KEY
from tests.support.receiver import receiving
from tests.support.webhooks import ANY_TARGET

PAGE = Path(__file__).parents[2] / "docs" / "webhooks.md"


def test_every_snippet_works(sqlite_system: System, monkeypatch: pytest.MonkeyPatch) -> None:
    port = free_port()
    sqlite_system.start("-m", "api", port=port, api_key=KEY, **ANY_TARGET).wait_for("Listening on")
    sqlite_system.maintenance(**ANY_TARGET)
    with receiving() as receiver:
        for name, value in {"TPO_URL": f"http://127.0.0.1:{port}", "TPO_KEY": KEY, "HOOK_URL": receiver.url}.items():
            monkeypatch.setenv(name, value)
        names: dict[str, Any] = {}
        snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.DOTALL | re.MULTILINE)
        exec("\n".join(snippets), names)
        eventually(lambda: receiver.received, why="the test event should arrive")
        request = receiver.received[0]
        assert names["receive"](request.body, request.headers) == f"webhook.test {names['webhook']['id']}"
        names["api"].close()
