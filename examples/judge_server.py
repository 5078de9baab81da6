"""A stand-in for a judge: an OpenAI-compatible server that counts polite phrases.

python -m examples.judge_server 8001

It makes the example run on any machine. In its place, serve a language model: `vllm serve MODEL --port 8001`.
"""

import json
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

MODEL = "tiny-judge"
POLITE = ("dear", "thank you", "glad", "sorry", "apology", "kind regards", "best wishes")


class Handler(BaseHTTPRequestHandler):
    """Answers the two requests that TPO sends."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """List the models."""
        self._send({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def do_POST(self) -> None:
        """Judge the response in the prompt, with a score in the form that the prompt asks for."""
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prompt = body["messages"][-1]["content"]
        found = re.search(r"\[The response\]\n(.*)\n\[End of the response\]", prompt, re.DOTALL)
        count = sum(phrase in (found[1].lower() if found else "") for phrase in POLITE)
        text = f"It has {count} polite phrases. <score>{min(5, 1 + count)}</score>"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": len(prompt.split()), "completion_tokens": len(text.split())}
        self._send({"object": "chat.completion", "model": MODEL, "choices": [choice], "usage": usage})

    def _send(self, value: object) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


if __name__ == "__main__":
    with ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler) as server:
        print("The judge is ready.", flush=True)
        server.serve_forever()
