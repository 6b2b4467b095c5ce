"""Arguments of a training stage."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from .bad_images import BAD_IMAGE_POLICIES


#: What `to_dict` has in the place of any token, or of none.
HIDDEN_TOKEN = "<HUB_TOKEN>"


@dataclass
class QuantformerTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` and what the losses and the search need.

    Raises:
        ValueError: a weight below zero, a `block_gradient_scale` outside (0, 1], a `pnorm` that is neither a number of at
            least 1 nor `entropy`, a `search_steps` that leaves nothing to finetune, or another value out of its range;
            a `hub_token`, and what this trainer cannot do.
    """

    aux_weight: float = field(
        default=0.0, metadata={"help": "Weight of the self-attention rank consistency loss. Needs a teacher."}
    )
    dm_weight: float = field(
        default=0.0, metadata={"help": "Weight of the assignment entropy, in the search stage only."}
    )
    pnorm: str = field(
        default="entropy",
        metadata={"help": "Concentration degree of the teacher's attention maps: a number, or 'entropy' to adapt it."},
    )
    distillation_weight: float = field(
        default=0.0, metadata={"help": "Weight of the logit distillation loss. Needs a teacher."}
    )
    distillation_temperature: float = field(default=1.0, metadata={"help": "Temperature of the logit distillation."})
    feature_weight: float = field(
        default=0.0, metadata={"help": "Weight of the hidden states' distance from the teacher's. Needs a teacher."}
    )
    block_gradient_scale: float = field(
        default=1.0,
        metadata={
            "help": "Factor on the gradient that a block hands to the one before it, in (0, 1]. Below 1, a block listens"
            " more to the loss terms near it: straight-through gradients are worth less with each block they pass."
        },
    )
    task_weight: float = field(default=1.0, metadata={"help": "Weight of the cross-entropy with the labels."})
    assignment_learning_rate: float = field(
        default=1e-4, metadata={"help": "Learning rate of the assignment logits, in the search stage."}
    )
    assignment_temperature: float = field(
        default=1.0,
        metadata={
            "help": "What the assignment logits are divided by in the course of the search, by the same factor each step:"
            " the nearer to 0, the less freezing changes. 1: only dm_weight sharpens the assignment."
        },
    )
    scale_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of scales and offsets. They are small numbers, of which Adam's steps are a large"
            " share. Default: learning_rate."
        },
    )
    learning_rate_per_bit: float = field(
        default=1.0,
        metadata={
            "help": "Factor on the learning rate of a layer's weights for each bit that they have below four: their levels"
            " lie further apart, and each is a longer way. 1: the same for all."
        },
    )
    search_steps: int = field(
        default=-1,
        metadata={
            "help": "Freeze the groups after this many optimizer steps and go on finetuning in the same run, in the stage"
            " search alone. -1: search to the end, and freeze afterwards."
        },
    )
    finetune_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate after the freeze of search_steps. Default: learning_rate."}
    )
    drop_path_rate: float | None = field(
        default=None,
        metadata={
            "help": "Stochastic depth: probability with which the last block drops a branch, 0.1 in DeiT. Default: the"
            " checkpoint's own, which only Swin has."
        },
    )
    ema_decay: float = field(
        default=0.0,
        metadata={"help": "Decay of an average of the weights, which is evaluated and kept; 0.99996 in DeiT. 0: none."},
    )
    repeated_augmentation: int = field(
        default=1, metadata={"help": "Draws of an image in an epoch, which draws fewer images then. 3 in DeiT."}
    )
    balance_classes: bool = field(
        default=False,
        metadata={
            "help": "Draw all classes equally often, in training and for calibration, however many images each has. An epoch"
            " keeps its length."
        },
    )
    on_bad_image: str = field(
        default="skip",
        metadata={
            "help": "Of an image that cannot be decoded: 'skip' takes another one and reports it, unless they are more"
            " than one in a hundred; 'error' stops."
        },
    )
    gradient_share_steps: int = field(
        default=500,
        metadata={
            "help": "Log each loss term's share of the gradient's norm every so many steps. 0: never, as with FSDP,"
            " DeepSpeed or reentrant checkpoints."
        },
    )
    # In the order of TrainingArguments: HfArgumentParser reads no other.
    report_to: None | str | list[str] = field(  # noqa: RUF036  see above
        default="tensorboard",
        metadata={"help": "Trackers of the log, such as tensorboard, wandb, trackio or none; TensorBoard by default."},
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop columns that the model does not take. Image transforms need them."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide losses that are not finite. Here they stop the training instead."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.hub_token == HIDDEN_TOKEN:
            self.hub_token = None
        if self.hub_token is not None:
            raise ValueError(
                "hub_token would be written to training_args.bin, which is pushed: set HF_TOKEN, or `hf auth login`"
            )
        # Of flyte transformers does not say.
        absent = {*self.report_to} & {*INTEGRATION_TO_CALLBACK} - {*get_available_reporting_integrations(), "flyte"}
        if absent:
            raise ValueError(
                f"report_to names {', '.join(sorted(absent))}, not installed here: install it, or leave it out"
            )
        for name in ("bf16_full_eval", "fp16_full_eval"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} casts the model itself, with scales and offsets, also for the training after it: leave it out;"
                    f" --{name.partition('_')[0]} computes in that type and keeps the model"
                )
        for name in ("aux_weight", "dm_weight", "distillation_weight", "feature_weight", "task_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: choose 0 (off) or more")
        rates = ("learning_rate", "scale_learning_rate", "assignment_learning_rate", "finetune_learning_rate")
        for name in (*rates, "weight_decay", "num_train_epochs"):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}: choose 0 or more")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: choose 1 or more")
        if not 0 <= self.label_smoothing_factor < 1:
            raise ValueError(
                f"label_smoothing_factor is {self.label_smoothing_factor}: choose 0 (off) or more, and less than 1"
            )
        if self.aux_weight > 0 and self.gradient_checkpointing and self.reenters:
            raise ValueError(
                "use_reentrant of gradient_checkpointing_kwargs leaves the attention maps without a gradient, which"
                " aux_weight needs: set it to False"
            )
        if not 1e-6 <= self.assignment_temperature <= 1:
            raise ValueError(f"assignment_temperature is {self.assignment_temperature}: choose from 1e-6 to 1")
        if self.assignment_temperature < 1 and self.ema_decay > 0:
            raise ValueError(
                f"assignment_temperature is {self.assignment_temperature}, and ema_decay would average assignments of all"
                f" temperatures: set the former to 1, or the latter to 0 in the search (--search.ema_decay 0)"
            )
        self._check_schedule()
        if not 0 < self.learning_rate_per_bit < float("inf"):
            raise ValueError(f"learning_rate_per_bit is {self.learning_rate_per_bit}: choose more than 0; 1 is off")
        if self.search_steps == 0:
            raise ValueError("search_steps is 0: choose at least 1, or -1 to search to the end")
        if self.search_steps > 0 and self.learning_rate == 0:
            raise ValueError("learning_rate is 0, of which search_steps has a share after the freeze: choose more")
        if self.search_steps > 0 and self.lr_scheduler_type == "reduce_lr_on_plateau":
            raise ValueError("search_steps has a schedule on each side, and reduce_lr_on_plateau none: choose another")
        if self.finetune_learning_rate is not None and self.search_steps < 0:
            raise ValueError(
                "finetune_learning_rate is for after the freeze of search_steps: give both, or learning_rate"
            )
        if self.distillation_temperature <= 0:
            raise ValueError(f"distillation_temperature is {self.distillation_temperature}: choose more than 0")
        if not 0 < self.block_gradient_scale <= 1:
            raise ValueError(
                f"block_gradient_scale is {self.block_gradient_scale}: choose more than 0 and at most 1 (off)"
            )
        if self.drop_path_rate is not None and not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"drop_path_rate is {self.drop_path_rate}: choose 0 (off) or more, and less than 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}: choose 0 (off) or more, and less than 1")
        if self.ema_decay > 0 and self.load_best_model_at_end:
            raise ValueError(
                "ema_decay ends with the averaged weights, load_best_model_at_end with others: leave out one"
            )
        if self.search_steps > 0 and self.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end may go back to before the freeze of search_steps, where the model has other tensors:"
                " leave out one, or run the stages search and finetune one after the other"
            )
        if self.ema_decay > 0 and self.save_only_model:
            raise ValueError("ema_decay cannot be resumed from checkpoints of save_only_model: leave out one")
        if self.repeated_augmentation < 1:
            raise ValueError(f"repeated_augmentation is {self.repeated_augmentation}: choose 1 (off) or more")
        if self.balance_classes and self.repeated_augmentation > 1:
            raise ValueError(
                "balance_classes and repeated_augmentation both say how often an image is drawn: leave out one"
            )
        if self.on_bad_image not in BAD_IMAGE_POLICIES:
            raise ValueError(f"on_bad_image is {self.on_bad_image!r}: choose one of {', '.join(BAD_IMAGE_POLICIES)}")
        self.pnorm = str(self.pnorm)
        if self.pnorm != "entropy":
            try:
                degree = float(self.pnorm)
            except ValueError:
                degree = 0.0
            if not 1 <= degree < float("inf"):
                raise ValueError(f"pnorm is {self.pnorm!r}: choose a finite number of at least 1, or 'entropy'")
        if 0 < self.max_steps <= self.search_steps:
            raise ValueError(
                f"search_steps is {self.search_steps}, and max_steps {self.max_steps}: leave steps to finetune after it,"
                f" or set search_steps to -1"
            )

    def _check_schedule(self) -> None:
        """Raise ValueError for a schedule that lacks a setting: it is made after minutes of calibration."""
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=self.learning_rate or 1.0)
        kind, told = self.lr_scheduler_type, self.lr_scheduler_kwargs
        try:
            get_scheduler(kind, optimizer, 0, num_training_steps=10, scheduler_specific_kwargs=dict(told or {}))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"lr_scheduler_type is {getattr(kind, 'value', kind)} with lr_scheduler_kwargs {told}: {error}"
            ) from error

    @property
    def n_gpu(self) -> int:
        """One at most: Trainer would make threads of more, which share what is remembered of one device."""
        return min(super().n_gpu, 1)

    @property
    def unused_gpus(self) -> int:
        """How many GPUs this process leaves alone."""
        return max(super().n_gpu - 1, 0)

    @property
    def reenters(self) -> bool:
        """Whether blocks that are computed again have a backward pass of their own."""
        return bool((self.gradient_checkpointing_kwargs or {}).get("use_reentrant"))

    @property
    def needs_teacher(self) -> bool:
        """Whether some loss compares with the full-precision model."""
        return self.aux_weight > 0 or self.distillation_weight > 0 or self.feature_weight > 0


def check_training_arguments(arguments: TrainingArguments) -> None:
    """Raise TypeError for those of `Trainer` itself, which lack the losses of the method."""
    if not isinstance(arguments, QuantformerTrainingArguments):
        raise TypeError(
            f"args is a {type(arguments).__name__}: give QuantformerTrainingArguments, which take the same and the losses"
        )
