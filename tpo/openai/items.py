"""What a response was asked, as OpenAI's clients read it: its messages, each with an id of its own."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from tpo.jobs.tables import Job
from tpo.openai.views import OutputText
from tpo.wire import Identified, Wire


class InputText(Wire):
    """What was said."""

    type: Literal["input_text"] = "input_text"
    text: str


class AskedMessage(Identified):
    """One message of the input; the assistant's own as it would stand in an output."""

    type: Literal["message"] = "message"
    role: Literal["system", "user", "assistant"]
    status: Literal["completed"] = "completed"
    content: list[InputText | OutputText] = Field(description="one text")


def input_items(job: Job) -> Sequence[AskedMessage]:
    """All messages, the first one first, but for the one that the response shows as its `instructions`."""
    return [
        AskedMessage(
            id=f"{job.id.replace('job_', 'msg_', 1)}_{number}",
            role=message["role"],
            content=[(OutputText if message["role"] == "assistant" else InputText)(text=message["content"])],
        )
        for number, message in enumerate(job.input)
        if number or message["role"] != "system"
    ]
