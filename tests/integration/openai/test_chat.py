"""Chat completions with the official client."""

from typing import Any

import openai
import pytest

from testing.jobs import put
from testing.waiting import eventually
from tests.integration.openai.conftest import Server

TPO = {"tpo": {"sample_size": 2, "max_iterations": 1}}
HELLO: Any = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello"}]


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(**{"model": "scripted", "messages": HELLO, "extra_body": TPO, **more})


class TestCompletion:
    def test_equals_the_output_of_the_job(self, client: openai.OpenAI, server: Server) -> None:
        completion = ask(client, temperature=0.5, top_p=0.9, max_completion_tokens=64, seed=7, n=1, metadata={"a": "b"})
        assert completion.object == "chat.completion"
        [choice] = completion.choices
        assert (choice.finish_reason, choice.message.role) == ("stop", "assistant")
        assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens > 0
        job = server.system.store.jobs.get(completion.id.replace("chatcmpl-", "job_"))
        assert job.output == choice.message.content
        assert [m.role for m in job.input] == ["system", "user"]
        params = job.params
        assert (params.seed, params.max_tokens, params.temperature, params.top_p) == (7, 64, 0.5, 0.9)
        assert job.metadata == {"a": "b"}

    @pytest.mark.parametrize("sent_as", ["as it is", "model_dump", "to_dict"])
    def test_message_can_be_sent_back(self, client: openai.OpenAI, sent_as: str) -> None:
        first = ask(client).choices[0].message
        if sent_as != "as it is":
            first = getattr(first, sent_as)()
        again = ask(client, messages=[*HELLO, first, {"role": "user", "content": [{"type": "text", "text": "More"}]}])
        assert again.choices[0].message.content

    def test_can_be_streamed(self, client: openai.OpenAI) -> None:
        whole = ask(client, seed=3)
        chunks = list(ask(client, seed=3, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
        assert chunks[-2].choices[0].finish_reason == "stop"
        assert chunks[-1].usage == whole.usage

    def test_timeout_is_a_504_and_the_job_continues(self, idle: Server, idle_client: openai.OpenAI) -> None:
        with idle_client.with_options(max_retries=2) as patient, pytest.raises(openai.InternalServerError) as caught:
            ask(patient)
        assert (caught.value.status_code, caught.value.code) == (504, "still_running")
        [job] = idle.system.store.jobs.page(limit=10)
        assert job.id in str(caught.value)
        idle.system.worker(scripted_latency=0)
        assert idle.system.wait_for_end(job.id).status == "completed"

    @pytest.mark.parametrize(
        ("values", "error", "code"),
        [
            (
                {"status": "failed", "error_code": "context_too_long", "error_message": "Too long."},
                openai.UnprocessableEntityError,
                "context_too_long",
            ),
            (
                {"status": "failed", "error_code": "no_usable_sample", "error_message": "None."},
                openai.InternalServerError,
                "no_usable_sample",
            ),
            ({"status": "cancelled"}, openai.InternalServerError, "job_cancelled"),
        ],
    )
    def test_job_without_output_is_an_error(
        self, idle: Server, values: dict[str, Any], error: type[openai.APIStatusError], code: str
    ) -> None:
        from concurrent.futures import ThreadPoolExecutor

        system = idle.system
        with idle.client() as client, ThreadPoolExecutor(1) as pool:
            pending = pool.submit(ask, client)
            [job] = eventually(lambda: system.store.jobs.page(limit=1), why="the job should be stored")
            put(system.engine, job.id, completed_at=1.0, **values)
            with pytest.raises(error) as caught:
                pending.result()
        assert caught.value.code == code
        assert job.id in str(caught.value)

    @pytest.mark.parametrize(
        ("more", "param"),
        [
            ({"n": 2}, "n"),
            ({"stop": "x"}, "stop"),
            ({"logprobs": True}, "logprobs"),
            ({"frequency_penalty": 1}, "frequency_penalty"),
            ({"response_format": {"type": "json_object"}}, "response_format.type"),
            ({"messages": [*HELLO, {"role": "assistant", "content": "Hi"}]}, "messages"),
            ({"messages": [{"role": "user", "content": ""}]}, "messages[0].content"),
            ({"messages": []}, "messages"),
            ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages[0].role"),
            ({"seed": -1}, "seed"),
            ({"temperature": 2.1}, "temperature"),
        ],
    )
    def test_rejects_unsupported_parameter_and_names_it(
        self, client: openai.OpenAI, more: dict[str, Any], param: str
    ) -> None:
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            ask(client, **more)
        assert caught.value.param == param
