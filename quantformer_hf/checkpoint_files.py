"""State dicts out of files, without running what a file brings along."""

import argparse
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor


#: Entries of a checkpoint that hold a state dict. DeiT's own code evaluates `model`, timm's the averaged one.
ENTRIES = ("model", "state_dict_ema", "state_dict", "model_ema")

#: Suffixes of files that `torch.load` reads.
TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".tar", ".ckpt")


def shortened(names: Iterable[str], limit: int = 4) -> str:
    """The first names in words: `a, b, c, d and 7 more`."""
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def first_sentence(error: Exception) -> str:
    """What an exception says, without the pages of advice that may follow."""
    return re.split(r"\n|\. ", str(error).strip(), maxsplit=1)[0] or type(error).__name__


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The state dict in a file, and the entry of the file (one of `ENTRIES`) that held it.

    Prefixes that wrappers leave behind (`module.`, `_orig_mod.`, `timm_model.`) are removed.

    Raises:
        ValueError: a file that is damaged, needs more than tensors to be unpickled, or holds no state dict.
    """
    checkpoint = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    entry = None
    if isinstance(checkpoint, Mapping):
        entry = next((entry for entry in ENTRIES if isinstance(checkpoint.get(entry), Mapping)), None)
        checkpoint = checkpoint if entry is None else checkpoint[entry]
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"expected a state dict, found a {type(checkpoint).__name__}")
    others = [str(key) for key, value in checkpoint.items() if not isinstance(value, Tensor)]
    if others or not checkpoint:
        raise ValueError(
            f"expected a state dict, on its own or as one of {', '.join(ENTRIES)}, found"
            f" {shortened(others) or 'no parameters'}"
        )
    state_dict = clean_state_dict(checkpoint)
    return {name.removeprefix("timm_model."): tensor for name, tensor in state_dict.items()}, entry


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"expected a safetensors file, found {path.stat().st_size} bytes that are none ({first_sentence(error)}):"
            f" download it again"
        ) from None


def _read_torch(path: Path) -> Any:
    if path.suffix not in TORCH_SUFFIXES:
        raise ValueError(f"expected a file that ends in .safetensors, {', '.join(TORCH_SUFFIXES)}")
    try:
        # DeiT's and timm's training scripts save their arguments so; it holds values and runs nothing.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # torch.load raises nearly anything on a file that is not one of its own
        unsafe = re.search(r"GLOBAL (\S+)", str(error))
        if isinstance(error, pickle.UnpicklingError) and unsafe:
            raise ValueError(
                f"to unpickle it needs {unsafe[1]}, which may run code, and it is refused: where the file was made, save"
                f" its state dict alone, as safetensors or by torch.save({{'model': model.state_dict()}}, path)"
            ) from None
        detail = re.search(r"WeightsUnpickler error: (.+)", str(error))
        raise ValueError(
            f"expected a file of torch.save, found {path.stat().st_size} bytes that are none or not all of one"
            f" ({detail[1] if detail else first_sentence(error)}): download it again"
        ) from None
