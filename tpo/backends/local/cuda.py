"""The runner for a GPU: the kernels of `kernels`, and decode steps replayed as CUDA graphs.

A step of a large model is some hundred small kernels: launched one by one from Python they would take longer than they
run. Each size of batch is recorded once, when it first comes; a batch is filled up to the next size with rows that look
at nothing and write to the slot of nobody.
"""

import logging
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpo.backends.local import kernels
from tpo.backends.local.attention import Head, KVCache
from tpo.backends.local.runner import Batch, Runner
from tpo.backends.local.scheduler import ActiveSequence
from tpo.backends.local.tables import Numbers, Tables, work

_log = logging.getLogger(__name__)

_PROGRAMS = 3
"""Of the attention kernel, for each multiprocessor."""
_recording = threading.Lock()
"""A process records one graph at a time: a judge may be a second policy, with an engine and a thread of its own."""


class CudaRunner(Runner):
    """Decode steps by Triton kernels; prompts as in `Runner`."""

    attention = "triton"

    def __init__(self, model: Any, shapes: dict[int, tuple[int, int, int]], slots: int, rows: int, context: int):
        super().__init__(model, shapes, slots)
        self._most = batch_size(rows)
        heads = model.config.get_text_config().num_attention_heads
        kv_heads = min(shape[0] for shape in shapes.values())
        size = max(shape[2] for shape in shapes.values())
        self._rows_an_item = min(kernels.rows_an_item(heads // shape[0]) for shape in shapes.values())
        self._tables = Tables(rows, context + 1)
        self._max_items = 8 * rows + 4096
        self._buffers = kernels.Buffers(self._most, rows + 1, context + 1, heads, size, self._max_items, self.device)
        self._tokens = torch.zeros(self._most, dtype=torch.long, device=self.device)
        self._numbers = torch.full((self._most,), self._tables.spare, dtype=torch.long, device=self.device)
        on_gpu = self.device.type == "cuda"
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count if on_gpu else 2
        self._programs = _PROGRAMS * processors
        self._aim = max(1, 2 * self._programs // kv_heads)
        self._graphs: dict[int, Any] = {}
        self._logits: Tensor | None = None
        """What every graph writes last: logits of its own for each of them would add up to gigabytes."""
        self._record = on_gpu
        self._planned: list[ActiveSequence] | None = None

    def _decode_logits(self, batch: Batch, rows: list[ActiveSequence]) -> Tensor:
        self._prepare(rows)
        n = len(rows)
        size = batch_size(n)
        self._tokens[:n].copy_(batch.last)
        self._buffers.positions[:n].copy_(batch.positions)
        if self._record and size not in self._graphs:
            self._graph(size)
        if self._logits is not None and size in self._graphs:
            self._graphs[size].replay()
            return self._logits[:n]
        return self._pass(size)[:n]

    def forget(self) -> None:
        """As in `Runner`; and what was to be written into the tables when memory ran out is written anew."""
        super().forget()
        self._tables.forget()
        self._planned = None

    def _prepare(self, rows: list[ActiveSequence]) -> None:
        """Bring tables and items up to date where rows joined, left or grew."""
        writes = self._tables.update(rows)
        if writes is None and rows is self._planned:
            return
        self._planned = rows
        buffers = self._buffers
        if writes is not None and len(writes.at):
            buffers.table.view(-1).index_copy_(0, self._whole(writes.at, np.int64), self._whole(writes.slots))
        plan = work(rows, self._rows_an_item, self._aim, self._max_items)
        buffers.items[: len(plan.items)].copy_(self._whole(plan.items))
        buffers.item_count.fill_(len(plan.items))
        n, size = len(rows), batch_size(len(rows))
        buffers.parts[:n].copy_(self._whole(plan.parts))
        buffers.parts[n:size].zero_()
        buffers.positions[n:size].zero_()
        self._tokens[n:size].zero_()
        self._numbers[:n].copy_(torch.tensor([row.table for row in rows], device=self.device))
        self._numbers[n:size].fill_(self._tables.spare)

    def _whole(self, numbers: Numbers, dtype: Any = np.int32) -> Tensor:
        return torch.from_numpy(numbers.astype(dtype)).to(self.device, non_blocking=False)

    def _pass(self, size: int) -> Tensor:
        positions = self._buffers.positions[:size].long()
        slots = self._buffers.table[self._numbers[:size], positions].long()
        step = _KernelStep(self._store, slots, self._buffers, self._programs)
        return self.forward(self._tokens[:size], positions, step)

    def _graph(self, size: int) -> None:
        """Record a step of this size; what cannot be recorded is launched kernel by kernel from now on."""
        try:
            with _recording:
                self._graphs[size] = self._recorded(size)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _log.warning("decode steps of this model cannot be recorded as CUDA graphs: %r", error)
            self._record = False

    def _recorded(self, size: int) -> Any:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                logits = self._pass(size)
        torch.cuda.current_stream().wait_stream(stream)
        if self._logits is None:
            self._logits = logits.new_empty(self._most, logits.shape[1])
        del logits
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        # The reward model's thread goes on meanwhile: its calls must not spoil the record.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._logits[:size].copy_(self._pass(size))
        return graph


class _KernelStep:
    """One token for each row, by the kernels."""

    def __init__(self, store: KVCache, slots: Tensor, buffers: kernels.Buffers, programs: int) -> None:
        self._store = store
        self._slots = slots
        self._buffers = buffers
        self._programs = programs

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, head: Head) -> Tensor:
        self._store.write(layer, self._slots, k, v)
        keys, values = self._store.keys[layer], self._store.values[layer]
        return kernels.attend(q, keys, values, head, self._buffers, self._programs)


def batch_size(rows: int) -> int:
    """The next size that steps are recorded for."""
    if rows <= 8:
        return 1 << max(0, rows - 1).bit_length()
    step = 16 if rows <= 64 else 32 if rows <= 256 else 64
    return -(-rows // step) * step
