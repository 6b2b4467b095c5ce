"""What a stage is about to cost, written before it starts."""

import math
from dataclasses import dataclass

import psutil
import torch
from torch import nn


@dataclass
class Estimate:
    """Steps, images and memory of one stage.

    Attributes:
        images_per_epoch: training images; with repeated augmentation or a stream, those that one epoch counts.
        global_batch: images of one optimizer step, over all processes and accumulated micro-batches.
        steps: optimizer steps.
        images: images that all steps see together.
        model_bytes: parameters and buffers of the model, on each process that holds all of it.
        training_bytes: gradients and AdamW's two moments, likewise.
        teacher_bytes: parameters and buffers of the teacher, on each process; 0 without one.
    """

    images_per_epoch: int
    global_batch: int
    steps: int
    images: int
    model_bytes: int
    training_bytes: int
    teacher_bytes: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        teacher: nn.Module | None,
        images_per_epoch: int,
        global_batch: int,
        epochs: float,
        max_steps: int = -1,
    ) -> "Estimate":
        """From what the stage is told; `max_steps` wins over `epochs`, as in Trainer, if it is positive."""
        steps = max_steps if max_steps > 0 else math.ceil(epochs * max(1, math.ceil(images_per_epoch / global_batch)))
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        return cls(
            images_per_epoch=images_per_epoch,
            global_batch=global_batch,
            steps=steps,
            images=steps * global_batch,
            model_bytes=bytes_of(model),
            training_bytes=3 * trained,
            teacher_bytes=0 if teacher is None else bytes_of(teacher),
        )

    def __str__(self) -> str:
        memory = (
            f"{mebibytes(self.model_bytes)} for the model, {mebibytes(self.training_bytes)} for its gradients and AdamW"
        )
        if self.teacher_bytes:
            memory += f", {mebibytes(self.teacher_bytes)} for the teacher"
        return (
            f"{self.steps:,} steps of {self.global_batch:,} images: {self.images:,} images, of {self.images_per_epoch:,} an"
            f" epoch. Memory on each process: {memory}; activations come on top"
        )


def bytes_of(module: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MiB"


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free there, of what the machine or the GPU has; None where nobody tells (neither CPU nor CUDA)."""
    if device.type == "cpu":
        return psutil.virtual_memory().available
    if device.type == "cuda":
        # What torch keeps for later tensors is free for these.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    return None
