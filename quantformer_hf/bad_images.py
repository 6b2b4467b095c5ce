"""Images that cannot be decoded: found, counted, and reported at the end of an epoch."""

import logging
import struct
import zlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from datasets import Image
from PIL import Image as PILImage


logger = logging.getLogger(__name__)

#: What `--on_bad_image` may be.
BAD_IMAGE_POLICIES = ("skip", "error")

#: Of the images that a run reads.
MODE = "RGB"

#: Share of bad images above which a run stops.
MAX_BAD_SHARE = 0.01

#: How many bad images a message names.
NAMED_IMAGES = 20

#: What PIL and datasets raise for a file that is cut off, empty, missing or no image (PIL's own error is an OSError).
DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    PILImage.DecompressionBombError,
)

_IMAGE = Image()


class BadImageError(ValueError):
    """An image that cannot be decoded, or too many of them."""


def decode(value: dict[str, Any] | None) -> PILImage.Image | None:
    """The RGB image of an undecoded cell (`{"bytes", "path"}`, or null) of `datasets`, or None if it is bad."""
    if value is None:
        return None
    try:
        return _eight_bits(_IMAGE.decode_example(value)).convert(MODE)
    except DECODING_ERRORS as error:
        logger.debug(f"{value.get('path')}: {error}")
        return None


def _eight_bits(image: PILImage.Image) -> PILImage.Image:
    """Gray of 16 bits, as PNG and scanners have it, as 8: Pillow would make it white.

    Raises:
        ValueError: numbers beyond 16 bits, or in floating point, of which nobody says what is white.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    gray = np.asarray(image)
    if image.mode == "F" or gray.min() < 0 or gray.max() >= 1 << 16:
        raise ValueError(
            f"its gray goes from {gray.min()} to {gray.max()} (mode {image.mode}), and nobody says what is white"
        )
    return PILImage.fromarray((gray / 257).round().astype(np.uint8))


def origin(value: dict[str, Any] | None, position: str) -> str:
    """What a message calls an image: its path where it has one, and its position."""
    return f"{value['path']} ({position})" if isinstance(value, dict) and value.get("path") else position


class BadImageTally:
    """Counts the bad images of an epoch, or of an evaluation, in one process.

    Data loading only finds bad images, and puts something in their place: workers cannot agree with other processes on
    when to stop. What they found travels with the batch to this tally, which decides.

    Args:
        what: what the images are called in messages, such as "training images".
        policy: one of `BAD_IMAGE_POLICIES`.
        total: images of a whole epoch, over all processes, where it is known.
    """

    def __init__(self, what: str, policy: str, total: int | None = None):
        self.what = what
        self.policy = policy
        self.total = total
        self.images = 0
        self.origins: set[str] = set()

    def add(self, images: int, origins: Iterable[str]) -> None:
        """Count a batch of `images`, of which those at `origins` are bad.

        Raises:
            BadImageError: a bad image under the policy "error"; more than `MAX_BAD_SHARE` of the whole epoch already.
        """
        self.images += images
        new = set(origins) - self.origins
        self.origins |= new
        if new and self.policy == "error":
            raise BadImageError(
                f"cannot decode {_names(new)}: repair or remove it, or give --on_bad_image skip to go on without it"
            )
        # Above the limit of all processes together: no later image can bring it below, so that one may stop alone.
        if self.total is not None and len(self.origins) > MAX_BAD_SHARE * self.total:
            self._stop(self.origins, self.total)

    def finish(self, alike: bool = False) -> int:
        """Report the bad images of all processes, start anew, and return how many there were.

        To be called by every process together.

        Args:
            alike: every process has looked at the same images, so that there is nothing to add up.

        Raises:
            BadImageError: more than `MAX_BAD_SHARE`, in every process alike.
        """
        origins, images = self.origins, self.images
        if not alike:
            origins = set(gather_object(sorted(origins)))
            images = sum(gather_object([images]))
        self.images, self.origins = 0, set()
        if origins:
            # A resumed run may see the end of an epoch only: one bad image of a few is no sign of a bad data set.
            if len(origins) > MAX_BAD_SHARE * max(images, self.total or 0):
                self._stop(origins, images)
            logger.warning(f"{len(origins)} of {images} {self.what} could not be decoded: {_names(origins)}")
        return len(origins)

    def _stop(self, origins: set[str], images: int) -> None:
        raise BadImageError(
            f"{len(origins)} of {images} {self.what} cannot be decoded, more than {MAX_BAD_SHARE:.0%}: repair or remove"
            f" {_names(origins)}"
        )


def _names(origins: set[str]) -> str:
    named = ", ".join(sorted(origins)[:NAMED_IMAGES])
    return f"{named} and {len(origins) - NAMED_IMAGES} more" if len(origins) > NAMED_IMAGES else named
