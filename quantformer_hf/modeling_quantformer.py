"""Quantized ViT, DeiT and Swin image classifiers with the life of any other transformers model."""

import contextlib
import logging
from typing import Self

import torch
from torch import Tensor, nn
from transformers import (
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedConfig,
    PreTrainedModel,
    SwinForImageClassification,
    ViTForImageClassification,
)
from transformers.modeling_outputs import ImageClassifierOutput, ModelOutput

from . import pack, quantize
from .attention import ATTENTION_IMPLEMENTATION, attention_modules
from .checkpoints import load_full_precision, origin_of
from .classes_only import classes_only
from .configuration_quantformer import (
    BACKBONES,
    QUANTIZATION_ARGUMENTS,
    QuantformerConfig,
    check_no_misspelling,
    check_quantization_arguments,
)
from .image_batches import Batches, check_given
from .image_processors import image_processor_of
from .labels import classification_loss
from .model_refit import reconstruct
from .packed_checkpoint import DIGEST_NAME
from .packing import DIGEST_BYTES, LAYOUT_VERSION
from .pretrained import QuantformerPreTrainedModel
from .rotation import UNROTATED_BITS, rotate_stream
from .run_history import note_change


logger = logging.getLogger(__name__)

#: Class of the backbone by `model_type`; a DeiT with a distillation head has a class of its own.
BACKBONE_CLASSES = {
    "vit": ViTForImageClassification,
    "deit": DeiTForImageClassification,
    "swin": SwinForImageClassification,
}


class StageError(RuntimeError):
    """A verb, or a checkpoint, that does not belong to the stage that the model is in."""


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """The image classifier of `config`, with initial weights, that runs the attention function of this package."""
    backbone_class = BACKBONE_CLASSES[config.model_type]
    if DeiTForImageClassificationWithTeacher.__name__ in (config.architectures or ()):
        backbone_class = DeiTForImageClassificationWithTeacher
    # The dtype that the caller builds in, not the one that the full-precision checkpoint's config remembers.
    dtype = torch.get_default_dtype()
    return backbone_class._from_config(config, attn_implementation=ATTENTION_IMPLEMENTATION, dtype=dtype)


class QuantformerForImageClassification(QuantformerPreTrainedModel):
    """A ViT, DeiT or Swin image classifier with low-bit weights and activations.

    `backbone` is the stock transformers model whose layers carry quantizers. Five verbs make its life:
    `from_full_precision`, `calibrate`, `begin_search`, `freeze_groups` and `pack`; `reconstruct` may follow `calibrate` and
    the two after it, and `unpack` is the way back from the last. Each works in place, returns
    the model, and says which verb is missing when it comes out of order.
    """

    #: `loss` is a mean over what one pass is given: Trainer is to divide by the number of accumulation steps.
    accepts_loss_kwargs = False

    def __init__(self, config: QuantformerConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        # What was given to from_pretrained() reaches the config after it was made.
        config.tell_backbone()
        self.backbone = build_backbone(config.backbone_config)
        quantize.quantize_model(self.backbone, config)
        self.backbone.register_load_state_dict_post_hook(pack.prepare_anew)
        # p of each attention block's consistency loss, where it adapts (`losses.py`): part of the training state.
        self.register_buffer("concentration_degree", torch.ones(len(attention_modules(self.backbone))))
        # What the file was quantized to, so that a config of other bits is found out.
        self.register_buffer("bit_widths", self.expected_bit_widths())
        self._set_digest()
        self.post_init()

    def _set_digest(self) -> None:
        """The tensor that a packed model's file has, and no other stage's; `save_pretrained` fills it."""
        if self.config.stage == "packed":
            self.register_buffer(DIGEST_NAME, torch.zeros(DIGEST_BYTES, dtype=torch.uint8, device=self.device))
        elif hasattr(self, DIGEST_NAME):
            delattr(self, DIGEST_NAME)

    def expected_bit_widths(self) -> Tensor:
        """The bit width of each quantizer in the order of the modules, `(quantizers,)`, uint8."""
        return torch.tensor(list(quantize.bit_widths(self.backbone).values()), dtype=torch.uint8, device="cpu")

    def check_bit_widths(self, source: str) -> None:
        """Raise ValueError if the loaded bit widths are not those of the config."""
        for (name, expected), found in zip(
            quantize.bit_widths(self.backbone).items(), self.bit_widths.tolist(), strict=True
        ):
            if expected != found:
                raise ValueError(
                    f"layer '{name}' of the checkpoint '{source}' has {found} bits, and its config says {expected}:"
                    f" restore the config.json that was saved with it"
                )

    def get_input_embeddings(self) -> nn.Module:
        return self.backbone.get_input_embeddings()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs,
    ) -> ImageClassifierOutput:
        """
        Args:
            pixel_values: `(batch, channels, height, width)`.
                Of an image with a value that is not finite, which quantizers would take for another one, logits are NaN
                (in an exported graph they are not).
            labels: `(batch,)`, class indices, or what `problem_type` asks for. With them, there is a `loss`
                (`labels.classification_loss`).
            interpolate_pos_encoding: for images of another size than the model was made for.

        Raises:
            TypeError: no `pixel_values`.
            ValueError: a label outside `num_labels`.
            RuntimeError: a layer that was not calibrated; a packed model that is to be trained.
        """
        check_given(pixel_values)
        return_dict = kwargs.pop("return_dict", None)
        # What transformers asks for by the config, it asks for of a model's own.
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name) is None and getattr(self.config, name):
                kwargs[name] = True
        logits = hidden_states = attentions = None
        whole = getattr(self.backbone, "whole", None)
        if whole is not None and not interpolate_pos_encoding:
            logits = whole.run(self.backbone, pixel_values, kwargs)
        if logits is None:
            outputs = self._run_modules(pixel_values, interpolate_pos_encoding, **kwargs)
            logits, hidden_states, attentions = outputs.logits, outputs.hidden_states, outputs.attentions
            if pixel_values.is_floating_point() and not torch.compiler.is_exporting():
                # Where a value is not finite, one of these is not either, and they take less time than a look at each.
                flat = pixel_values.flatten(1)
                finite = flat.amin(1, keepdim=True).isfinite() & flat.amax(1, keepdim=True).isfinite()
                logits = logits.masked_fill(~finite.to(logits.device), torch.nan)
        if labels is not None and self.config.stage == "packed" and self.training and torch.is_grad_enabled():
            raise StageError("integer codes cannot be trained: run model.unpack() first")
        loss = None if labels is None else classification_loss(logits.float(), labels, self.config)
        result = ImageClassifierOutput(loss=loss, logits=logits, hidden_states=hidden_states, attentions=attentions)
        return result.to_tuple() if return_dict is False else result

    def _run_modules(self, pixel_values: Tensor | None, interpolate_pos_encoding: bool, **kwargs) -> ModelOutput:
        packed = self.config.stage == "packed"
        wants_states = kwargs.get("output_hidden_states") or self.backbone.config.output_hidden_states
        # A traced graph has all tokens.
        shortens = packed and not wants_states and not torch.compiler.is_compiling()
        # Integers have no gradient.
        gradients = torch.set_grad_enabled(torch.is_grad_enabled() and not packed)
        with gradients, classes_only(self.backbone) if shortens else contextlib.nullcontext():
            return self.backbone(
                pixel_values=pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, return_dict=True, **kwargs
            )

    @classmethod
    def from_full_precision(cls, model: PreTrainedModel | str, **kwargs) -> Self:
        """A quantized copy, not yet calibrated, of a full-precision image classifier, in the same mode (`train()` or not).

        Args:
            model: a ViT, DeiT or Swin image classifier of transformers, or what `load_full_precision` takes: a hub id or
                folder of transformers, a name, folder or file of timm, an official DeiT or Swin file. The log says which
                it was. Loaded so, it is in `eval()`. `image_processor` holds the preprocessing of its checkpoint, saved
                beside the model.
            kwargs: quantization arguments (the fields of `QuantformerConfig`: `bit_width`, `attention_bits`,
                `layer_bits`, ...). With a name or path, anything else goes to `load_full_precision` (`image_size`,
                `id2label`, `ignore_mismatched_sizes`, `revision`, ...).

        Raises:
            TypeError: a model of another kind, or an unknown quantization argument.
            ValueError: a quantization argument that cannot be.
        """
        arguments = {name: kwargs.pop(name) for name in list(kwargs) if name in QUANTIZATION_ARGUMENTS}
        # Of what torch.compile has made.
        model = getattr(model, "_orig_mod", model)
        if isinstance(model, nn.Module):
            check_quantization_arguments(kwargs)
            processor = image_processor_of(model)
        else:
            check_no_misspelling(kwargs)
            checkpoint = load_full_precision(model, **kwargs)
            logger.info(f"{model}: {checkpoint.form}")
            model, processor = checkpoint.model, checkpoint.processor
        if isinstance(model, QuantformerPreTrainedModel):
            raise TypeError("the model is quantized already: load it with from_pretrained")
        model_type = getattr(getattr(model, "config", None), "model_type", None)
        if model_type not in BACKBONES or not getattr(model, "num_labels", 0):
            raise TypeError(
                f"{type(model).__name__} is not supported: give an image classifier of transformers, of one of"
                f" {', '.join(BACKBONES)}, or the name of a model of timm in its place"
            )
        backbone_config = model.config.to_dict() | {"architectures": [type(model).__name__]}
        config = QuantformerConfig(
            backbone_config=backbone_config, full_precision_name_or_path=origin_of(model), **arguments
        )
        quantized = cls(config)
        # Layers keep the names of their parameters: only the quantizers' own are not in the full-precision model.
        left_over = quantized.backbone.load_state_dict(model.state_dict(), strict=False).unexpected_keys
        if left_over:
            raise TypeError(f"{type(model).__name__} has parameters that its config does not explain: {left_over}")
        quantized.image_processor = processor
        return quantized.to(device=model.device).train(model.training)

    def calibrate(
        self,
        batches: Batches,
        centre_channels: bool = True,
        rotate_channels: bool | None = None,
    ) -> Self:
        """Set scales and offsets from data.

        Args:
            batches: `pixel_values` `(batch, channels, height, width)`, or dictionaries that hold them; one
                batch need not be in a list. A few dozen images are enough for a start.
            centre_channels: shift channels towards each other first, where biases on both sides can hold the shift
                (`folding.py`). What the model computes in full precision stays the same.
            rotate_channels: before that, in a ViT or DeiT, spread outlying channels of the residual stream over all others
                (`rotation.py`). Logits in full precision stay the same, and hidden states are rotated. By default unless
                all that the blocks' linears read has two bits, where training does better without.

        Raises:
            StageError: not in the stage `pretrain`.
            TypeError, ValueError: what is no batch of images.
            RuntimeError: a layer that no batch reached, or that saw values that are not finite.
        """
        self._require_stage("calibrate", "pretrain")
        if rotate_channels is None:
            rotate_channels = quantize.widest_inputs(self) > UNROTATED_BITS
        rotates = rotate_channels and not self.config.channels_rotated
        before = {name: tensor.clone() for name, tensor in self.state_dict().items()} if rotates else {}
        try:
            rotated = rotates and rotate_stream(self.backbone)
            quantize.calibrate(self, batches, centre_channels)
        except BaseException:
            # Batches that are no good change nothing.
            self.load_state_dict(before, strict=False)
            raise
        self.config.calibrated = True
        self.config.channels_rotated |= rotated
        note_change(self.config)
        return self

    def reconstruct(self, batches: Batches) -> Self:
        """Refit scales, weights and the classifier, layer by layer, to the quantized model's activations, without training.

        Parameters that are frozen (`requires_grad`) are refitted as the others.

        It may follow `calibrate`, `begin_search` or `freeze_groups`, and changes no stage. Layers whose weight quantizer
        is neither `lsq` nor `lsq_shifted` keep their weights, and channels stay in their groups. A classifier whose
        `problem_type` is not that of one class an image is left as it is.

        Args:
            batches: as in `calibrate`. The presets take 256 images (`ptq`) and 1,024 (`lightning`, `best`).

        Raises:
            StageError: not calibrated, or packed.
            TypeError, ValueError: no batch, or no batch of images that are finite; a model made under `inference_mode`.
            torch.OutOfMemoryError: too many images for the GPU; layers before that are refitted.
        """
        if not self.config.calibrated:
            raise StageError("reconstruct() needs a calibrated model: run model.calibrate(batches) first")
        if self.config.stage == "packed":
            raise StageError("reconstruct() changes weights, and the model is packed: run model.unpack() first")
        reconstruct(self, batches)
        note_change(self.config)
        return self

    def begin_search(self, num_groups: int | None = None, batches: Batches | None = None) -> Self:
        """Go to the stage `search`: soft assignment of channels to groups, started by k-means on their ranges.

        Args:
            num_groups: G; by default the config's.
            batches: as in `calibrate`, to look at the channels' ranges anew, after training. By default groups come from
                those that `calibrate` saw in full precision, the better choice where nothing was trained.

        Raises:
            StageError: not calibrated, or not in the stage `pretrain`.
            ValueError: `num_groups` that is no number from 1 to 255, or more than some layer has channels.
        """
        self._require_stage("begin_search", "pretrain")
        if not self.config.calibrated:
            raise StageError("begin_search() needs a calibrated model: run model.calibrate(batches) first")
        num_groups = self.config.num_groups if num_groups is None else num_groups
        twin_levels = self.config.twin_levels is not False
        quantize.begin_search(self, num_groups, batches, twin_levels)
        self.config.num_groups, self.config.whole_multiples, self.config.twin_levels = num_groups, True, twin_levels
        self.config.stage = "search"
        note_change(self.config)
        return self

    def freeze_groups(self) -> Self:
        """Go to the stage `finetune`: each channel keeps the group of its largest assignment logit.

        Raises:
            StageError: not in the stage `search`.
        """
        self._require_stage("freeze_groups", "search")
        quantize.freeze_groups(self)
        self.config.stage = "finetune"
        note_change(self.config)
        return self

    def pack(self) -> Self:
        """Go to the stage `packed`: integer codes in the place of every quantized weight (`packing.py`), for inference.

        The logits of inference (`eval()`, no gradients) stay what they were, bit for bit. No full-precision copy of a
        weight is kept: layers multiply codes (`kernels/`), and there are no gradients.

        Raises:
            StageError: not in the stage `finetune`.
        """
        self._require_stage("pack", "finetune")
        pack.pack(self.backbone)
        self._go_to_packed(True)
        return self.eval()

    def unpack(self) -> Self:
        """Go back to the stage `finetune`, to train on: the weights are the centres of their levels, and all are trainable.

        Raises:
            StageError: not in the stage `packed`.
        """
        self._require_stage("unpack", "packed")
        pack.unpack(self.backbone, self.config)
        self._go_to_packed(False)
        return self

    def kernel_info(self) -> dict[str, str]:
        """What serves each packed layer and attention block on the device that the model is on, by its name.

        Raises:
            StageError: not in the stage `packed`.
        """
        self._require_stage("kernel_info", "packed")
        return pack.describe_kernels(self)

    def _go_to_packed(self, packed: bool) -> None:
        self.config.stage = "packed" if packed else "finetune"
        self.config.packing_layout = LAYOUT_VERSION if packed else None
        self._set_digest()

    def follow_stage(self, saved: QuantformerConfig) -> None:
        """Take the shape of a checkpoint that is about to be loaded: it may have been saved after the freeze.

        Raises:
            StageError: the checkpoint is of a stage that this model does not lead to.
        """
        if saved.stage != self.config.stage and (self.config.stage, saved.stage) != ("search", "finetune"):
            raise StageError(
                f"the checkpoint is in the stage '{saved.stage}', and the model in '{self.config.stage}': load the model"
                f" that the run started from"
            )
        quantize.follow_groups(self, saved)
        # An older version may have saved it, whose groups or channels lie otherwise.
        for name in ("stage", "whole_multiples", "twin_levels", "channels_rotated"):
            setattr(self.config, name, getattr(saved, name))

    def _require_stage(self, verb: str, stage: str) -> None:
        now = self.config.stage
        if now == stage:
            return
        ways_out = {
            ("freeze_groups", "pretrain"): "run model.begin_search() first",
            ("freeze_groups", "finetune"): "the groups are frozen already",
            ("pack", "pretrain"): "run model.begin_search() and model.freeze_groups() first",
            ("pack", "search"): "run model.freeze_groups() first",
            ("pack", "packed"): "it is packed already",
            ("kernel_info", "pretrain"): "run model.begin_search(), model.freeze_groups() and model.pack() first",
            ("kernel_info", "search"): "run model.freeze_groups() and model.pack() first",
            ("kernel_info", "finetune"): "run model.pack() first",
            ("unpack", "pretrain"): "there is nothing to unpack",
            ("unpack", "search"): "there is nothing to unpack",
            ("unpack", "finetune"): "there is nothing to unpack",
            ("begin_search", "search"): "the search has begun already",
        }
        way_out = ways_out.get((verb, now), f"{verb}() comes before that; start again from the pretrained checkpoint")
        raise StageError(f"{verb}() needs the stage '{stage}', and the model is in '{now}': {way_out}")
