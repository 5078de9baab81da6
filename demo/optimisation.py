"""Optimisers, learning rate and checkpoints, shared by the training of both models."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from demo.settings import Schedule


class Optimisers:
    """Muon for the matrices inside the layers, AdamW for the rest, both on one schedule."""

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        inner = {name for name, weight in model.named_parameters() if weight.ndim == 2 and ".layers." in name}
        matrices = [weight for name, weight in model.named_parameters() if name in inner]
        others = [weight for name, weight in model.named_parameters() if name not in inner]
        self.model = model
        self.schedule = schedule
        self.rates = (schedule.adam_rate, schedule.muon_rate)
        self.optimisers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.AdamW(others, lr=schedule.adam_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
            torch.optim.Muon(matrices, lr=schedule.muon_rate, weight_decay=0.02, momentum=0.95),
        )

    def step(self, step: int) -> None:
        """Apply the gradients once, and clear them."""
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser, rate in zip(self.optimisers, self.rates, strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * self.schedule.factor(step)
            optimiser.step()
        self.model.zero_grad(set_to_none=True)


def save_checkpoint(path: Path, step: int, optimisers: Optimisers) -> None:
    """Write everything that a training needs to continue from `step`, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "model": optimisers.model.state_dict(),
        "optimisers": [optimiser.state_dict() for optimiser in optimisers.optimisers],
    }
    part = path.with_suffix(".part")
    torch.save(state, part)
    os.replace(part, path)


def load_checkpoint(path: Path, optimisers: Optimisers) -> int:
    """Restore a training and return the step to continue from: zero if there is no checkpoint."""
    if not path.exists():
        return 0
    state: dict[str, Any] = torch.load(path, weights_only=True)
    optimisers.model.load_state_dict(state["model"])
    for optimiser, saved in zip(optimisers.optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(saved)
    return int(state["step"])
