"""A fake of vLLM, SGLang and other model servers in a separate process, with configurable faults.

Run `python -m tests.support.model_server PORT [demo]`. `POST /control` takes {"faults": […], "options": {…}}: each
fault applies to one of the next requests, in order, and options apply until they are changed. `GET /seen` returns the
requests received since then. With `demo` the shipped models answer; otherwise the scripted back end does.
"""

import contextlib
import json
import math
import re
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx

from testing.ports import free_port
from tpo.backends import load_models
from tpo.core.ports import Generate, Score
from tpo.core.state import Message
from tpo.settings import Settings

MODEL = "a-model"
_TAGS = re.compile(r"<(\w+)> and </\1>")


class ServerState:
    """Models, faults, options and recorded requests of the server."""

    def __init__(self, models: str) -> None:
        self.policy, self.reward = load_models(Settings(policy=models, reward_model=models, threads=1))
        self.demo = models == "demo"
        self.lock = threading.Lock()
        self.faults: list[dict[str, Any]] = []
        self.options: dict[str, Any] = {}
        self.seen: list[dict[str, Any]] = []
        self.left = 0
        """Number of clients that disconnected from a hanging request."""

    def chat(self, body: dict[str, Any], max_choices: int) -> tuple[int, dict[str, Any]]:
        """Return the status and the body of a chat completion."""
        messages = tuple(Message.model_validate(m) for m in body["messages"])
        n = min(body.get("n", 1), 1 if self.options.get("ignores_n") else max_choices)
        if n > (slots := self.options.get("slots", n)):
            message = f"Field 'n': Value must be between 1 <= value <= {slots}, but got {n}"
            return 400, {"error": {"code": 400, "message": message, "type": "invalid_request_error"}}
        input_tokens = sum(len(m.content.split()) for m in messages)
        limit = int(body.get("max_tokens") or body["max_completion_tokens"])
        if refusal := self.too_long(input_tokens, limit):
            return 400, refusal
        request = Generate(
            kind="update" if _TAGS.search(messages[-1].content) else "sample",
            iteration=0,
            first_sample=0,
            messages=messages,
            seeds=tuple(body["seed"] + i for i in range(n)),
            temperature=body["temperature"],
            top_p=body["top_p"],
            max_tokens=limit,
            stop=tuple(body.get("stop", ())),
        )
        reply = self.policy.generate(request, lambda: None)
        choices = []
        for index, text in enumerate(reply.texts):
            choice: dict[str, Any] = {"role": "assistant", "content": text.text}
            if self.options.get("keeps_stop") and text.finish_reason == "stop":
                choice["content"] += "".join(request.stop[:1])
            match self.options.get("thinking"):
                case "field":
                    choice["reasoning_content"] = "secret thoughts " * 3
                case "tags":
                    choice["content"] = f"<think>secret thoughts</think>\n\n{text.text}"
            finish = self.options.get("finish_reason", text.finish_reason)
            choices.append({"index": index, "message": choice, "finish_reason": finish})
        usage = {"prompt_tokens": reply.input_tokens, "completion_tokens": sum(t.tokens for t in reply.texts)}
        answer = {"object": "chat.completion", "model": MODEL, "choices": choices, "usage": usage}
        if self.options.get("counts_nothing"):
            del answer["usage"]
        return 200, answer

    def too_long(self, input_tokens: int, limit: int = 0) -> dict[str, Any] | None:
        """Return the error body for a request beyond the context window, or None if it fits."""
        window = self.options.get("window")
        if window is None or input_tokens + limit <= window:
            return None
        if self.options.get("lowers"):
            return self.too_long_for_vllm(input_tokens, limit, window)
        message = (
            f"This model's maximum context length is {window} tokens and your request has {input_tokens} input tokens"
        )
        if self.options.get("says_no_numbers"):
            message = "This does not fit the context length."
        return {"error": {"message": message, "type": "BadRequestError", "code": 400}}

    def too_long_for_vllm(self, input_tokens: int, limit: int, window: int) -> dict[str, Any] | None:
        """Return the error body of vLLM 0.32, or None if the request is accepted.

        vLLM silently lowers a limit that is within the window, and stops counting a prompt beyond it.
        """
        if limit > window:
            message = (
                f"max_tokens={limit} cannot be greater than max_model_len={window}. Please request fewer output tokens."
            )
        elif input_tokens > window:
            message = (
                f"This model's maximum context length is {window} tokens. However, your prompt contains at least "
                f"{window + 1} input tokens, which exceeds this limit even without any output tokens."
            )
        else:
            return None
        return {"error": {"message": message, "type": "BadRequestError", "code": 400}}

    def score(self, body: dict[str, Any]) -> tuple[float, int]:
        """Return the reward of a request and its number of input tokens."""
        if "input_ids" in body:
            return sum(body["input_ids"]) % 97 / 10 - 4, len(body["input_ids"])
        messages = tuple(Message.model_validate(m) for m in body["messages"])
        rewards = self.reward.score(
            Score(iteration=0, messages=messages[:-1], responses=(messages[-1].content,)), lambda: None
        )
        value = rewards.values[0] - (0 if self.demo else 2)
        applies = self.options.get("sigmoid") == "always" or (
            self.options.get("sigmoid") and body.get("use_activation", True)
        )
        return (1 / (1 + math.exp(-value)) if applies else value), rewards.input_tokens

    def scored(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """Return the status and the body of a reward response in the format of the endpoint."""
        words = sum(len(m["content"].split()) for m in body.get("messages", []))
        if refusal := self.too_long(words):
            return 400, refusal
        value, tokens = self.score(body)
        numbers = [value] * self.options.get("labels", 1)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        if "input_ids" in body:
            return 200, [{"embedding": numbers, "meta_info": {"prompt_tokens": tokens}}]
        if path == "/pooling":
            data = [[9.0], numbers] if body["task"] == "token_classify" else numbers
            return 200, {"data": [{"index": 0, "object": "pooling", "data": data}], "usage": usage}
        return 200, {"data": [{"index": 0, "probs": numbers, "num_classes": len(numbers)}], "usage": usage}


def serve(port: int, models: str) -> None:
    """Serve until the process is killed."""
    state = ServerState(models)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path == "/seen":
                self._json(200, {"seen": state.seen, "left": state.left})
            elif self._has_wrong_key():
                self._json(401, {"error": {"message": "Incorrect API key provided"}})
            elif self.path == "/v1/models" and not state.options.get("lists_no_models"):
                window = state.options.get("lists_window")
                self._json(200, {"object": "list", "data": [{"id": MODEL, "max_model_len": window}]})
            else:
                self._json(404, {"detail": "Not Found"})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if self.path == "/control":
                state.faults = body.get("faults", state.faults)
                state.options = body.get("options", state.options)
                state.seen, state.left = [], 0
                self._json(200, {})
                return
            with state.lock:
                key = self.headers.get("authorization")
                state.seen.append({"path": self.path, "body": body, "key": key})
                fault = state.faults.pop(0) if state.faults else {}
            if "status" in fault:
                self._json(fault["status"], fault.get("body", {"error": {"message": "no"}}), fault.get("headers", {}))
            elif "raw" in fault:
                self._send(200, fault["raw"].encode())
            elif fault.get("nothing"):
                self.close_connection = True
            elif fault.get("hangs"):
                select.select([self.connection], [], [], 60)
                state.left += 1
                self.close_connection = True
            else:
                status, answer = self._answer(body, fault.get("choices", 64))
                text = json.dumps(answer).encode()
                self._send(status, text, cut=len(text) // 2 if fault.get("half") else None)

        def _answer(self, body: dict[str, Any], max_choices: int) -> tuple[int, Any]:
            if self._has_wrong_key():
                return 401, {"error": {"message": "Incorrect API key provided"}}
            if body["model"] != MODEL:
                return 404, {"error": {"message": "The model does not exist."}}
            if self.path == "/v1/chat/completions":
                return state.chat(body, max_choices)
            return state.scored(self.path, body)

        def _has_wrong_key(self) -> bool:
            key = state.options.get("key")
            return key is not None and self.headers.get("authorization") != f"Bearer {key}"

        def _json(self, status: int, answer: Any, headers: dict[str, str] | None = None) -> None:
            self._send(status, json.dumps(answer).encode(), headers)

        def _send(
            self, status: int, body: bytes, headers: dict[str, str] | None = None, cut: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:cut])
            self.close_connection = cut is not None

        def log_message(self, *_words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads = True
        print("ready", flush=True)
        server.serve_forever(poll_interval=0.02)


class ModelServer:
    """Handle of a test on the server process."""

    def __init__(self, models: str = "scripted") -> None:
        self.port = free_port()
        self.root = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.root}/v1"
        self._models = models
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start the server and wait until it accepts requests."""
        command = [sys.executable, "-m", "tests.support.model_server", str(self.port), self._models]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def kill(self) -> None:
        """Kill the server with all requests in flight."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()

    def control(self, *faults: dict[str, Any], **options: Any) -> None:
        """Set the faults of the next requests and the options, and clear the recorded requests."""
        body = {"faults": list(faults), "options": options}
        httpx.post(f"{self.root}/control", json=body, trust_env=False).raise_for_status()

    def seen(self) -> list[dict[str, Any]]:
        """Return the recorded requests, each with its `path`, `body` and `key`."""
        return list(self._recorded()["seen"])

    def left(self) -> int:
        """Return how many clients disconnected from a hanging request."""
        return int(self._recorded()["left"])

    def _recorded(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.root}/seen", trust_env=False).json())


@contextlib.contextmanager
def model_server(models: str = "scripted") -> Iterator[ModelServer]:
    """Yield a running server, which is killed at the end of the block."""
    server = ModelServer(models)
    server.start()
    try:
        yield server
    finally:
        server.kill()


if __name__ == "__main__":
    serve(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else "scripted")
