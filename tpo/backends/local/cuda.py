"""Runner for a GPU: attention by the Triton kernels in `kernels`, and decode steps replayed as CUDA graphs.

A step of a large model consists of hundreds of small kernels. Launching them one by one from Python takes longer than
running them. Each batch size is captured when it first occurs. A batch is padded to the next captured size with rows
that attend to nothing and write to the dummy slot 0.
"""

import logging
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpo.backends.local import kernels
from tpo.backends.local.attention import AttentionParams, KVCache
from tpo.backends.local.runner import Batch, Runner
from tpo.backends.local.scheduler import ActiveSequence
from tpo.backends.local.tables import Int64Array, SlotTables, plan_work_items

_log = logging.getLogger(__name__)

_PROGRAMS_PER_PROCESSOR = 3
"""Programs of the attention kernel for each multiprocessor."""
_capture_lock = threading.Lock()
"""Held during a capture: a process may have two policies, each with an engine and a thread of its own."""


class CudaRunner(Runner):
    """Runner whose decode steps use Triton kernels. Prefill is the same as in `Runner`."""

    attention = "triton"

    def __init__(self, model: Any, shapes: dict[int, tuple[int, int, int]], slots: int, rows: int, context: int):
        super().__init__(model, shapes, slots)
        self._max_batch = batch_size(rows)
        heads = model.config.get_text_config().num_attention_heads
        kv_heads = min(shape[0] for shape in shapes.values())
        size = max(shape[2] for shape in shapes.values())
        self._rows_per_item = min(kernels.rows_per_item(heads // shape[0]) for shape in shapes.values())
        self._tables = SlotTables(rows, context + 1)
        self._max_items = 8 * rows + 4096
        self._buffers = kernels.Buffers(
            self._max_batch, rows + 1, context + 1, heads, size, self._max_items, self.device
        )
        self._tokens = torch.zeros(self._max_batch, dtype=torch.long, device=self.device)
        self._table_indices = torch.full(
            (self._max_batch,), self._tables.null_table, dtype=torch.long, device=self.device
        )
        on_gpu = self.device.type == "cuda"
        processors = torch.cuda.get_device_properties(self.device).multi_processor_count if on_gpu else 2
        self._programs = _PROGRAMS_PER_PROCESSOR * processors
        self._target_items = max(1, 2 * self._programs // kv_heads)
        self._graphs: dict[int, Any] = {}
        self._logits: Tensor | None = None
        """Output buffer shared by all graphs: separate logits for each graph would add up to gigabytes."""
        self._uses_graphs = on_gpu
        self._planned_rows: list[ActiveSequence] | None = None

    def _decode_logits(self, batch: Batch, rows: list[ActiveSequence]) -> Tensor:
        self._prepare(rows)
        n = len(rows)
        size = batch_size(n)
        self._tokens[:n].copy_(batch.last_tokens)
        self._buffers.positions[:n].copy_(batch.positions)
        if self._uses_graphs and size not in self._graphs:
            self._capture(size)
        if self._logits is not None and size in self._graphs:
            self._graphs[size].replay()
            return self._logits[:n]
        return self._forward_padded(size)[:n]

    def reset(self) -> None:
        """Reset as in `Runner`, and make the next step write all tables: a failed step may have missed entries."""
        super().reset()
        self._tables.clear()
        self._planned_rows = None

    def _prepare(self, rows: list[ActiveSequence]) -> None:
        """Update the tables and work items if rows were added, left or got another segment."""
        writes = self._tables.update(rows)
        if writes is None and rows is self._planned_rows:
            return
        self._planned_rows = rows
        buffers = self._buffers
        if writes is not None and len(writes.indices):
            buffers.tables.view(-1).index_copy_(
                0, self._to_device(writes.indices, np.int64), self._to_device(writes.slots)
            )
        plan = plan_work_items(rows, self._rows_per_item, self._target_items, self._max_items)
        buffers.items[: len(plan.items)].copy_(self._to_device(plan.items))
        buffers.item_count.fill_(len(plan.items))
        n, size = len(rows), batch_size(len(rows))
        buffers.part_counts[:n].copy_(self._to_device(plan.part_counts))
        buffers.part_counts[n:size].zero_()
        buffers.positions[n:size].zero_()
        self._tokens[n:size].zero_()
        self._table_indices[:n].copy_(torch.tensor([row.table_index for row in rows], device=self.device))
        self._table_indices[n:size].fill_(self._tables.null_table)

    def _to_device(self, numbers: Int64Array, dtype: Any = np.int32) -> Tensor:
        return torch.from_numpy(numbers.astype(dtype)).to(self.device, non_blocking=False)

    def _forward_padded(self, size: int) -> Tensor:
        """Run the model over a padded batch. Return logits [size, vocabulary]."""
        positions = self._buffers.positions[:size].long()
        slots = self._buffers.tables[self._table_indices[:size], positions].long()
        step = _KernelDecodeAttention(self._kv_cache, slots, self._buffers, self._programs)
        return self.forward(self._tokens[:size], positions, step)

    def _capture(self, size: int) -> None:
        """Capture a decode step of this batch size as a CUDA graph.

        If torch cannot capture the model, this runner never tries again and launches the kernels of each step one by
        one. Raises torch.OutOfMemoryError, from which the engine recovers by preemption.
        """
        try:
            with _capture_lock:
                self._graphs[size] = self._capture_graph(size)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            _log.warning("decode steps of this model cannot be captured as CUDA graphs: %r", error)
            self._uses_graphs = False

    def _capture_graph(self, size: int) -> Any:
        """Return the CUDA graph of a decode step of this batch size.

        The step runs twice before, because the first runs compile kernels and allocate memory, which a capture forbids.
        """
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                logits = self._forward_padded(size)
        torch.cuda.current_stream().wait_stream(stream)
        if self._logits is None:
            self._logits = logits.new_empty(self._max_batch, logits.shape[1])
        del logits
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self._graphs.values())).pool() if self._graphs else None
        # In the default mode, CUDA calls of other threads, such as the reward model's, would invalidate the capture.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._logits[:size].copy_(self._forward_padded(size))
        return graph


class _KernelDecodeAttention:
    """Decode: one token for each row, using the Triton kernels."""

    def __init__(self, cache: KVCache, slots: Tensor, buffers: kernels.Buffers, programs: int) -> None:
        self._cache = cache
        self._slots = slots
        self._buffers = buffers
        self._programs = programs

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, params: AttentionParams) -> Tensor:
        """Let each row attend to all its tokens, or to the last `window` of them. See `AttentionStep.attend`."""
        self._cache.write(layer, self._slots, k, v)
        keys, values = self._cache.keys[layer], self._cache.values[layer]
        return kernels.attend(q, keys, values, params, self._buffers, self._programs)


def batch_size(rows: int) -> int:
    """Return the padded size of a batch: the next size for which steps are captured."""
    if rows <= 8:
        return 1 << max(0, rows - 1).bit_length()
    step = 16 if rows <= 64 else 32 if rows <= 256 else 64
    return -(-rows // step) * step
