"""Requests that the API rejects. Only on SQLite, because none of them reaches a database."""

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from api import schemas
from testing.services import Valkey
from tests.support.api_client import KEY, UNKNOWN_ID, api_client, assert_problem, submit
from tests.support.error_codes import codes
from tpo.core.state import Params

MakeClient = Callable[..., TestClient]


@pytest.fixture(scope="module")
def make_client(
    sqlite_template: Path, valkey: Valkey, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[MakeClient]:
    folder = tmp_path_factory.mktemp("api")
    shutil.copy(sqlite_template, folder / "tpo.db")
    url = f"sqlite:///{folder}/tpo.db"
    with contextlib.ExitStack() as stack:
        defaults = {"database_url": url, "broker_url": valkey.url}
        yield lambda **settings: stack.enter_context(api_client(**{**defaults, **settings}))


@pytest.fixture(scope="module")
def client(make_client: MakeClient) -> TestClient:
    return make_client()


@pytest.fixture(scope="module")
def closed_client(make_client: MakeClient) -> TestClient:
    """Client without an API key, of a server that requires one."""
    return make_client(api_key=KEY)


@pytest.fixture
def creates_no_job(client: TestClient) -> Iterator[None]:
    """Fail if the test created a job."""
    before = client.get("/v1/jobs").json()["first_id"]
    yield
    assert client.get("/v1/jobs").json()["first_id"] == before


@pytest.mark.usefixtures("creates_no_job")
class TestBody:
    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "input"),
            ({"input": None}, "input"),
            ({"input": 5}, "input"),
            ({"input": {"role": "user", "content": "x"}}, "input"),
            ({"input": ""}, "input"),
            ({"input": " \n\t"}, "input"),
            ({"input": "a\x00b"}, "input"),
            ({"input": "a\ud800b"}, "input"),
            ({"input": "x" * 1001}, "input"),
            ({"input": []}, "input"),
            ({"input": ["x"]}, "input[0]"),
            ({"input": [{"role": "user"}]}, "input[0].content"),
            ({"input": [{"role": "user", "content": " "}]}, "input[0].content"),
            ({"input": [{"role": "user", "content": "\x00"}]}, "input[0].content"),
            ({"input": [{"role": "user", "content": ["x"]}]}, "input[0].content"),
            ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
            ({"input": [{"role": "user", "content": "x", "name": "n"}]}, "input[0].name"),
            ({"input": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]}, "input"),
            ({"input": [{"role": "user", "content": "x" * 501}] * 2}, "input"),
            ({"input": "x", "stream": True}, "stream"),
            ({"input": "x", "a\ud800\x00b": 1}, None),
            ({"input": "x", "x" * 5000: 1}, "x" * 1000),
            ({"input": "x", "model": ""}, "model"),
            ({"input": "x", "model": 5}, "model"),
            ({"input": "x", "model": "a\ud800"}, "model"),
            ({"input": "x", "parameters": {"reward_model": "a\ud800"}}, "parameters.reward_model"),
            ({"input": "x", "parameters": None}, "parameters"),
            ({"input": "x", "parameters": []}, "parameters"),
            ({"input": "x", "parameters": {"early_stop": True}}, "parameters.early_stop"),
            ({"input": "x", "parameters": {"mode": "magic"}}, "parameters.mode"),
            ({"input": "x", "parameters": {"sample_size": 0}}, "parameters.sample_size"),
            ({"input": "x", "parameters": {"sample_size": 65}}, "parameters.sample_size"),
            ({"input": "x", "parameters": {"sample_size": "5"}}, "parameters.sample_size"),
            ({"input": "x", "parameters": {"sample_size": True}}, "parameters.sample_size"),
            ({"input": "x", "parameters": {"sample_size": 2.5}}, "parameters.sample_size"),
            ({"input": "x", "parameters": {"sample_size": 10**400}}, "parameters.sample_size"),
            ({"input": "x", "parameters": {"max_iterations": -1}}, "parameters.max_iterations"),
            ({"input": "x", "parameters": {"max_iterations": 51}}, "parameters.max_iterations"),
            ({"input": "x", "parameters": {"temperature": -0.1}}, "parameters.temperature"),
            ({"input": "x", "parameters": {"temperature": float("nan")}}, "parameters.temperature"),
            ({"input": "x", "parameters": {"temperature": float("inf")}}, "parameters.temperature"),
            ({"input": "x", "parameters": {"top_p": 0}}, "parameters.top_p"),
            ({"input": "x", "parameters": {"max_tokens": 0}}, "parameters.max_tokens"),
            ({"input": "x", "parameters": {"seed": -1}}, "parameters.seed"),
            ({"input": "x", "parameters": {"seed": 2**63}}, "parameters.seed"),
            ({"input": "x", "parameters": {"seed": None}}, "parameters.seed"),
            ({"input": "x", "parameters": {"prompt_set": "nope"}}, "parameters.prompt_set"),
            ({"input": "x", "parameters": {"prompt_set": "../tiny"}}, "parameters.prompt_set"),
            ({"input": "x", "metadata": {"k": 1}}, "metadata.k"),
            ({"input": "x", "metadata": {"k": "v" * 513}}, "metadata.k"),
            ({"input": "x", "metadata": {"k": "\x00"}}, "metadata.k"),
            ({"input": "x", "metadata": {"": "v"}}, "metadata."),
            ({"input": "x", "metadata": {"k" * 65: "v"}}, "metadata." + "k" * 65),
            ({"input": "x", "metadata": {str(i): "v" for i in range(17)}}, "metadata"),
            ({"input": "x", "deadline_seconds": 0}, "deadline_seconds"),
            ({"input": "x", "deadline_seconds": -1}, "deadline_seconds"),
            ({"input": "x", "deadline_seconds": 1e300}, "deadline_seconds"),
            ({"input": "x", "deadline_seconds": "60"}, "deadline_seconds"),
        ],
        ids=lambda value: value if isinstance(value, str) and value.isprintable() else "body",
    )
    def test_rejects_invalid_field_and_names_it(self, client: TestClient, body: Any, param: str | None) -> None:
        response = client.post(
            "/v1/jobs", content=json.dumps(body).encode(), headers={"content-type": "application/json"}
        )
        problem = assert_problem(response, 422, "invalid_input", param)
        assert len(problem["detail"]) <= 1000

    @pytest.mark.parametrize(
        ("content", "media_type", "status", "code"),
        [
            (b"{", "application/json", 400, "invalid_json"),
            (b'{"input": "x",}', "application/json", 400, "invalid_json"),
            (b"\xff\xfe\xfa", "application/json", 400, "invalid_json"),
            (b'{"input": "\xe9"}', "application/json", 400, "invalid_json"),
            (b"[" * 100_000, "application/json", 400, "invalid_json"),
            (b'{"a":' * 30_000 + b"1" + b"}" * 30_000, "application/json", 400, "invalid_json"),
            (b'{"input": ' + b"1" * 5000 + b"}", "application/json", 400, "invalid_json"),
            (b"", "application/json", 422, "invalid_input"),
            (b"null", "application/json", 422, "invalid_input"),
            (b"[]", "application/json", 422, "invalid_input"),
            (b'"x"', "application/json", 422, "invalid_input"),
            (b"NaN", "application/json", 422, "invalid_input"),
            (b'{"input": "x"}', "text/plain", 415, "unsupported_media_type"),
            (b'{"input": "x"}', "application/x-www-form-urlencoded", 415, "unsupported_media_type"),
            (b'{"input": "x"}', "", 415, "unsupported_media_type"),
        ],
    )
    def test_rejects_what_is_not_json(
        self, client: TestClient, content: bytes, media_type: str, status: int, code: str
    ) -> None:
        response = client.post("/v1/jobs", content=content, headers={"content-type": media_type})
        assert_problem(response, status, code)

    def test_names_every_invalid_field(self, client: TestClient) -> None:
        response = client.post("/v1/jobs", json={"input": 1, "x": 1, "parameters": {"top_p": 7}})
        detail = assert_problem(response, 422, "invalid_input", "input")["detail"]
        assert all(name in detail for name in ("input: ", "x: ", "parameters.top_p: "))

    @pytest.mark.parametrize("streamed", [False, True], ids=["with its length", "without"])
    def test_rejects_a_body_that_is_too_large(self, client: TestClient, streamed: bool) -> None:
        content = b'{"input": "' + b"x" * 300_000 + b'"}'
        pieces = (content[i : i + 65536] for i in range(0, len(content), 65536))
        response = client.post(
            "/v1/jobs", content=pieces if streamed else content, headers={"content-type": "application/json"}
        )
        assert_problem(response, 413, "body_too_large")


class TestLimits:
    def test_accepts_the_longest_input_fully_escaped(self, client: TestClient) -> None:
        content = b'{"input": "' + b"\\ud83d\\ude00" * 1000 + b'"}'
        response = client.post("/v1/jobs", content=content, headers={"content-type": "application/json"})
        assert response.json()["input"] == "😀" * 1000

    def test_configured_limits_apply(self, make_client: MakeClient) -> None:
        client = make_client(max_sample_size=4, max_iterations=1)
        submit(client, parameters={"sample_size": 4, "max_iterations": 1})
        for name in ("sample_size", "max_iterations"):
            parameters = {"sample_size": 4, "max_iterations": 1, name: 5}
            response = client.post("/v1/jobs", json={"input": "x", "parameters": parameters})
            assert_problem(response, 422, "invalid_input", f"parameters.{name}")

    def test_configured_limits_apply_to_defaults(self, make_client: MakeClient) -> None:
        response = make_client(max_sample_size=4).post("/v1/jobs", json={"input": "x"})
        assert_problem(response, 422, "invalid_input", "parameters.sample_size")


class TestQuery:
    @pytest.mark.parametrize(
        ("query", "param"),
        [
            ("limit=0", "limit"),
            ("limit=101", "limit"),
            ("limit=x", "limit"),
            ("after=x", "after"),
            ("after=%00", "after"),
            ("order=up", "order"),
            ("status=lost", "status[0]"),
            ("limt=5", "limt"),
        ],
    )
    def test_rejects_invalid_parameter_and_names_it(self, client: TestClient, query: str, param: str) -> None:
        assert_problem(client.get(f"/v1/jobs?{query}"), 422, "invalid_input", param)


class TestRequestId:
    @pytest.mark.parametrize("given", ["abc", "A.b_c-9", "x" * 128])
    def test_valid_id_of_the_client_is_echoed(self, client: TestClient, given: str) -> None:
        assert client.get("/healthz", headers={"x-request-id": given}).headers["x-request-id"] == given

    @pytest.mark.parametrize("given", ["", "a b", "x" * 129, 'a"b', "a\tb"])
    def test_invalid_id_is_replaced(self, client: TestClient, given: str) -> None:
        made = client.get("/nothing", headers={"x-request-id": given}).headers["x-request-id"]
        assert made.startswith("req_")


class TestKey:
    def test_protects_everything_except_public_routes(self, closed_client: TestClient) -> None:
        for path in ("/v1/jobs", "/v1/models", "/v1/nothing", f"/v1/jobs/{UNKNOWN_ID}"):
            response = closed_client.get(path)
            assert_problem(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/", "/healthz", "/docs", "/openapi.json"):
            assert closed_client.get(path).status_code == 200
        assert_problem(closed_client.get("/readyz"), 503, "not_ready")

    @pytest.mark.parametrize("sent", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer é"])
    def test_is_checked_before_the_body_is_parsed(self, closed_client: TestClient, sent: str) -> None:
        response = closed_client.post("/v1/jobs", content=b"{", headers={b"authorization": sent.encode("latin-1")})
        assert_problem(response, 401, "invalid_api_key")

    def test_valid_key_is_accepted(self, closed_client: TestClient) -> None:
        for scheme in ("Bearer", "bearer"):
            assert closed_client.get("/v1/jobs", headers={"authorization": f"{scheme} {KEY}"}).status_code == 200


class TestOpenAPI:
    def test_types_every_response_and_documents_errors(self, client: TestClient) -> None:
        paths = client.get("/openapi.json").json()["paths"]
        assert {"/v1/jobs", "/v1/jobs/{job_id}/events", "/v1/jobs/{job_id}/extend", "/readyz"} <= set(paths)
        for path, operations in paths.items():
            for operation in operations.values():
                for status, response in operation["responses"].items():
                    if status == "304":
                        assert "content" not in response
                        continue
                    if path == "/v1/files/{file_id}/content" and status == "200":
                        assert "application/json" not in response["content"]  # the file itself, of any media type
                        continue
                    if path == "/metrics" and status == "200":
                        assert set(response["content"]) == {"text/plain"}
                        continue
                    problem = int(status) >= 400
                    media_type = "application/problem+json" if problem else "application/json"
                    ref = response["content"][media_type]["schema"]["$ref"]
                    assert ref.endswith("/Problem") == problem
                if path.startswith("/v1/"):
                    assert "503" in operation["responses"]

    def test_names_every_parameter(self, client: TestClient) -> None:
        paths = client.get("/openapi.json").json()["paths"]

        def named(path: str, method: str = "get") -> set[str]:
            return {parameter["name"] for parameter in paths[path][method]["parameters"]}

        assert named("/v1/jobs", "post") == {"Idempotency-Key", "Prefer"}
        assert named("/v1/jobs") == {"limit", "after", "order", "include", "status", "metadata"}
        assert named("/v1/jobs/{job_id}") == {"job_id", "wait", "If-None-Match"}
        assert named("/v1/jobs/{job_id}/events") == {"job_id", "starting_after", "limit", "stream", "Last-Event-ID"}

    def test_examples_match_their_schemas(self, client: TestClient) -> None:
        description = client.get("/openapi.json").json()
        components = description["components"]

        def check(schema: dict[str, Any], example: Any) -> None:
            jsonschema_rs.validate({**schema, "components": components}, example)

        for name, schema in components["schemas"].items():
            for example in schema.get("examples", []):
                check({"$ref": f"#/components/schemas/{name}"}, example)
                if "tpo" in schema["properties"] and "object" in example:  # the example is a response, not a request
                    Params.model_validate(example["tpo"]["parameters"])
        for path, operations in description["paths"].items():
            for operation in operations.values():
                bodies = [*operation["responses"].values(), operation.get("requestBody", {})]
                for media_type, body in [pair for each in bodies for pair in each.get("content", {}).items()]:
                    for example in body.get("examples", {}).values():
                        check(body["schema"], example["value"])
                        assert example["value"]["instance"] == path
                    if media_type.endswith("json"):
                        ref = re.search(r'"#/components/schemas/([^"]+)"', json.dumps(body["schema"]))
                        assert ref
                        shown = body.get("examples") or components["schemas"][ref[1]].get("examples")
                    else:
                        shown = body.get("example")
                    assert shown, f"{path} has no example of {media_type}"

    @pytest.mark.parametrize(
        ("method", "path", "sent"),
        [
            ("get", "/v1/jobs", {"params": {"limit": 101}}),
            ("post", "/v1/jobs", {"json": {"input": "x", "model": "gpt-9"}}),
            ("post", "/v1/jobs", {"content": "x", "headers": {"content-type": "text/plain"}}),
            ("post", "/v1/files", {"json": {}}),
            ("get", "/v1/models/{model_id}", {}),
            ("get", "/v1/batches/{batch_id}", {}),
        ],
    )
    def test_example_errors_equal_real_errors(
        self, make_client: MakeClient, method: str, path: str, sent: dict[str, Any]
    ) -> None:
        client = make_client(policy="demo", reward_model="demo")
        response = client.request(method, path.replace("{", "").replace("}", ""), **sent)
        documented = client.get("/openapi.json").json()["paths"][path][method]["responses"][str(response.status_code)]
        error = response.json()["error"]
        example = documented["content"]["application/problem+json"]["examples"][error["code"]]["value"]["error"]
        # The message contains an id, the example does not.
        assert example == {**error, "message": re.sub(r" '[a-z]+_id'", " with this id", error["message"])}

    def test_documents_every_error_code(self, client: TestClient) -> None:
        documented = {
            code
            for operations in client.get("/openapi.json").json()["paths"].values()
            for operation in operations.values()
            for status, response in operation["responses"].items()
            if int(status) >= 400
            for code in response["content"]["application/problem+json"]["examples"]
        }
        # Any route can return it, for a method that it does not support.
        assert codes() - documented == {"method_not_allowed"}

    def test_does_not_mention_framework_errors(self, client: TestClient) -> None:
        assert "HTTPValidationError" not in client.get("/openapi.json").text

    def test_documents_authentication(self, make_client: MakeClient) -> None:
        description = make_client(api_key=KEY).get("/openapi.json").json()
        assert description["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
        assert description["paths"]["/v1/jobs"]["get"]["security"] == [{"key": []}]
        assert "security" not in description["paths"]["/healthz"]["get"]

    def test_request_examples_are_accepted(self, make_client: MakeClient) -> None:
        client = make_client(policy="demo", reward_model="demo")
        examples = client.get("/openapi.json").json()["components"]["schemas"]["Submit"]["examples"]
        assert examples
        for example in examples:
            assert client.post("/v1/jobs", json=example).status_code == 202

    def test_responses_match_their_models(self, client: TestClient) -> None:
        schemas.Job.model_validate_json(client.post("/v1/jobs", json={"input": "x"}).content)
        schemas.JobPage.model_validate_json(client.get("/v1/jobs").content)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=())),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
_FIELDS = ("model", "input", "parameters", "metadata", "deadline_seconds")


@hypothesis_settings(max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.fixed_dictionaries({}, optional=dict.fromkeys(_FIELDS, _JSON)) | _JSON)
def test_no_body_causes_a_server_error(client: TestClient, body: Any) -> None:
    response = client.post("/v1/jobs", content=json.dumps(body), headers={"content-type": "application/json"})
    if response.status_code != 202:
        assert response.status_code in (400, 413, 415, 422)
        assert_problem(
            response, response.status_code, response.json()["error"]["code"], response.json()["error"]["param"]
        )


def test_parameter_in_the_wrong_place_names_its_place(client: TestClient) -> None:
    problem = assert_problem(
        client.post("/v1/jobs", json={"input": "Hello", "sample_size": 4}), 422, "invalid_input", "sample_size"
    )
    assert problem["detail"] == "sample_size: belongs under parameters"
