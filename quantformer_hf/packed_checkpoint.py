"""What a packed checkpoint is checked for before it is loaded: a damaged file never gives a wrong result."""

import json
import os
from contextlib import ExitStack
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_NAME

from .checkpoint_reader import CheckpointReader
from .configuration_quantformer import QuantformerConfig
from .packing import digest


#: Name of the tensor that holds the digest of all others.
DIGEST_NAME = "packed_digest"

#: Arguments of `from_pretrained` that say where files are.
LOCATION_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


#: What the backbone's config alone says of how tensors are read: their names and shapes would be the same.
UNSEEN_FIELDS = ("num_attention_heads", "num_heads", "hidden_act", "layer_norm_eps", "patch_size", "num_channels")

#: As well, in files since 2026-12: the grid of patches.
LATER_FIELDS = ("image_size",)


def digest_of_state(state: dict[str, Tensor], config: QuantformerConfig) -> Tensor:
    """The digest of a packed model's tensors, without the one that holds it, and of what alone says how to read them.

    Args:
        config: of the model: it decides between grids, scales and attention heads, of which the tensors say nothing.
    """
    return digest([name for name in state if name != DIGEST_NAME], state.__getitem__, _readings(config)[0])


def _readings(config: QuantformerConfig) -> tuple[str, ...]:
    """What alone says how to read the tensors, and as much of it as older files took into their digests."""
    grids = f"{config.weight_quantizer}{', twin_levels' if config.twin_levels else ''}"
    backbone = {name: getattr(config.backbone_config, name, None) for name in UNSEEN_FIELDS}
    more = backbone | {name: getattr(config.backbone_config, name, None) for name in LATER_FIELDS}
    return *(json.dumps([grids, config.whole_multiples, fields]) for fields in (more, backbone)), grids


def check_packed_files(name: str | os.PathLike, config: QuantformerConfig, **location: Any) -> None:
    """Read the weight files of a packed checkpoint, one tensor at a time, and compare their digest.

    Args:
        name: folder, or repository of the hub.
        config: as in `digest_of_state`.
        location: of `LOCATION_ARGUMENTS`.

    Raises:
        FileNotFoundError: a shard is missing.
        ValueError: there is no file, or one is cut short or damaged.
    """
    repair = "get the files again from where they were written"
    checkpoint = CheckpointReader.find(name, **location)
    if checkpoint is None:
        raise ValueError(f"the packed checkpoint '{name}' has no {SAFE_WEIGHTS_NAME}: {repair}")
    if DIGEST_NAME not in checkpoint.tensors:
        raise ValueError(f"the packed checkpoint '{name}' has no tensor '{DIGEST_NAME}': {repair}")
    with ExitStack() as opened:
        files = {path: opened.enter_context(safe_open(path, framework="pt")) for path in checkpoint.files}

        def tensor_of(tensor: str) -> Tensor:
            return files[checkpoint.tensors[tensor].file].get_tensor(tensor)

        names, told = checkpoint.tensors.keys() - {DIGEST_NAME}, tensor_of(DIGEST_NAME)
        if not any(torch.equal(digest(names, tensor_of, reading), told) for reading in _readings(config)):
            fields = ", ".join(("weight_quantizer", "twin_levels", "whole_multiples", *UNSEEN_FIELDS, *LATER_FIELDS))
            raise ValueError(
                f"the packed checkpoint '{name}' is damaged: its tensors, or one of {fields} in its config.json, are not"
                f" those that were saved; {repair}"
            )
