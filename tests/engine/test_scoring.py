"""Thread of the reward model: batching, order and failures."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from testing.waiting import HANG_SECONDS
from tpo.backends.local.reward_engine import RewardEngine
from tpo.core.errors import BackendUnavailableError

POISON = 99


class Network:
    """Network that scores a conversation by its sum. Its first pass blocks, so that later requests are batched."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self) -> None:
        text = SimpleNamespace()
        self.config = SimpleNamespace(get_text_config=lambda: text)
        self.passes: list[list[list[int]]] = []
        self.begun = threading.Event()
        self.proceed = threading.Event()
        self.error: BaseException = ValueError("?")

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **_more: Any) -> Any:
        rows = [r[m.bool()].tolist() for r, m in zip(input_ids, attention_mask, strict=True)]
        self.passes.append(rows)
        self.begun.set()
        assert self.proceed.wait(HANG_SECONDS)
        if any(POISON in row for row in rows):
            raise self.error
        return SimpleNamespace(logits=torch.tensor([[float(sum(row))] for row in rows]))


@pytest.fixture
def network() -> Network:
    return Network()


@pytest.fixture
def busy(network: Network) -> Iterator[RewardEngine]:
    """Engine in its first pass."""
    engine = RewardEngine(network, 100)
    engine.submit([[1]])
    assert network.begun.wait(HANG_SECONDS)
    yield engine
    network.proceed.set()
    engine.close()


def test_longest_waiting_request_runs_first(busy: RewardEngine, network: Network) -> None:
    long, short = busy.submit([[2] * 400]), [busy.submit([[3] * 300] * 2) for _ in range(3)]
    network.proceed.set()
    assert long.result(60) == (800,)
    assert [future.result(60) for future in short] == [(900, 900)] * 3
    assert network.passes[1] == [[2] * 400]
    assert busy.submit([]).result(60) == ()


def test_conversation_that_breaks_the_model_fails_alone(busy: RewardEngine, network: Network) -> None:
    first, broken, last = busy.submit([[1], [2]]), busy.submit([[3], [POISON]]), busy.submit([[4]])
    network.proceed.set()
    assert (first.result(60), last.result(60)) == ((1, 2), (4,))
    with pytest.raises(BackendUnavailableError, match="failed: ValueError"):
        broken.result(60)
    assert sorted(token for (token,) in network.passes[1]) == [1, 2, 3, 4, POISON]
    assert busy.healthy


def test_cancelled_request_is_not_scored(busy: RewardEngine, network: Network) -> None:
    cancelled, remaining = busy.submit([[5]]), busy.submit([[6]])
    cancelled.cancel()
    network.proceed.set()
    assert remaining.result(60) == (6,)
    assert network.passes[1:] == [[[6]]]


def test_device_failure_fails_all_requests(busy: RewardEngine, network: Network) -> None:
    network.error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    futures = [busy.submit([[POISON]]), busy.submit([[7] * 500, [8] * 500]), busy.submit([[9] * 500])]
    network.proceed.set()
    for future in futures:
        with pytest.raises(BackendUnavailableError, match="illegal memory access"):
            future.result(60)
    assert not busy.healthy
    with pytest.raises(BackendUnavailableError, match="must be restarted"):
        busy.submit([[1]])
