"""Gumbel-max sampling: correct frequencies and nucleus, independent of the other rows of the batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tpo.backends.local.sampling import Sampler

CPU = torch.device("cpu")
DRAWS = 20_000


def draw(logits: Tensor, temperature: float, top_p: float, steps: int = DRAWS) -> Tensor:
    """Draw one token at each of `steps` steps with one seed."""
    sampler = Sampler([1234] * steps, [temperature] * steps, [top_p] * steps, CPU)
    return sampler(logits.expand(steps, -1), torch.arange(steps))


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (2.0, 0.95)])
def test_frequencies_equal_the_truncated_distribution(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -1.0, -3.0])
    p = torch.softmax(logits / temperature, 0)
    p[(p.cumsum(0) - p) >= top_p] = 0
    p /= p.sum()
    counts = torch.bincount(draw(logits, temperature, top_p), minlength=6)
    assert torch.allclose(counts / DRAWS, p, atol=0.015)
    assert counts[p == 0].sum() == 0


def test_seeds_draw_independently() -> None:
    sampler = Sampler(list(range(DRAWS)), [1.0] * DRAWS, [1.0] * DRAWS, CPU)
    tokens = sampler(torch.zeros(DRAWS, 4), torch.zeros(DRAWS, dtype=torch.long))
    assert torch.allclose(torch.bincount(tokens) / DRAWS, torch.full((4,), 0.25), atol=0.015)


def test_neighbouring_seeds_are_uncorrelated() -> None:
    logits, steps = torch.zeros(100, 1000), torch.arange(100)
    one, next_one = (Sampler([seed] * 100, [1.0] * 100, [1.0] * 100, CPU)(logits, steps) for seed in (1, 2))
    assert (one[1:] == next_one[:-1]).sum() < 5
    assert (one == next_one).sum() < 5


def test_greedy_rows_are_exact_next_to_sampled_ones() -> None:
    logits = torch.randn(64, 50)
    tokens = Sampler(range(64), [0.0, 1.0] * 32, [0.9] * 64, CPU)(logits, torch.zeros(64, dtype=torch.long))
    assert torch.equal(tokens[::2], logits.argmax(-1)[::2])
    assert not torch.equal(tokens[1::2], logits.argmax(-1)[1::2])


@pytest.mark.parametrize("temperature", [1e-3, 1e-38, 1e-45])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.randperm(300).float()
    assert set(draw(logits, temperature, 0.95, 100).tolist()) == {int(logits.argmax())}


def test_tiny_top_p_is_greedy() -> None:
    logits = torch.randn(1, 50)
    assert set(draw(logits, 2.0, 1e-6, 100).tolist()) == {int(logits.argmax())}


def test_nucleus_beyond_the_shortlist_is_complete() -> None:
    tokens = draw(torch.zeros(800), 1.0, 0.5, 3000)
    assert 390 < len(set(tokens.tolist())) <= 401


def test_row_does_not_depend_on_other_rows() -> None:
    peaked, flat = torch.randn(1, 3000) * 8, torch.zeros(1, 3000)
    step = torch.tensor([5])
    alone = Sampler([9], [0.7], [0.95], CPU)(peaked, step)
    for other_top_p in (0.95, 1.0):
        batched = Sampler([9, 8], [0.7, 1.0], [0.95, other_top_p], CPU)(torch.cat([peaked, flat]), step.expand(2))
        assert batched[0] == alone[0]


def test_draws_are_stable_under_rounding_of_logits() -> None:
    logits = torch.randn(2000, 300)
    sampler = Sampler(range(2000), [0.7] * 2000, [0.95] * 2000, CPU)
    step = torch.zeros(2000, dtype=torch.long)
    moved = sampler(logits + torch.randn_like(logits) * 1e-6, step)
    assert (moved != sampler(logits, step)).sum() <= 2


def test_rows_without_top_p_are_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    sorted_out: list[tuple[int, int]] = []
    topk = Tensor.topk

    def watched(self: Tensor, k: int, dim: int) -> Any:
        sorted_out.append((len(self), k))
        return topk(self, k, dim=dim)

    monkeypatch.setattr(Tensor, "topk", watched)
    # Three rows with top_p, one greedy row, and two without top_p.
    sampler = Sampler(range(6), [0.7, 0.7, 0.7, 0.0, 0.7, 0.7], [0.9, 0.9, 0.9, 1.0, 1.0, 1.0], CPU)
    sampler(torch.arange(5000.0).expand(6, -1), torch.zeros(6, dtype=torch.long))
    assert sorted_out == [(4, 64)]
