"""Trainers of the small models, on images that are noise."""

import torch
from conftest import IMAGE_SIZE, NUM_LABELS
from transformers import TrainerCallback

from quantformer_hf import QuantformerTrainer, QuantformerTrainingArguments


SAMPLES = 24


def dataset(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "pixel_values": torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
            "labels": int(torch.randint(NUM_LABELS, (), generator=generator)),
        }
        for _ in range(SAMPLES)
    ]


def make_trainer(folder, model, teacher=None, callbacks=None, **arguments):
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return QuantformerTrainer(
        model=model,
        args=QuantformerTrainingArguments(**defaults | arguments),
        teacher=teacher,
        train_dataset=dataset(),
        eval_dataset=dataset(1),
        callbacks=callbacks,
    )


def logged(trainer, key="loss"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


ALL_LOSSES = {
    "aux_weight": 1.0,
    "dm_weight": 0.1,
    "distillation_weight": 1.0,
    "feature_weight": 1.0,
    "pnorm": "entropy",
    "scale_learning_rate": 1e-4,
}

#: Search, freeze and finetune in one run of twelve steps.
ONE_RUN = {
    "search_steps": 5,
    "finetune_learning_rate": 2e-4,
    "assignment_learning_rate": 1e-2,
    "assignment_temperature": 0.25,
    "lr_scheduler_type": "linear",
    "eval_strategy": "epoch",
    **ALL_LOSSES,
}


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step
