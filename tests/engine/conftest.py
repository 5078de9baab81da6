"""Fixtures of the engine suite."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.step_engine import start
from tpo.backends.local.engine import StepEngine


@pytest.fixture(scope="module")
def llama() -> Any:
    """Tiny Llama with random weights."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        initializer_range=0.3,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


@pytest.fixture
def engine(llama: Any) -> Iterator[StepEngine]:
    """Step engine of the tiny Llama."""
    engine = start(llama)
    yield engine
    engine.close()
