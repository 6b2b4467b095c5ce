"""`QuantformerTrainer`: a transformers Trainer with the method's losses and the search-then-freeze schedule."""

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel

from .attention import ATTENTION_IMPLEMENTATION, capture_attention
from .augmentation import Collator
from .callbacks import AnnealAssignmentCallback, FreezeGroupsCallback
from .image_trainer import ImageTrainer
from .labels import one_class_an_image
from .losses import (
    assignment_entropy,
    attention_rank_consistency,
    entropy_matching_degree,
    evenly_spaced_rows,
    feature_distillation,
    logit_distillation,
    mean_row_entropy,
)
from .model_card import add_to_model_card
from .ops import scale_gradient
from .parameter_groups import move_by_bits, move_to_own_group
from .pretrained import QuantformerPreTrainedModel
from .quantize import blocks, searched_quantizers
from .quantizers import ActivationQuantizer, WeightQuantizer
from .resumable_trainer import ResumableTrainer
from .schedule import schedule_with_freeze
from .stochastic_depth import stochastic_depth
from .teachers import check_is_teacher, check_teacher, hidden_states_for
from .training_args import QuantformerTrainingArguments, check_training_arguments


logger = logging.getLogger(__name__)

#: The adaptive concentration degree is looked at every so many steps, ...
DEGREE_STEPS = 10

#: ... moves so far towards the batch's own, ...
DEGREE_MOMENTUM = 0.2

#: ... and so many rows of each layer's attention maps, over all processes, are looked at.
DEGREE_ROWS = 512


class QuantformerTrainer(ResumableTrainer, ImageTrainer):
    """Trains a quantized model in any stage, and a full-precision one as `Trainer` does.

    Args:
        teacher: the full-precision model. It is put on the device, frozen and in eval mode; it is neither saved, nor
            wrapped for distributed training, nor trained.
        kwargs: as for `transformers.Trainer`; `args` is a `QuantformerTrainingArguments`.
    """

    args: QuantformerTrainingArguments
    # The losses are means over a micro-batch: Trainer is to divide by the number of accumulation steps.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        model: PreTrainedModel,
        args: QuantformerTrainingArguments,
        teacher: PreTrainedModel | None = None,
        **kwargs,
    ):
        check_training_arguments(args)
        check_is_teacher(teacher, model)
        if args.unused_gpus > 0:
            gpus = args.unused_gpus + 1
            logger.warning(
                f"there are {gpus} GPUs, and one process uses one of them: start `accelerate launch --num_processes {gpus}`"
                f" for all"
            )
        if args.search_steps > 0:
            # After the freeze the assignment logits get no gradient, which DDP must not wait for.
            args.ddp_find_unused_parameters = True
        super().__init__(model=model, args=args, **kwargs)
        if isinstance(model, QuantformerPreTrainedModel) and isinstance(self.processing_class, BaseImageProcessor):
            # Trainer saves it after the model, whose card tells of it.
            model.image_processor = self.processing_class
        self.teacher = None
        if teacher is not None:
            teacher.set_attn_implementation(ATTENTION_IMPLEMENTATION)
            teacher.requires_grad_(False).eval()
            self.teacher = self.accelerator.prepare_model(teacher, evaluation_mode=True)
        if args.search_steps > 0 and self._is_sharded():
            raise ValueError(
                f"search_steps is {args.search_steps}, and FSDP or DeepSpeed hold parameters that the freeze would remove:"
                f" run the stages search and finetune one after the other"
            )
        self.add_callback(AnnealAssignmentCallback())
        if args.search_steps > 0:
            self.add_callback(FreezeGroupsCallback(self._announce_stage))
        self._term_sums: dict[str, Tensor] = {}
        self._term_count = 0
        self._last_shares: dict[str, Tensor] = {}
        self._last_terms: dict[str, Tensor] = {}

    def train(self, *args, **kwargs):
        """As in Trainer.

        Raises:
            ValueError: a loss that compares with a teacher, and no teacher, or one that cannot be compared; `search_steps`,
                and a model that does not search.
        """
        quantized = self._quantized_model()
        if quantized is not None and self.args.needs_teacher and self.teacher is None:
            raise ValueError(
                "aux_weight, distillation_weight and feature_weight compare with a teacher: pass teacher=..., or set all"
                " to 0"
            )
        if quantized is not None and self.args.needs_teacher:
            check_teacher(quantized, self.accelerator.unwrap_model(self.teacher), self.args)
        if quantized is not None and quantized.config.stage == "packed":
            raise ValueError("integer codes cannot be trained: run model.unpack() first")
        if self.args.search_steps > 0 and (quantized is None or quantized.config.stage == "pretrain"):
            raise ValueError("search_steps needs a model in the stage 'search': run model.begin_search() first")
        if self.args.assignment_temperature < 1 and self._searches() and self.is_deepspeed_enabled:
            raise ValueError(
                f"assignment_temperature is {self.args.assignment_temperature}, and DeepSpeed holds the assignment where it"
                f" cannot be annealed: set it to 1"
            )
        with self._damped_gradients(quantized), stochastic_depth(self.model, self.args.drop_path_rate):
            return super().train(*args, **kwargs)

    @contextlib.contextmanager
    def _damped_gradients(self, quantized: QuantformerPreTrainedModel | None) -> Iterator[None]:
        """Scale what each block hands back to the one before it by `block_gradient_scale`."""
        factor = self.args.block_gradient_scale
        damped = blocks(quantized) if quantized is not None and factor < 1 else []

        def damp(module: nn.Module, arguments: tuple) -> tuple:
            return (scale_gradient(arguments[0], factor), *arguments[1:])

        handles = [block.register_forward_pre_hook(damp) for block in damped]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    # Losses

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """As in Trainer while evaluating; while training, the task's loss plus the weighted terms of the method."""
        quantized = self._quantized_model()
        if not model.training or quantized is None:
            loss, outputs = self._task_loss(model, inputs)
            self._last_terms = {"task": loss.detach()}
            return (loss, outputs) if return_outputs else loss
        capture = capture_attention if self.args.aux_weight > 0 else lambda model: contextlib.nullcontext([])
        wants_features = self.args.feature_weight > 0
        if wants_features:
            inputs = inputs | {"output_hidden_states": True}
        with capture(quantized) as student_maps:
            task_loss, outputs = self._task_loss(model, inputs)
        if self.args.needs_teacher:
            with torch.no_grad(), capture(self.teacher) as teacher_maps:
                taught = self.teacher(pixel_values=inputs["pixel_values"], output_hidden_states=wants_features)

        terms = {"task": self.args.task_weight * task_loss}
        if self.args.aux_weight > 0:
            images = len(inputs["pixel_values"])
            degrees = self._concentration_degrees(quantized, student_maps, teacher_maps, images)
            terms["attention"] = self.args.aux_weight * attention_rank_consistency(
                student_maps, teacher_maps, degrees, images
            )
        if self.args.distillation_weight > 0:
            terms["distillation"] = self.args.distillation_weight * logit_distillation(
                outputs.logits, taught.logits, self.args.distillation_temperature
            )
        if wants_features:
            teacher = self.accelerator.unwrap_model(self.teacher)
            features = hidden_states_for(quantized, teacher, taught.hidden_states)
            terms["features"] = self.args.feature_weight * feature_distillation(outputs.hidden_states, features)
        if self.args.dm_weight > 0 and quantized.config.stage == "search":
            probabilities = [quantizer.assignment_probabilities() for quantizer in searched_quantizers(quantized)]
            terms["assignment"] = self.args.dm_weight * assignment_entropy(probabilities)
        terms |= self._more_terms()
        loss = torch.stack(list(terms.values())).sum()
        self._last_terms = {name: term.detach() for name, term in terms.items()}
        self._record(terms, quantized)
        return (loss, outputs) if return_outputs else loss

    def _more_terms(self) -> dict[str, Tensor]:
        """Weighted loss terms of a subclass, by name."""
        return {}

    def _task_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Trainer's loss, or the cross-entropy with the soft labels `(batch, classes)` of a mixed batch, and the outputs.

        The models themselves would take soft labels for those of a multi-label problem, and a DeiT of transformers with two
        classifiers takes none at all.
        """
        labels = inputs.get("labels")
        if labels is None and model.training and self.args.task_weight == 0:
            # From the teacher alone.
            outputs = model(**inputs)
            return outputs.logits.new_zeros(()), outputs
        if labels is None and model.training:
            raise ValueError(
                f"the training images have no labels, and task_weight is {self.args.task_weight}: set it to 0 to learn from"
                f" the teacher alone"
            )
        mixed = labels is not None and self._are_mixed(labels)
        if labels is None or (self._model_takes_labels and not mixed):
            return super().compute_loss(model, inputs, return_outputs=True)
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        # Those of a mixed batch are smooth already.
        smoothing = 0.0 if mixed else self.args.label_smoothing_factor
        return F.cross_entropy(outputs.logits.float(), labels, label_smoothing=smoothing), outputs

    def _are_mixed(self, labels: Tensor) -> bool:
        """Whether these are shares of classes, one of which an image has. Others may be of several classes an image."""
        config, collator = self.model.config, self.data_collator
        told = config.problem_type is not None or (isinstance(collator, Collator) and collator.mixup is not None)
        return labels.is_floating_point() and labels.ndim == 2 and one_class_an_image(config) and told

    def _concentration_degrees(
        self,
        quantized: QuantformerPreTrainedModel,
        student_maps: list[Tensor],
        teacher_maps: list[Tensor],
        images: int,
    ) -> Tensor:
        """p of each layer, `(layers,)`: the fixed one, or the running average of the entropy-adaptive one."""
        degrees = quantized.concentration_degree
        if self.args.pnorm != "entropy":
            return torch.full_like(degrees, float(self.args.pnorm))
        if self.state.global_step % DEGREE_STEPS == 0 and self.accelerator.sync_gradients:
            # The same rows however the images are spread over processes, and on each of them.
            rows_per_image = max(1, DEGREE_ROWS // (images * self.accelerator.num_processes))
            found = []
            for pair in zip(student_maps, teacher_maps, strict=True):
                rows = [self.accelerator.gather(evenly_spaced_rows(maps, images, rows_per_image)) for maps in pair]
                found.append(entropy_matching_degree(rows[1], mean_row_entropy(rows[0])))
            degrees.lerp_(torch.stack(found).to(degrees), DEGREE_MOMENTUM)
        # The loss must not see the change that the next step makes in place.
        return degrees.clone()

    def training_step(self, *args, **kwargs) -> Tensor:
        """As in Trainer.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        loss = super().training_step(*args, **kwargs)
        # Where Trainer looks at it too: to wait for the device between the forward and the backward pass takes time.
        self._check_finite(loss, self._last_terms)
        return loss

    def _check_finite(self, loss: Tensor, terms: dict[str, Tensor]) -> None:
        if not torch.isfinite(loss):
            values = ", ".join(f"{name} {term.item():g}" for name, term in terms.items())
            raise FloatingPointError(
                f"the loss of step {self.state.global_step + 1} is not finite ({values}): lower the learning rate or the"
                f" weight of that term, in another output_dir; checkpoints from before are in {self.args.output_dir}"
            )

    def _quantized_model(self) -> QuantformerPreTrainedModel | None:
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model if isinstance(model, QuantformerPreTrainedModel) else None

    # Logging

    def _record(self, terms: dict[str, Tensor], quantized: nn.Module) -> None:
        """Add up the terms as tensors; nothing is read from the device before the next log."""
        for name, term in terms.items():
            self._term_sums[name] = self._term_sums.get(name, 0) + term.detach()
        self._term_count += 1
        # Sharded parameters are not what the graph holds: no gradient could be taken with respect to them. Nor can that of a
        # single term where a block is computed again by a backward pass of its own.
        every = 0 if self._is_sharded() or self.args.reenters else self.args.gradient_share_steps
        if len(terms) > 1 and every > 0 and self.state.global_step % every == 0 and self.accelerator.sync_gradients:
            self._last_shares = self._gradient_shares(terms, quantized)

    def _gradient_shares(self, terms: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Norm of each term's own gradient, over the sum of those norms: an idle loss shows as a share near zero."""
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norms = {}
        # What depends on frozen parameters alone has no gradient.
        for name, term in ((name, term) for name, term in terms.items() if term.requires_grad):
            gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
            norms[name] = torch.nn.utils.get_total_norm([g for g in gradients if g is not None])
        total = torch.stack(list(norms.values())).sum().clamp_min(1e-30)
        return {name: norm / total for name, norm in norms.items()}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each loss term since the last log, and the last shares of the gradient."""
        quantized = self._quantized_model()
        if quantized is not None and "loss" in logs:
            if self._term_count:
                names = list(self._term_sums)
                means = torch.stack([self._term_sums[name] for name in names]) / self._term_count
                for name, mean in zip(names, self.accelerator.reduce(means, reduction="mean").tolist(), strict=True):
                    logs[f"loss_{name}"] = mean
                self._term_sums, self._term_count = {}, 0
            for name, share in self._last_shares.items():
                logs[f"gradient_share_{name}"] = share.item()
            self._last_shares = {}
            if self.args.aux_weight > 0 and self.args.pnorm == "entropy":
                logs["concentration_degree"] = quantized.concentration_degree.mean().item()
        super().log(logs, start_time)

    def _announce_stage(self, stage: str) -> None:
        logger.info(f"step {self.state.global_step}: the model goes to the stage '{stage}'")
        for callback in self.callback_handler.callbacks:
            if hasattr(callback, "on_stage_switch"):
                callback.on_stage_switch(self.args, self.state, self.control, stage=stage, model=self.model)

    # Optimizer and schedule

    def create_model_card(self, language=None, license=None, tags=None, **kwargs) -> None:
        """As in Trainer for a full-precision model; a quantized one has its own card, which takes these three over."""
        if not isinstance(self.accelerator.unwrap_model(self.model), QuantformerPreTrainedModel):
            super().create_model_card(language=language, license=license, tags=tags, **kwargs)
        elif self.is_world_process_zero():
            add_to_model_card(self.args.output_dir, tags, language=language, license=license)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """No weight decay on scales, offsets and assignment logits."""
        quantizer_parameters = {
            f"{prefix}.{name}"
            for prefix, module in model.named_modules()
            if isinstance(module, ActivationQuantizer | WeightQuantizer)
            for name, _ in module.named_parameters()
        }
        return [name for name in super().get_decay_parameter_names(model) if name not in quantizer_parameters]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As in Trainer, with groups of their own for weights by their bits, for scales and offsets, and for the assignment
        logits, the last.

        A run that was resumed after its freeze has no logits left: parameters without gradient keep their places, so
        that the optimizer's state, saved before or after the freeze, fits.
        """
        quantized = self._quantized_model()
        if self.optimizer is not None or quantized is None:
            return super().create_optimizer(model)
        optimizer = super().create_optimizer(model)
        model = self.model if model is None else model
        args = self.args
        move_by_bits(optimizer, model, args.learning_rate_per_bit)
        if args.scale_learning_rate is not None:
            scales = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and name.rpartition(".")[2] in ("scale", "offset")
            ]
            move_to_own_group(optimizer, scales, args.scale_learning_rate)
        if self._searches():
            logits = []
            for quantizer in searched_quantizers(model):
                shape = quantizer.scale.numel(), quantizer.channels
                placeholder = nn.Parameter(torch.zeros(shape, device=quantizer.scale.device), requires_grad=False)
                logits.append(getattr(quantizer, "assignment_logits", placeholder))
            move_to_own_group(optimizer, logits, args.assignment_learning_rate)
        return optimizer

    def _searches(self) -> bool:
        quantized = self._quantized_model()
        return quantized is not None and (quantized.config.stage == "search" or self.args.search_steps > 0)

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As in Trainer; with `search_steps`, one schedule up to the freeze and a second one after it."""
        if self.lr_scheduler is not None or self.args.search_steps <= 0:
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = schedule_with_freeze(optimizer, self.args, num_training_steps)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # Checkpoints

    def _unlogged(self) -> dict[str, Any]:
        terms = {
            name: self.accelerator.reduce(total.clone(), reduction="mean").item()
            for name, total in self._term_sums.items()
        }
        shares = {name: share.item() for name, share in self._last_shares.items()}
        return super()._unlogged() | {"terms": terms, "term_count": self._term_count, "shares": shares}

    def _restore_unlogged(self, unlogged: dict[str, Any]) -> None:
        super()._restore_unlogged(unlogged)
        self._term_sums = {name: torch.tensor(t, device=self.args.device) for name, t in unlogged["terms"].items()}
        self._term_count = unlogged["term_count"]
        self._last_shares = {name: torch.tensor(share) for name, share in unlogged["shares"].items()}
