"""Compare the GPU runner with the plain runner, on a GPU if there is one, else in Triton's interpreter.

This runs in a separate process, because Triton reads the environment only when it is first imported:

    TRITON_INTERPRET=1 python -m tests.support.kernels
"""

import copy
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_models import CONTEXT, KINDS, load_kind
from tpo.backends.local.cuda import CudaRunner
from tpo.backends.local.engine import StepEngine
from tpo.backends.local.kv_allocator import Segment, SegmentSlice
from tpo.backends.local.requests import Completion, EngineRequest, RequestMetrics, TokenRequest
from tpo.backends.local.runner import Runner, install_attention
from tpo.backends.local.scheduler import ActiveSequence, PrefillChunk, PrefillRequest, SchedulerConfig

_ROWS = 8
_LENGTHS = (3, 40, 100)
"""Lengths of prompts in tokens: shorter than one kernel tile (64 tokens), and longer."""

Completions = Sequence[tuple[Completion, ...]]


def requests(lengths: Sequence[int], longest: int) -> list[TokenRequest]:
    """Return greedy and sampled requests of different lengths."""
    prompts = [tuple((7 * i + 3 * j) % 250 for j in range(length)) for i, length in enumerate(lengths)]
    return [
        *(TokenRequest(prompt, (0, 1), 0.0, 1.0, longest - 5 + 2 * i) for i, prompt in enumerate(prompts)),
        *(TokenRequest(prompt, (i, i + 1, i + 2), 0.7, 0.9, longest - 2 * i) for i, prompt in enumerate(prompts)),
    ]


def completions(runner: Runner, slots: int, lengths: Sequence[int], longest: int) -> Completions:
    """Submit all requests at once and return their completions."""
    engine = StepEngine(runner, SchedulerConfig(_ROWS, slots, 64), frozenset())
    try:
        return [
            future.result(1000).completions for future in [engine.submit(each) for each in requests(lengths, longest)]
        ]
    finally:
        engine.close()


def staggered_logits(runner: Runner) -> torch.Tensor:
    """Return the logits of two samples of one prompt, one of them three tokens ahead of the other."""
    request = EngineRequest(TokenRequest(tuple(range(20)), (0, 1), 0.0, 1.0, 8), 0, RequestMetrics(0.0))
    prefill = PrefillRequest(request, [0, 1], (SegmentSlice(Segment(2, 20, 20), 20),), 0)
    rows = [ActiveSequence(request, i, prefill.chain, [], [Segment(22 + 8 * i, 8)]) for i in range(2)]
    logits = []
    with torch.inference_mode():
        runner.prefill([PrefillChunk(prefill, 0, 20)])
        for token, step in enumerate([rows[1:]] * 3 + [rows] * 3):
            for row in step:
                row.tokens.append(token)
                row.segments[0].used = len(row.tokens)
            logits.append(runner.decode_logits(list(step)))
    return torch.cat(logits)


def differences(kind: str) -> list[str]:
    """Return the differences between the two runners, one a line, for one kind of attention."""
    with tempfile.TemporaryDirectory() as folder:
        model: Any = load_kind(kind, Path(folder)).to("cuda" if torch.cuda.is_available() else "cpu")

    def plain() -> Runner:
        own = copy.deepcopy(model)
        return Runner(own, install_attention(own, kind), 2000)

    def fast(slots: int) -> Runner:
        own = copy.deepcopy(model)
        return CudaRunner(own, install_attention(own, kind), slots, _ROWS, CONTEXT)

    # The first kind runs with more requests than fit at once, with ample and with scarce memory. The other kinds
    # differ from it only in their attention, so one size is enough for them.
    first = kind == KINDS[0]
    sizes, lengths, longest = ((2000, 150), _LENGTHS, 9) if first else ((2000,), _LENGTHS[1:], 6)
    expected = completions(plain(), 2000, lengths, longest)
    farthest = float((staggered_logits(fast(2000)) - staggered_logits(plain())).abs().max())
    # 150 slots hold little more than the longest request, so samples are preempted and restarted.
    return ([f"{kind}: logits {farthest} apart"] if farthest > 1e-4 else []) + [
        f"{kind}, {slots} slots, request {i}: {[c.tokens for c in mine]} instead of {[c.tokens for c in theirs]}"
        for slots in sizes
        for i, (mine, theirs) in enumerate(
            zip(completions(fast(slots), slots, lengths, longest), expected, strict=True)
        )
        if mine != theirs
    ]


def main() -> int:
    """Print the differences and return their number."""
    found = [line for kind in KINDS for line in differences(kind)]
    print(*found, f"{len(found)} differences", sep="\n")
    return len(found)


if __name__ == "__main__":
    sys.exit(main())
