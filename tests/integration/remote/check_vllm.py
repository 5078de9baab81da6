"""Back ends against a real vLLM. `make servers` installs it and runs this file; `make test` does not.

Two vLLM servers on loopback serve the demo models in fp32 on the CPU. Results are compared with the local engine.
"""

import contextlib
import json
import math
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import httpx
import pytest

from testing.ports import free_port
from testing.processes import System
from testing.waiting import eventually
from tests.contract.test_backends import ask, proceed, rate
from tpo.backends import LoadedPolicy, LoadedRewardModel, load_models, load_policy, load_reward_model
from tpo.backends.spec import ModelSpec, RewardSpec
from tpo.core.errors import CallInterruptedError, ContextTooLongError
from tpo.core.ports import Score
from tpo.settings import Settings

pytestmark = pytest.mark.timeout(600)

ROOT = Path(__file__).parents[3]
MESSAGES = json.loads((ROOT / "demo" / "prompts.json").read_text())
SEEDS = (100, 101, 102, 103, 104)
RESPONSES = (
    "",
    "Sorry! Please tell us your order number.",
    "   Dear Emma,\n\nThe mixer is broken, we are sorry.  ",
    "é ü 😀",
    "word " * 300,
)
FLOAT32 = 1e-5
"""Tolerance for the same logit computed in another order."""


class Vllm:
    """A vLLM server of one demo model."""

    def __init__(self, model: str, log: Path, *options: str) -> None:
        self.root = f"http://127.0.0.1:{(port := free_port())}"
        self._log = log
        command = [os.environ["VLLM_PYTHON"], "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager", *options]
        command += ["--model", str(ROOT / "demo" / "models" / model), "--served-model-name", model]
        command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
        # On a CPU, vLLM 0.32 crashes on a seeded prompt that is prefilled in chunks: 64 windows fit into a step.
        command += ["--max-num-batched-tokens", str(64 * 512)]
        quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command, env={**os.environ, **quiet}, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def is_ready(self) -> bool:
        assert self._process.poll() is None, self._log.read_text()
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"{self.root}/health", trust_env=False).is_success
        return False

    def metric(self, name: str) -> float:
        lines = httpx.get(f"{self.root}/metrics", trust_env=False).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))

    def kill(self) -> None:
        """Kill the server and the processes of its engine."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Vllm, Vllm]]:
    """Servers of the policy and of the reward model."""
    logs = tmp_path_factory.mktemp("vllm")
    servers = (
        Vllm("policy", logs / "policy.log"),
        Vllm("reward", logs / "reward.log", "--runner", "pooling"),
    )
    try:
        for server in servers:
            eventually(server.is_ready, why=f"vLLM should be ready on {server.root}")
        yield servers
    finally:
        for server in servers:
            server.kill()


@pytest.fixture(params=["batched", "separate"])
def policy(request: pytest.FixtureRequest, vllm: tuple[Vllm, Vllm]) -> Iterator[LoadedPolicy]:
    url = f"{vllm[0].root}/v1"
    policy = load_policy(ModelSpec("openai:policy", url, samples=request.param), Settings())
    yield policy
    policy.close()


@pytest.fixture(params=["vllm", "vllm-pooling"])
def reward(request: pytest.FixtureRequest, vllm: tuple[Vllm, Vllm]) -> Iterator[LoadedRewardModel]:
    reward = load_reward_model(RewardSpec(f"{request.param}:reward", vllm[1].root), Settings())
    yield reward
    reward.close()


@pytest.fixture(scope="module")
def local() -> Iterator[tuple[LoadedPolicy, LoadedRewardModel]]:
    """Load the same models in the local engine."""
    policy, reward = load_models(Settings(threads=1))
    yield policy, reward
    policy.close()
    reward.close()


def test_seed_determines_the_text_in_any_batch(policy: LoadedPolicy) -> None:
    def sampled(*seeds: int) -> list[str]:
        request = ask(MESSAGES[0], seeds=seeds, temperature=1.0, top_p=1.0, max_tokens=80)
        return [t.text for t in policy.generate(request, proceed).texts]

    five = sampled(*SEEDS)
    assert len(set(five)) > 1
    assert sampled(*SEEDS) == five
    # With n, vLLM increments the request's seed for each sample.
    assert [text for seed in SEEDS for text in sampled(seed)] == five


@pytest.mark.parametrize(
    "changes", [{"temperature": 0.0}, {"temperature": 1.0, "top_p": 1e-6}], ids=["greedy", "top_p"]
)
def test_greedy_text_equals_the_local_engine(
    policy: LoadedPolicy, local: tuple[LoadedPolicy, LoadedRewardModel], changes: dict[str, float]
) -> None:
    for message in MESSAGES:
        request = ask(message, seeds=SEEDS, max_tokens=80, **changes)
        here, there = local[0].generate(request, proceed), policy.generate(request, proceed)
        # This tokenizer writes a space before a first word. Decoding the whole sequence at once omits it.
        assert [t.text.lstrip() for t in there.texts] == [t.text for t in here.texts]
        assert [(t.tokens, t.finish_reason) for t in there.texts] == [(t.tokens, t.finish_reason) for t in here.texts]
        assert there.input_tokens == here.input_tokens


def test_stop_string_within_tokens_and_token_limit(policy: LoadedPolicy) -> None:
    (whole, *_) = policy.generate(ask(MESSAGES[0], temperature=0, max_tokens=80), proceed).texts
    stop = whole.text[12:16]
    stopped = policy.generate(ask(MESSAGES[0], temperature=0, max_tokens=80, stop=(stop,)), proceed).texts[0]
    assert (stopped.text, stopped.finish_reason) == (whole.text[: whole.text.index(stop)], "stop")
    limited = policy.generate(ask(MESSAGES[0], temperature=0, max_tokens=3), proceed).texts[0]
    assert (limited.tokens, limited.finish_reason) == (3, "length")
    assert whole.text.startswith(limited.text)


def test_limit_is_lowered_and_long_prompt_rejected(policy: LoadedPolicy) -> None:
    assert len(policy.generate(ask(MESSAGES[0], max_tokens=8192), proceed).texts) == 3
    with pytest.raises(ContextTooLongError, match="the policy holds 512 with its answer"):
        policy.generate(ask("word " * 800, max_tokens=8192), proceed)


@pytest.mark.parametrize("samples", ["batched", "separate"])
def test_cancelled_call_stops_generation(vllm: tuple[Vllm, Vllm], samples: Literal["batched", "separate"]) -> None:
    server = vllm[0]
    spec = ModelSpec("openai:policy", f"{server.root}/v1", samples=samples, extra_body={"ignore_eos": True})
    policy = load_policy(spec, Settings())
    before = server.metric("generation_tokens_total")

    def interrupt() -> None:
        if server.metric("generation_tokens_total") > before:
            raise CallInterruptedError("cancelled")

    with pytest.raises(CallInterruptedError):
        policy.generate(ask(MESSAGES[0], seeds=tuple(range(64)), max_tokens=450), interrupt)
    policy.close()
    eventually(lambda: server.metric("num_requests_running") == 0, why="the server should be idle")
    written = server.metric("generation_tokens_total") - before
    print(f"{samples}: {written:.0f} of {64 * 450} tokens")
    assert written < 64 * 450 / 2


def test_scores_equal_the_local_engines_raw_logits(
    reward: LoadedRewardModel, local: tuple[LoadedPolicy, LoadedRewardModel]
) -> None:
    request = rate(*RESPONSES)
    there, here = reward.score(request, proceed), local[1].score(request, proceed)
    assert there.values == pytest.approx(here.values, abs=FLOAT32)
    assert there.input_tokens == here.input_tokens
    print(f"largest difference: {max(abs(a - b) for a, b in zip(there.values, here.values, strict=True)):.1e}")


def test_vllm_applies_a_sigmoid_by_default(reward: LoadedRewardModel, vllm: tuple[Vllm, Vllm]) -> None:
    (raw,) = reward.score(rate(RESPONSES[1]), proceed).values
    turns = [*(m.model_dump() for m in rate().messages), {"role": "assistant", "content": RESPONSES[1]}]
    body = {"model": "reward", "messages": turns}
    reply = httpx.post(f"{vllm[1].root}/classify", json=body, trust_env=False).json()
    assert reply["data"][0]["probs"] == pytest.approx([1 / (1 + math.exp(-raw))], abs=FLOAT32)


def test_long_response_is_truncated_like_the_local_engine(
    reward: LoadedRewardModel, local: tuple[LoadedPolicy, LoadedRewardModel]
) -> None:
    request = rate("We are sorry. " * 400)
    shares = []
    for model in (reward, local[1]):
        ((_, share),) = model.score(request, proceed).parts
        assert share.name == "share_read"
        assert share.value is not None
        shares.append(share.value)
    assert 0.9 * shares[1] < shares[0] <= shares[1]


@pytest.mark.parametrize("samples", ["batched", "separate"])
def test_job_completes_and_improves_rewards(
    sqlite_system: System, vllm: tuple[Vllm, Vllm], local: tuple[LoadedPolicy, LoadedRewardModel], samples: str
) -> None:
    system = sqlite_system
    system.environment |= {
        "TPO_POLICY": "openai:policy",
        "TPO_OPENAI_URL": f"{vllm[0].root}/v1",
        "TPO_OPENAI_SAMPLES": samples,
        "TPO_REWARD_MODEL": "vllm:reward",
        "TPO_REWARD_URL": vllm[1].root,
        "TPO_PROMPT_SET": "tiny",
    }
    system.worker()
    job_id = system.submit(MESSAGES[0], sample_size=5, max_iterations=2, seed=1)
    job = system.wait_for_end(job_id)
    assert (job.status, job.attempt) == ("completed", 1)
    state = system.store.jobs.state(job_id)
    assert len(state.candidates) == 15
    texts = tuple(c.text for c in state.candidates)
    here = local[1].score(Score(iteration=0, messages=state.input, responses=texts), proceed)
    assert [c.reward for c in state.candidates] == pytest.approx(here.values, abs=FLOAT32)
    scored = list(zip(state.candidates, here.values, strict=True))
    means = [sum(value for c, value in scored if c.iteration == i) / 5 for i in range(3)]
    print(f"{samples}: mean rewards", *(f"{mean:.2f}" for mean in means))
    assert means[2] > means[0]
