"""The input items of a response in the shape of OpenAI's API: its messages, each with its own id."""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from tpo.jobs.view import JobView
from tpo.openai.views import OutputText
from tpo.wire import Identified, Wire


class InputText(Wire):
    """The text of an input message."""

    type: Literal["input_text"] = "input_text"
    text: str


class InputMessageItem(Identified):
    """One message of the input. A message of the assistant has the content type of an output."""

    type: Literal["message"] = "message"
    role: Literal["system", "user", "assistant"]
    status: Literal["completed"] = "completed"
    content: list[InputText | OutputText] = Field(description="the message's text, as the only part")


def input_items(job: JobView) -> Sequence[InputMessageItem]:
    """Return the input messages in order, without the one that the response shows as its `instructions`."""
    return [
        InputMessageItem(
            id=f"{job.id.replace('job_', 'msg_', 1)}_{number}",
            role=message.role,
            content=[(OutputText if message.role == "assistant" else InputText)(text=message.content)],
        )
        for number, message in enumerate(job.input)
        if number or message.role != "system"
    ]
