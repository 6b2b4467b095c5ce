"""Integer codes of 1 to 8 bits, packed without waste: the layout of weights in files and in memory.

Layout version 1. A weight of `rows` output channels is a `(rows, ceil(columns * bits / 8))` uint8 tensor. Each row is one
stream of bits, least significant first; code i of the row takes the bits `i * bits` to `(i + 1) * bits - 1`. What is left
of the last byte is zero. A code is the integer of the signed grid minus its smallest (`q - qmin`): 0 to `2^bits - 1`.

Three bits, the row of codes 1 2 3 4 5 6 7 0, in three bytes, each drawn from its highest bit to its lowest:

    codes        1   2   3   4   5   6   7   0
    in bits    001 010 011 100 101 110 111 000

    byte 0     11 010 001         codes 2 (lower two bits), 1, 0:    0xd1
    byte 1     0 101 100 0        codes 5 (lowest bit), 4, 3, 2:     0x58
    byte 2     000 111 11         codes 7, 6, 5 (upper two bits):    0x1f
"""

import hashlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


#: Of the layout above. A file of another one is refused.
LAYOUT_VERSION = 1

#: Of the digest of a packed checkpoint.
DIGEST_BYTES = hashlib.sha256().digest_size


def packed_width(columns: int, bits: int) -> int:
    """Bytes of a row of `columns` codes."""
    return -(-columns * bits // 8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack `(rows, columns)` integers of 0 to `2^bits - 1` into `(rows, packed_width(columns, bits))` uint8: bytes, of which
    8 bits are asked, are handed back as they are.

    Raises:
        ValueError: a code that does not fit.
    """
    if bits == 8 and codes.dtype == torch.uint8:
        return codes
    # As Python's numbers: a byte cannot be compared with 256.
    if codes.numel() and not 0 <= codes.min().item() <= codes.max().item() < 2**bits:
        raise ValueError(f"codes from {codes.min()} to {codes.max()} do not fit into {bits} bits")
    rows, columns = codes.shape
    places = torch.arange(bits, dtype=torch.uint8, device=codes.device)
    stream = (codes.to(torch.uint8).unsqueeze(-1) >> places & 1).reshape(rows, columns * bits)
    stream = torch.nn.functional.pad(stream, (0, 8 * packed_width(columns, bits) - columns * bits))
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    return (stream.view(rows, -1, 8) << places).sum(-1, dtype=torch.uint8)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_codes`: `(rows, columns)`, uint8; of 8 bits a view of `packed`."""
    if bits == 8:
        return packed[:, :columns]
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    stream = (packed.unsqueeze(-1) >> places & 1).flatten(1)[:, : columns * bits]
    places = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    return (stream.view(len(packed), columns, bits) << places).sum(-1, dtype=torch.uint8)


def digest(names: Iterable[str], tensor_of: Callable[[str], Tensor], context: str) -> Tensor:
    """SHA-256 of names, dtypes, shapes and contents, `(32,)` uint8: a file that was damaged has another one.

    Args:
        names: of the tensors, in any order.
        tensor_of: gives each; only one at a time is in memory.
        context: goes in as well.
    """
    sha = hashlib.sha256(f"{context}\n".encode())
    for name in sorted(names):
        tensor = tensor_of(name).detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.view(-1).view(torch.uint8).numpy().tobytes())
    return torch.frombuffer(bytearray(sha.digest()), dtype=torch.uint8)
