"""JSON schemas of reward files: references inside a schema work, and nothing else is fetched or read."""

import errno
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support.rewards import load_reward_file, score_request
from tpo.backends.rewards.schemas import compile_schema
from tpo.core.errors import ModelRefusedError

ROOT = Path(__file__).parents[2]
STRING = {"type": "string"}


@pytest.fixture
def server() -> Iterator[tuple[str, list[str]]]:
    """Yield the URL of a server that has a schema at every path, and the list of its connections."""
    connections: list[str] = []

    class Server(ThreadingHTTPServer):
        def get_request(self) -> tuple[socket.socket, Any]:
            connection = super().get_request()
            connections.append(str(connection[1]))
            return connection

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"type": "string"}')

        def log_message(self, *_words: object) -> None:
            pass

    with Server(("127.0.0.1", 0), Handler) as http:
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}", connections
        http.shutdown()


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#/$defs/text", "$defs": {"text": STRING}},
        {"$ref": "#text", "$defs": {"text": {"$anchor": "text", **STRING}}},
        {"$dynamicRef": "#text", "$defs": {"text": {"$dynamicAnchor": "text", **STRING}}},
        {"$ref": "urn:example:text", "$defs": {"text": {"$id": "urn:example:text", **STRING}}},
        {"$id": "http://127.0.0.1:1/root.json", "$ref": "text", "$defs": {"text": {"$id": "text", **STRING}}},
        {"$id": "http://127.0.0.1:1/root.json", "$ref": "root.json#/$defs/text", "$defs": {"text": STRING}},
        {"$id": "file:///no/root.json", "$ref": "file:///no/root.json#/$defs/text", "$defs": {"text": STRING}},
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "allOf": [{"$ref": "#text"}],
            "definitions": {"text": {"$id": "#text", **STRING}},
        },
        {"$schema": "https://json-schema.org/draft/2020-12/schema", **STRING},
    ],
)
def test_schema_may_refer_to_its_own_parts(schema: dict[str, Any]) -> None:
    validator = compile_schema(schema)
    assert (validator.is_valid("a"), validator.is_valid(1)) == (True, False)


def test_schema_may_refer_to_itself_and_to_published_drafts() -> None:
    tree = compile_schema({"type": "object", "additionalProperties": {"$ref": "#"}})
    assert (tree.is_valid({"a": {"b": {}}}), tree.is_valid({"a": {"b": 1}})) == (True, False)
    draft = compile_schema({"$ref": "https://json-schema.org/draft/2020-12/schema"})
    assert (draft.is_valid({"type": "string"}), draft.is_valid({"type": "strong"})) == (True, False)


def test_reference_in_data_is_no_reference() -> None:
    address = {"$ref": "http://127.0.0.1:1/"}
    assert compile_schema({"enum": [address]}).is_valid(address)
    assert compile_schema({"const": address}).is_valid(address)
    assert compile_schema({"properties": {"$ref": STRING}}).is_valid({"$ref": "a"})


@pytest.mark.parametrize("reference", ["{}/a", "{}/a#/$defs/b", "{}", "http://localhost:{port}/a"])
@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "REF"},
        {"$dynamicRef": "REF"},
        {"$schema": "REF", "type": "string"},
        {"$schema": "https://json-schema.org/draft/2019-09/schema", "$ref": "REF"},
        {"$schema": "http://json-schema.org/draft-07/schema#", "properties": {"a": {"$ref": "REF"}}},
        {"$schema": "http://json-schema.org/draft-04/schema#", "items": {"$ref": "REF"}},
        {"properties": {"a": {"items": {"anyOf": [{"$ref": "REF"}, {"type": "string"}]}}}},
        {"$defs": {"unused": {"$ref": "REF"}}},
        {"$ref": "#/x-parts/a", "x-parts": {"a": {"$ref": "REF"}}},
        {"$id": "http://127.0.0.1:{port}/root", "$ref": "other"},
    ],
    ids=range(10),
)
def test_reference_over_http_is_refused_and_not_fetched(
    server: tuple[str, list[str]], schema: dict[str, Any], reference: str
) -> None:
    url, connections = server
    port = url.rpartition(":")[2]

    def filled(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: filled(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        return value.replace("REF", reference).replace("{port}", port).replace("{}", url)

    with pytest.raises(ValueError, match=r"^is not a JSON schema: .*nothing is fetched from a server or read from"):
        compile_schema(filled(schema))
    assert connections == []


@pytest.mark.parametrize("reference", ["file://{}", "file:{}", "{}", "other.json", "./other.json", "../{name}"])
def test_reference_to_a_file_is_refused_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "other.json"
    os.mkfifo(file)  # reading it blocks until somebody writes to it
    with pytest.raises(ValueError, match=r"^is not a JSON schema: .*nothing is fetched from a server or read from"):
        compile_schema({"$ref": reference.replace("{}", str(file)).replace("{name}", f"{tmp_path.name}/other.json")})
    with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):  # nobody has it open for reading
        os.open(file, os.O_WRONLY | os.O_NONBLOCK)


def test_reward_file_names_part_with_foreign_schema_reference(tmp_path: Path, server: tuple[str, list[str]]) -> None:
    url, connections = server
    part = "[[part]]\nname = 'form'\nkind = 'json'\nschema = {{ {} }}"
    for schema in (f"'$ref' = '{url}/a'", "'$ref' = 'file:///etc/passwd'", "properties = {a = {'$ref' = 'b.json'}}"):
        with pytest.raises(
            ModelRefusedError, match=r"part\[0\].json.schema: is not a JSON schema: .*nothing is fetched"
        ):
            load_reward_file(tmp_path, part.format(schema))
    reward = load_reward_file(tmp_path, part.format("'$ref' = '#/$defs/a', '$defs' = {a = {type = 'string'}}"))
    assert reward.score(score_request('"text"', "1"), lambda: None).values == (1.0, 0.0)
    assert connections == []


def test_only_one_module_compiles_schemas() -> None:
    importers = [
        str(file.relative_to(ROOT))
        for package in ("tpo", "api", "worker", "demo")
        for file in (ROOT / package).rglob("*.py")
        if "jsonschema" in file.read_text()
    ]
    assert importers == ["tpo/backends/rewards/schemas.py"]
