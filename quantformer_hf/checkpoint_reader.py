"""The tensors of a folder of safetensors files, one or sharded, by name; nothing is unpickled, and little is read."""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .checkpoint_files import first_sentence, shortened
from .checkpointing import check_replaced


#: Bits of an element by safetensors' name of its type.
DTYPE_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
}


@dataclass(frozen=True)
class StoredTensor:
    """What a file's header says of a tensor."""

    shape: tuple[int, ...]
    dtype_bits: int
    file: Path

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.elements * self.dtype_bits // 8


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a JSON file.

    Raises:
        ValueError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({first_sentence(error)}): copy or download it again") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, and not a dictionary: copy or download it again")
    return content


class CheckpointReader:
    """Headers of the weight files in a folder; single tensors on demand.

    Attributes:
        tensors: `StoredTensor` by name.
        files: the weight files.

    Raises:
        FileNotFoundError: no weight files, or a shard of the index that is not there.
        ValueError: a file that is damaged or cut short, or that lacks a tensor of the index; some files of a save that was
            interrupted.
    """

    def __init__(self, tensors: dict[str, StoredTensor], files: list[Path]):
        self.tensors = tensors
        self.files = files

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the headers of `model.safetensors`, or of all files of its index."""
        check_replaced(folder)
        single, index = folder / SAFE_WEIGHTS_NAME, folder / SAFE_WEIGHTS_INDEX_NAME
        # In the order of transformers: one whole file wins over an index beside it.
        if single.is_file():
            return cls(_read_header(single), [single])
        if not index.is_file():
            raise FileNotFoundError(
                f"{folder} has no {SAFE_WEIGHTS_NAME} and no {SAFE_WEIGHTS_INDEX_NAME}: name a folder that"
                f" save_pretrained has written"
            )
        weight_map = _read_weight_map(index)
        files, tensors = [], {}
        for name in sorted(set(weight_map.values())):
            path = folder / name
            if Path(name).name != name or not path.is_file():
                raise FileNotFoundError(f"{index} names the file {name!r}, which is not in {folder}: copy all shards")
            files.append(path)
            held = _read_header(path)
            missing = [tensor for tensor, file in weight_map.items() if file == name and tensor not in held]
            if missing:
                raise ValueError(f"{path} lacks tensors that {index.name} says it has: {shortened(missing)}")
            tensors |= held
        return cls(tensors, files)

    @classmethod
    def find(cls, name: str | os.PathLike, **location: Any) -> Self | None:
        """As `open`, of a folder or a repository of the hub, of which files are fetched; None where it has no such files.

        Args:
            name: folder or repository.
            location: what `cached_file` takes beside it (`revision`, `subfolder`, ...).
        """
        if os.path.isdir(name):
            check_replaced(Path(name, location.get("subfolder", "")))
        # What is missing, `open` says.
        location["_raise_exceptions_for_missing_entries"] = False
        found = cached_file(name, SAFE_WEIGHTS_NAME, **location)
        if found is None:
            found = cached_file(name, SAFE_WEIGHTS_INDEX_NAME, **location)
            shards = set() if found is None else set(_read_weight_map(Path(found)).values())
            for shard in sorted(shards):
                cached_file(name, shard, **location)
        return None if found is None else cls.open(Path(found).parent)

    @property
    def file_bytes(self) -> int:
        """Bytes of the weight files, headers included."""
        return sum(path.stat().st_size for path in self.files)

    def read(self, name: str) -> np.ndarray:
        """One tensor, in float32 or the integer type of the file."""
        # By torch, for numpy has no bfloat16.
        with safe_open(self.tensors[name].file, framework="pt") as file:
            tensor = file.get_tensor(name)
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def _read_weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{index} has no weight_map of names to files: copy or download it again")
    return weight_map


def _read_header(path: Path) -> dict[str, StoredTensor]:
    try:
        with safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  no dictionary
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({path.stat().st_size} bytes; {first_sentence(error)}): copy or"
            f" download it again"
        ) from None
    for name, (_, dtype) in found.items():
        if dtype not in DTYPE_BITS:
            raise ValueError(f"{path}: the tensor '{name}' is of the type {dtype}, which no stage writes")
    return {name: StoredTensor(shape, DTYPE_BITS[dtype], path) for name, (shape, dtype) in found.items()}
