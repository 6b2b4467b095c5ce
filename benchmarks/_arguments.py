"""Types of the benchmarks' flags: argparse names the flag in what they raise."""

import argparse
from pathlib import Path


#: The folder of models and images beside the repository. A string: argparse gives only those to the type of a flag.
SHARED = str(Path(__file__).parents[2] / "shared")


def positive(text: str) -> int:
    """A number of steps, rounds, images and the like."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few: give 1 or more")
    return number


def shared_folder(text: str) -> Path:
    """The folder that holds `data/` and `models/`."""
    for name in ("data", "models"):
        if not Path(text, name).is_dir():
            raise argparse.ArgumentTypeError(f"{text} has no folder {name}: give the one that holds data/ and models/")
    return Path(text)
