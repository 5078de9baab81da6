"""Every error raises the matching exception of the official client."""

from typing import Any

import openai
import pytest

from testing.processes import System
from testing.services import postgres_server
from tests.integration.openai.conftest import Server, serving
from tpo.db import schema


def create(client: openai.OpenAI, **more: Any) -> Any:
    return client.responses.create(**{"model": "scripted", "input": "Why?", "background": True, **more})


def test_401_raises_authentication_error(idle: Server) -> None:
    with idle.client("wrong") as client, pytest.raises(openai.AuthenticationError) as caught:
        create(client)
    assert caught.value.code == "invalid_api_key"


def test_400_raises_bad_request_error(idle_client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        idle_client.post(
            "/responses", content=b"{", options={"headers": {"content-type": "application/json"}}, cast_to=object
        )


def test_404_raises_not_found_error(idle_client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        idle_client.responses.retrieve("resp_" + "0" * 32)
    assert caught.value.code == "job_not_found"
    with pytest.raises(openai.NotFoundError):
        idle_client.embeddings.create(model="scripted", input="x")


def test_409_raises_conflict_error(idle_client: openai.OpenAI) -> None:
    response = create(idle_client)
    with pytest.raises(openai.ConflictError):
        idle_client.responses.delete(response.id)
    assert idle_client.responses.cancel(response.id).status == "cancelled"
    idle_client.responses.delete(response.id)
    with pytest.raises(openai.NotFoundError):
        idle_client.responses.retrieve(response.id)
    named = {"extra_body": {"tpo": {"external_id": "mine"}}}
    first = create(idle_client, **named)
    assert create(idle_client, **named).id == first.id
    with pytest.raises(openai.ConflictError) as caught:
        create(idle_client, **named, input="Something else")
    assert caught.value.code == "external_id_taken"


def test_422_raises_unprocessable_entity_error(idle_client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        create(idle_client, model="gpt-9")
    assert (caught.value.code, caught.value.param, caught.value.type) == (
        "unknown_model",
        "model",
        "invalid_request_error",
    )
    assert caught.value.request_id


def test_429_raises_rate_limit_error(sqlite_system: System) -> None:
    with serving(sqlite_system, max_jobs_in_flight=1) as server, server.client() as client:
        create(client)
        with pytest.raises(openai.RateLimitError) as caught:
            create(client)
        assert caught.value.response.headers["retry-after"]


@pytest.mark.processes
def test_503_is_survived_by_the_retries_of_the_client(tmp_path_factory: pytest.TempPathFactory) -> None:
    from testing.processes import running_system

    with postgres_server() as postgres:
        schema.upgrade(postgres.url)
        folder = tmp_path_factory.mktemp("system")
        with running_system(postgres.url, folder) as system, serving(system) as server, server.client() as client:
            create(client)
            postgres.stop()
            with pytest.raises(openai.InternalServerError) as caught:
                create(client)
            assert caught.value.status_code == 503
            assert caught.value.response.headers["retry-after"]
            postgres.start()
            with client.with_options(max_retries=5) as patient:
                assert create(patient).status == "queued"


def test_models_are_listed_and_retrieved(idle: Server, idle_client: openai.OpenAI) -> None:
    idle.system.store.workers.register("w1", model="scripted", reward_model="scripted", concurrency=1)
    [model] = list(idle_client.models.list())
    assert (model.id, model.object, model.owned_by) == ("scripted", "model", "tpo")
    assert isinstance(model.created, int)
    assert idle_client.models.retrieve("scripted") == model
    with pytest.raises(openai.NotFoundError):
        idle_client.models.retrieve("gpt-9")
