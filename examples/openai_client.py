"""Use TPO through the official `openai` client. Only the address and the field `tpo` differ from OpenAI's API.

OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none python -m examples.openai_client
"""

import time

from openai import OpenAI

MESSAGE = "Hello, I am Clara. The teapot that I bought is now cracked. I would like a quick replacement."


def main() -> None:
    """Get one answer as a chat completion, and one as a response in the background."""
    client = OpenAI()
    model = client.models.list().data[0].id

    # A chat completion waits for the answer: for short jobs.
    completion = client.chat.completions.create(
        model=model,
        messages=[{"role": "user", "content": MESSAGE}],
        extra_body={"tpo": {"sample_size": 4, "max_iterations": 1, "seed": 1}},
    )
    print("chat:", completion.choices[0].message.content)

    # A response in the background survives the loss of this program and of the server.
    response = client.responses.create(
        model=model,
        input=MESSAGE,
        background=True,
        extra_body={"tpo": {"sample_size": 4, "max_iterations": 2, "seed": 1}},
    )
    while response.status in ("queued", "in_progress"):
        time.sleep(0.2)
        response = client.responses.retrieve(response.id)
    print("response:", response.output_text)


if __name__ == "__main__":
    main()
