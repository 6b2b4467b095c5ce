"""Loading and saving, which all quantized models share."""

import logging
import os
import re
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn
from transformers import BaseImageProcessor, PreTrainedModel
from transformers import initialization as init

from . import pack, quantize
from .checkpoint_files import shortened
from .checkpoint_layouts import is_classifier
from .checkpoint_reader import CheckpointReader
from .checkpointing import replaced_together
from .configuration_quantformer import QuantformerConfig, check_attention_implementation, check_model_type
from .image_processors import find_image_processor
from .model_card import ModelCardMixin, write_model_card
from .packed_checkpoint import DIGEST_NAME, LOCATION_ARGUMENTS, check_packed_files, digest_of_state
from .packed_layers import PackedWeight
from .quantizers import ActivationQuantizer, GroupActivationQuantizer, LSQWeightQuantizer


logger = logging.getLogger(__name__)


class QuantformerPreTrainedModel(ModelCardMixin, PreTrainedModel):
    """What the loading and saving of quantized models share."""

    #: Preprocessing of the full-precision checkpoint: saved, loaded and pushed with the model.
    image_processor: BaseImageProcessor | None = None

    config_class = QuantformerConfig
    base_model_prefix = "backbone"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    # Files from before 2026-12 have one scale and offset for the probabilities of an attention block.
    _keys_to_ignore_on_load_unexpected = [r"\.operands\.probabilities\.(scale|offset)$"]
    _no_split_modules = ["ViTLayer", "DeiTLayer", "SwinStage", "PackedViTLayer", "PackedDeiTLayer"]
    _supports_attention_backend = True
    # Quantizers stay exact under dtype=torch.bfloat16; the codes they make are the same.
    _keep_in_fp32_modules_strict = ["scale", "offset", "assignment_logits", "channel_quantiles", "concentration_degree"]

    def set_attn_implementation(self, attn_implementation: str | dict, allow_all_kernels: bool = False) -> None:
        """Of no other kind than it is: others would leave the operands of the attention products unquantized.

        Raises:
            ValueError: another one.
        """
        check_attention_implementation(attn_implementation)

    @torch.no_grad()
    def initialize_weights(self) -> None:
        # `_init_weights` is not called inside the nested backbone; what a checkpoint does not hold is set here.
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, ActivationQuantizer | LSQWeightQuantizer | PackedWeight):
                init.ones_(module.scale)
            if isinstance(module, PackedWeight):
                init.zeros_(module.codes)
            if isinstance(module, ActivationQuantizer):
                init.zeros_(module.offset)
            if isinstance(module, GroupActivationQuantizer):
                for name in ("channel_quantiles", "assignment_logits", "group_index"):
                    if hasattr(module, name):
                        init.zeros_(getattr(module, name))
            if isinstance(module, QuantformerPreTrainedModel):
                init.ones_(module.concentration_degree)
                init.copy_(module.bit_widths, module.expected_bit_widths())
                if module.config.stage == "packed":
                    init.zeros_(getattr(module, DIGEST_NAME))

    def save_pretrained(
        self, save_directory, is_main_process: bool = True, state_dict: dict[str, Tensor] | None = None, **kwargs
    ) -> None:
        """As in transformers, with the parameters under the names that the modules have, and in one step.

        The default there is the layout of older releases, which `Trainer` cannot resume from. Everything is written
        beside its place and flushed first: a crash while saving leaves what was there before.

        Raises:
            ValueError: a `variant` or the `save_original_format` of a packed model; layers that were replaced by others.
        """
        if self.config.stage == "packed" and kwargs.get("save_original_format"):
            raise ValueError("save_original_format is True, and packed models have one layout alone: leave it out")
        if self.config.stage == "packed" and kwargs.get("variant"):
            raise ValueError(
                f"variant is {kwargs['variant']!r}, and variants share one config.json, which says the bits of packed codes:"
                f" save each packed model in a folder, or push it as a revision, of its own"
            )
        kwargs.setdefault("save_original_format", False)
        if not torch.equal(self.bit_widths.cpu(), self.expected_bit_widths()):
            raise ValueError(
                "layers were replaced by others than the config names, and nobody could load them: for a new classifier,"
                " load the model by from_pretrained(..., num_labels=..., ignore_mismatched_sizes=True)"
            )
        if not is_main_process:
            super().save_pretrained(save_directory, False, state_dict, **kwargs)
            return
        if self.config.stage == "packed":
            digest = digest_of_state(state_dict or self.state_dict(), self.config)
            getattr(self, DIGEST_NAME).copy_(digest)
            if state_dict is not None:
                state_dict = state_dict | {DIGEST_NAME: digest.to(self.device)}
        kwargs.setdefault("repo_id", Path(save_directory).name)
        variant = f"\\.{re.escape(kwargs['variant'])}" if kwargs.get("variant") else ""
        stale = rf"model(-\d{{5}}-of-\d{{5}})?{variant}\.safetensors(\.index{variant}\.json)?"
        with replaced_together(Path(save_directory), stale=stale) as draft:
            super().save_pretrained(draft, True, state_dict, **kwargs)
            if self.image_processor is not None:
                self.image_processor.save_pretrained(draft)
            write_model_card(draft, self.config, replaces=Path(save_directory) / "README.md")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs) -> Self:
        """As in transformers, but what is missing, left over, or of other bit widths than the config's is an error.

        Raises:
            TypeError: a `bit_width`, which is that of the checkpoint.
            FileNotFoundError: a shard is missing.
            ValueError: the files are damaged, or do not hold the model that the config describes; a `device_map` that
                offloads.
        """
        name = pretrained_model_name_or_path
        wants_info = kwargs.pop("output_loading_info", False)
        new_classifier = kwargs.pop("ignore_mismatched_sizes", False)
        check_attention_implementation(kwargs.pop("attn_implementation", None))
        if "bit_width" in kwargs:
            raise TypeError(
                f"bit_width is {kwargs['bit_width']}, and bits are fixed in a checkpoint: leave it out, or quantize the"
                f" full-precision model anew, by from_full_precision(..., bit_width={kwargs['bit_width']})"
            )
        location = {key: kwargs[key] for key in LOCATION_ARGUMENTS if kwargs.get(key) is not None}
        config = kwargs.get("config")
        if not isinstance(config, QuantformerConfig):
            told = {key: kwargs[key] for key in ("weight_quantizer", "twin_levels") if key in kwargs}
            check_model_type(config or name, cls.config_class.get_config_dict(config or name, **location)[0])
            config = cls.config_class.from_pretrained(config or name, **location, **told)
        if config.stage == "packed":
            if kwargs.get("variant") is not None or kwargs.get("use_safetensors") is False:
                raise ValueError(
                    "a packed model is in model.safetensors, whose digest is compared: leave out variant and"
                    " use_safetensors=False"
                )
            if name is not None:
                check_packed_files(name, config, **location)
        elif name is not None and os.path.isdir(name):
            # What is wrong with a file, transformers does not say.
            CheckpointReader.find(name, **location)
        # A classifier of another size is looked at below, as what else does not fit.
        model, info = super().from_pretrained(
            name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        _check_fits(str(name), info, config.stage == "packed", new_classifier)
        for tensor in _of_other_shapes(info):
            # A new classifier: its scales follow from its weight.
            layer = model.get_submodule(tensor.rpartition(".")[0])
            if isinstance(getattr(layer, "weight_quantizer", None), LSQWeightQuantizer):
                layer.weight_quantizer.calibrate(layer.weight)
        model.check_bit_widths(str(name))
        _check_not_offloaded(model)
        quantize.check_group_indices(model, str(name))
        if config.stage == "packed":
            pack.prepare_inference(model)
        model.image_processor = find_image_processor(name, location)
        return (model, info) if wants_info else model


def _check_not_offloaded(model: nn.Module) -> None:
    """Raise ValueError where accelerate would bring in the tensors of one module at a time: quantizers read each other's."""
    devices = {str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}
    if "disk" in devices or (len(devices) > 1 and "cpu" in devices):
        raise ValueError(
            f"device_map puts parts of the model on {', '.join(sorted(devices))}, and quantized models are not offloaded:"
            f" give one device, such as device_map='cpu'"
        )


def _of_other_shapes(info: dict) -> list[str]:
    return [str(entry[0]) for entry in info["mismatched_keys"]]


def _check_fits(name: str, info: dict, packed: bool, new_classifier: bool) -> None:
    """Raise ValueError unless tensors of the checkpoint `name` are those of its model, but for a new classifier.

    Args:
        info: what transformers says of loading it.
    """
    reshaped = _of_other_shapes(info)
    not_of_classifier = [tensor for tensor in reshaped if not is_classifier(tensor.removeprefix("backbone."))]
    kinds = {"missing": info["missing_keys"], "not expected": info["unexpected_keys"]}
    kinds["of another shape"] = not_of_classifier if new_classifier else reshaped
    problems = {kind: sorted(names) for kind, names in kinds.items() if names}
    if problems:
        said = "; ".join(f"{kind}: {shortened(names)}" for kind, names in problems.items())
        may_be_new = not packed and problems.keys() == {"of another shape"} and not not_of_classifier
        raise ValueError(
            f"the checkpoint '{name}' does not fit its config ({said}): restore the config.json that was saved with it"
            f"{', or give ignore_mismatched_sizes=True for a new classifier' if may_be_new else ''}"
        )
    if packed and reshaped:
        raise ValueError(
            f"the checkpoint '{name}' is packed, and a new classifier has to be trained: load it with its own classes,"
            f" unpack() and save it, and start from there"
        )
