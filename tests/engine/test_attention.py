"""Attention kernels that torch uses for prompts. Needs no GPU: tensors have only shapes, and calls are recorded."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tpo.backends.local import attention
from tpo.backends.local.attention import AttentionParams, _scores, causal_attention


class CallRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records each call of torch."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("available", "size", "window", "flash"),
    [(True, 128, None, True), (True, 84, None, False), (True, 128, 16, False), (False, 128, None, False)],
    ids=["fits", "odd params size", "sliding window", "none on this GPU"],
)
def test_flash_attention_is_used_if_supported(
    available: bool, size: int, window: int | None, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda _: available)
    q, k = (torch.empty(heads, n, size, dtype=torch.float16, device="meta") for heads, n in ((32, 7), (8, 19)))
    with CallRecorder() as recorder:
        out = causal_attention(q, k, k, AttentionParams(size**-0.5, window, None))
    assert (out.shape, out.dtype) == (q.shape, q.dtype)
    assert ("aten::_scaled_dot_product_flash_attention" in recorder.calls) == flash


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("limit", [1, 200])
def test_chunked_scores_equal_unchunked_ones(window: int | None, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(heads, n, size) for heads, n, size in ((4, 7, 8), (2, 19, 8), (2, 19, 6)))
    params = AttentionParams(8**-0.5, window, softcap=2.0)
    whole = causal_attention(q, k, v, params)
    monkeypatch.setattr(attention, "_MAX_SCORES", limit)
    sizes = []

    def recorded(*arguments: Any) -> torch.Tensor:
        scores = _scores(*arguments)
        sizes.append(scores.numel())
        return scores

    monkeypatch.setattr(attention, "_scores", recorded)
    torch.testing.assert_close(causal_attention(q, k, v, params), whole)
    assert max(sizes) <= max(limit, 4 * 19)
    assert len(sizes) > 1
