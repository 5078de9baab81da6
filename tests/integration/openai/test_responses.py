"""Responses with the official client."""

from typing import Any

import httpx2
import openai
import pytest
from openai.types.responses import Response, ResponseCompletedEvent, ResponseStreamEvent

from testing.waiting import eventually
from tests.integration.openai.conftest import Server
from tests.support.api_client import KEY
from tpo.openai import views

SHORT: dict[str, Any] = {"sample_size": 2, "max_iterations": 1}
ENDED = ("completed", "failed", "cancelled", "incomplete")


def create(client: openai.OpenAI, **more: Any) -> Response:
    body = {"tpo": SHORT, **more.pop("extra_body", {})}
    response = client.responses.create(
        **{"model": "scripted", "input": "Why?", "background": True, "extra_body": body, **more}
    )
    assert isinstance(response, Response)
    return response


def ended(client: openai.OpenAI, response_id: str) -> Response:
    def terminal() -> Response | None:
        response = client.responses.retrieve(response_id)
        return response if response.status in ENDED else None

    return eventually(terminal, why="the response should end")


class TestCreate:
    def test_background_response_is_polled_until_its_end(self, client: openai.OpenAI, server: Server) -> None:
        response = create(
            client,
            instructions="Be short.",
            temperature=0.5,
            top_p=0.9,
            max_output_tokens=64,
            metadata={"ticket": "4711"},
        )
        assert response.status in ("queued", "in_progress")
        assert (response.temperature, response.top_p, response.max_output_tokens) == (0.5, 0.9, 64)
        assert (response.instructions, response.metadata) == ("Be short.", {"ticket": "4711"})
        assert response.output_text == ""
        done = ended(client, response.id)
        assert done.status == "completed"
        assert done.output_text.startswith("Draft ")
        assert done.usage
        assert done.usage.total_tokens == done.usage.input_tokens + done.usage.output_tokens > 0
        job = server.system.store.jobs.get(views.job_id_of(response.id))
        assert job.output == done.output_text
        assert [m.role for m in job.input] == ["system", "user"]
        assert (job.params.sample_size, job.params.temperature) == (2, 0.5)

    def test_foreground_response_waits_for_the_end(self, client: openai.OpenAI) -> None:
        response = create(client, background=False)
        assert response.status == "completed"
        assert response.output_text

    @pytest.mark.parametrize("sent_as", ["as it is", "model_dump", "to_dict"])
    def test_input_accepts_messages_and_parts(self, client: openai.OpenAI, server: Server, sent_as: str) -> None:
        first = create(client, background=False)
        turns: Any = [
            {"role": "developer", "content": "Be kind."},
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "One "}, {"type": "input_text", "text": "two"}],
            },
            *(item if sent_as == "as it is" else getattr(item, sent_as)() for item in first.output),
            {"type": "message", "role": "user", "content": "And now?"},
        ]
        response = create(client, input=turns, instructions="Be short.")
        job = server.system.store.jobs.get(views.job_id_of(response.id))
        assert [m.role for m in job.input] == ["system", "user", "assistant", "user"]
        assert job.input[0].content == "Be short.\n\nBe kind."
        assert job.input[1].content == "One two"
        assert job.input[2].content == first.output_text

    def test_response_names_its_job(self, client: openai.OpenAI) -> None:
        response = create(client)
        job: Any = client.get(f"/jobs/{views.job_id_of(response.id)}", cast_to=object)
        assert job["created_at"] == response.created_at
        details: Any = response.model_extra
        assert details["tpo"]["job_id"] == job["id"]

    @pytest.mark.parametrize(
        ("more", "param"),
        [
            ({"tools": [{"type": "web_search"}]}, "tools"),
            ({"previous_response_id": "resp_1"}, "previous_response_id"),
            ({"store": False}, "store"),
            ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
            ({"temperature": 3}, "temperature"),
            ({"max_output_tokens": 0}, "max_output_tokens"),
            ({"input": []}, "input"),
            ({"input": " "}, "input"),
            ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content"),
            ({"extra_body": {"tpo": {"sample_size": 0}}}, "tpo.sample_size"),
            ({"extra_body": {"tpo": {"sample_sizes": 1}}}, "tpo.sample_sizes"),
            ({"extra_body": {"tpo": {"reward_model": "nobody"}}}, "tpo.reward_model"),
            ({"extra_body": {"tpo": {"prompt_set": "nobody's"}}}, "tpo.prompt_set"),
            ({"extra_body": {"tpo": {"temperature": 1}}, "temperature": 1}, "tpo.temperature"),
            ({"model": "gpt-9"}, "model"),
            ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ],
    )
    def test_rejects_unsupported_parameter_and_names_it(
        self, client: openai.OpenAI, more: dict[str, Any], param: str
    ) -> None:
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            create(client, **more)
        assert caught.value.param == param
        assert caught.value.code in ("invalid_input", "unknown_model")


class TestInputItems:
    def test_input_items_equal_the_request(self, idle_client: openai.OpenAI) -> None:
        turns: Any = [
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "Two"},
            {"role": "user", "content": "Three"},
        ]
        created = idle_client.responses.create(input=turns, instructions="Be kind.", background=True, model="scripted")
        listed = idle_client.responses.input_items.list(created.id, order="asc", limit=2)
        assert listed.has_next_page()
        items: list[Any] = list(listed)
        assert [(item.type, item.role, item.content[0].type, item.content[0].text) for item in items] == [
            ("message", "user", "input_text", "One"),
            ("message", "assistant", "output_text", "Two"),
            ("message", "user", "input_text", "Three"),
        ]
        ids = [item.id for item in items]
        assert len(set(ids)) == 3
        assert [item.id for item in idle_client.responses.input_items.list(created.id)] == ids[::-1]
        assert list(idle_client.responses.input_items.list(created.id, order="asc", after=ids[-1])) == []

    def test_invalid_after_is_rejected(self, idle_client: openai.OpenAI) -> None:
        created = idle_client.responses.create(input="Hello", background=True, model="scripted")
        assert len(list(idle_client.responses.input_items.list(created.id))) == 1
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            idle_client.responses.input_items.list(created.id, after="msg_1")
        assert caught.value.param == "after"
        with pytest.raises(openai.NotFoundError):
            idle_client.responses.input_items.list("resp_" + "0" * 32)


class TestEnds:
    def test_cancel_is_idempotent(self, idle_client: openai.OpenAI) -> None:
        response = create(idle_client)
        for _ in range(2):
            cancelled = idle_client.responses.cancel(response.id)
            assert cancelled.status == "cancelled"
        assert cancelled.incomplete_details
        with idle_client.responses.retrieve(response.id, stream=True) as stream:
            assert [e.type for e in stream] == ["response.created", "response.queued", "response.incomplete"]

    @pytest.mark.parametrize(
        ("status", "values", "shown"),
        [
            ("cancelling", {}, "in_progress"),
            ("paused", {}, "queued"),
            ("expired", {"completed_at": 1.0}, "incomplete"),
            ("incomplete", {"completed_at": 1.0, "output": "so far", "incomplete_reason": "deadline"}, "incomplete"),
            ("failed", {"completed_at": 1.0, "error_code": "context_too_long", "error_message": "Too long."}, "failed"),
        ],
    )
    def test_status_is_mapped_from_the_job(
        self, idle: Server, idle_client: openai.OpenAI, status: str, values: dict[str, Any], shown: str
    ) -> None:
        from testing.jobs import put

        response = create(idle_client)
        put(idle.system.engine, views.job_id_of(response.id), status=status, **values)
        found = idle_client.responses.retrieve(response.id)
        assert found.status == shown
        assert (found.error is not None) == (status == "failed")
        assert (found.incomplete_details is not None) == (shown == "incomplete")
        assert found.output_text == values.get("output", "")

    def test_timeout_is_a_504_and_the_job_continues(self, idle: Server, idle_client: openai.OpenAI) -> None:
        with pytest.raises(openai.InternalServerError) as caught:
            create(idle_client, background=False)
        assert (caught.value.status_code, caught.value.code) == (504, "still_running")
        assert caught.value.response.headers["x-should-retry"] == "false"
        job_id = caught.value.response.headers["location"].removeprefix("/v1/jobs/")
        assert job_id in str(caught.value)
        idle.system.worker(scripted_latency=0)
        assert idle.system.wait_for_end(job_id).status == "completed"

    def test_unknown_response_is_not_found(self, client: openai.OpenAI) -> None:
        for unknown in ("resp_" + "0" * 32, "resp_1", "job_" + "0" * 32):
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(unknown)
            with pytest.raises(openai.NotFoundError):
                client.responses.cancel(unknown)


class TestStream:
    def test_stream_works_with_the_helper_of_the_client(self, client: openai.OpenAI) -> None:
        with client.responses.stream(
            model="scripted", input="Why?", background=True, extra_body={"tpo": SHORT}
        ) as stream:
            events = list(stream)
            final = stream.get_final_response()
        types = [e.type for e in events]
        assert types[:2] == ["response.created", "response.queued"]
        assert types[-7:] == [
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert "response.in_progress" in types[2:-7]
        assert [e.sequence_number for e in events] == list(range(len(events)))
        assert final.output_text == client.responses.retrieve(final.id).output_text != ""

    def test_cut_stream_resumes_without_a_gap(self, client: openai.OpenAI) -> None:
        started = create(client, extra_body={"tpo": {**SHORT, "max_iterations": 2}})
        seen: list[ResponseStreamEvent] = []
        last = None
        while not seen or seen[-1].type != "response.completed":
            resume: Any = {} if last is None else {"starting_after": last}
            with client.responses.retrieve(started.id, stream=True, **resume) as stream:
                for event, _ in zip(stream, range(3), strict=False):  # then the connection is closed
                    seen.append(event)
                    last = event.sequence_number
        assert [e.sequence_number for e in seen] == list(range(len(seen)))
        with client.responses.retrieve(started.id, stream=True) as stream:
            whole = list(stream)
        assert [e.type for e in whole] == [e.type for e in seen]
        assert isinstance(whole[-1], ResponseCompletedEvent)
        assert whole[-1].response.output_text

    def test_stream_reports_progress(self, client: openai.OpenAI) -> None:
        started = create(client)
        with client.responses.retrieve(started.id, stream=True) as stream:
            events = [e.response.model_extra["tpo"]["event"] for e in stream if e.type == "response.in_progress"]  # type: ignore[index]
        assert {"type": "job.phase", "iteration": 0, "phase": "scoring"} in events
        assert any(event["type"] == "job.iteration.completed" for event in events)

    def test_stream_after_the_last_event_is_empty(self, client: openai.OpenAI) -> None:
        done = create(client, background=False)
        with client.responses.retrieve(done.id, stream=True, starting_after=10_000) as stream:
            assert list(stream) == []

    @pytest.mark.parametrize(
        ("query", "param"),
        [
            ("starting_after=1", "starting_after"),
            ("stream=true&starting_after=x", "starting_after"),
            ("streams=1", "streams"),
        ],
    )
    def test_invalid_query_is_rejected(self, client: openai.OpenAI, server: Server, query: str, param: str) -> None:
        response = create(client)
        result = httpx2.get(
            f"{server.url}/v1/responses/{response.id}?{query}", headers={"authorization": f"Bearer {KEY}"}
        )
        assert result.status_code == 422
        assert result.json()["error"]["param"] == param
