"""Seeded sampling (Gumbel-max): one token per row, independent of the other rows in the batch."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_SHORTLIST = 64
_MIN_TEMPERATURE = 1e-6
"""Lower bound for temperatures. Lower ones select the same token, but the scaled logits would not be finite."""
_MASK_63 = 2**63 - 1


class Sampler:
    """Sampling parameters of the rows of a batch, as tensors.

    The token is argmax(log p + Gumbel noise), where the noise is a hash of (seed, step, token). The result is stable
    when the last bits of the logits vary with the rest of the batch; inverse-CDF sampling is not.
    """

    def __init__(
        self, seeds: Sequence[int], temperatures: Sequence[float], top_ps: Sequence[float], device: torch.device
    ) -> None:
        self._greedy = torch.tensor([t == 0 for t in temperatures], device=device)
        self._all_greedy = all(t == 0 for t in temperatures)
        self._any_greedy = any(t == 0 for t in temperatures)
        self._temperatures = torch.tensor([max(t, _MIN_TEMPERATURE) for t in temperatures], device=device).unsqueeze(1)
        limits = [p if t > 0 else 0.0 for t, p in zip(temperatures, top_ps, strict=True)]
        self._top_ps = torch.tensor(limits, device=device).unsqueeze(1)
        # Rounding makes the cumulative probability reach 1 early. With top_p = 1 this must not exclude any token.
        self._unlimited = _row_indices([p >= 1 for p in limits], device)
        self._limited = _row_indices([p < 1 for p in limits], device)
        self._seeds = torch.tensor([s & _MASK_63 for s in seeds], device=device)

    def __call__(self, logits: Tensor, steps: Tensor) -> Tensor:
        """Sample one token per row.

        `logits`: [rows, vocabulary]. `steps`: [rows], the index of the token in each row's completion. Result: [rows].
        """
        if self._all_greedy:
            return logits.argmax(-1)
        log_p = torch.log_softmax(logits.float() / self._temperatures, -1)
        keys = _hash64(self._seeds + _hash64(steps)).unsqueeze(1)
        if not len(self._unlimited):
            drawn = _sample_top_p(log_p, self._top_ps, keys)
        elif not len(self._limited):
            drawn = _sample_from_all(log_p, keys)
        else:
            # Sampled separately: a nucleus with top_p = 1 would sort the whole vocabulary.
            drawn = torch.empty_like(steps)
            drawn[self._unlimited] = _sample_from_all(log_p[self._unlimited], keys[self._unlimited])
            some = self._limited
            drawn[some] = _sample_top_p(log_p[some], self._top_ps[some], keys[some])
        return torch.where(self._greedy, logits.argmax(-1), drawn) if self._any_greedy else drawn


def _row_indices(chosen: Sequence[bool], device: torch.device) -> Tensor:
    return torch.tensor([i for i, yes in enumerate(chosen) if yes], dtype=torch.long, device=device)


def _sample_from_all(log_p: Tensor, keys: Tensor) -> Tensor:
    return (log_p + _gumbel(keys, torch.arange(log_p.shape[1], device=log_p.device))).argmax(-1)


def _sample_top_p(log_p: Tensor, top_ps: Tensor, keys: Tensor) -> Tensor:
    log_p, ids = _nucleus(log_p, top_ps, _SHORTLIST)
    return ids.gather(1, (log_p + _gumbel(keys, ids)).argmax(-1, keepdim=True)).squeeze(1)


def _nucleus(log_p: Tensor, top_ps: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the most likely tokens of each row, best first, and their ids. Tokens beyond top_p have log p = -inf.

    `width`: number of candidates to start with; rows whose nucleus is larger get a longer list.
    """
    size = log_p.shape[1]
    width = min(size, width)
    top, ids = log_p.topk(width, dim=-1)
    p = top.exp()
    before = p.cumsum(-1) - p
    # The most likely token is always in the nucleus, however small top_p is.
    before[:, 0] = -torch.inf
    top = top.masked_fill(before >= top_ps, -torch.inf)
    # Sorting the whole vocabulary costs more than the model, so only rows with flat distributions get a longer list.
    flat = (before[:, -1] < top_ps[:, 0]).nonzero()[:, 0] if width < size else ids[:0, 0]
    if not len(flat):
        return top, ids
    longer, longer_ids = _nucleus(log_p[flat], top_ps[flat], 8 * width)
    more = longer.shape[1] - width
    top = functional.pad(top, (0, more), value=-torch.inf).index_copy_(0, flat, longer)
    return top, functional.pad(ids, (0, more)).index_copy_(0, flat, longer_ids)


def _gumbel(keys: Tensor, ids: Tensor) -> Tensor:
    """Return standard Gumbel noise, a function of key [rows, 1] and token id."""
    bits = (_hash64(keys + ids * -7046029254386353131) >> 32) & 0xFFFFFFFF
    uniform = (bits.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-uniform.clamp(max=1 - 2.0**-24)))


def _hash64(x: Tensor) -> Tensor:
    """Apply the finalizer of SplitMix64 (Steele et al. 2014) to int64: products wrap, and shifts are made logical."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ ((x >> 31) & 0x1FFFFFFFF)
