"""What a kept result was told, in a file beside it, so that it is not taken for that of other flags."""

import json
import sys
from pathlib import Path


TOLD_FILE = "told.json"

#: Flags that say where something lies.
PLACES = ("--dataset_dir", "--model_name_or_path", "--layer_bits", "--output_dir")


def by_name(flags: list[str]) -> dict[str, str]:
    """What each flag says, without those of `PLACES`; the last one counts, as on a command line."""
    found: dict[str, list[str]] = {}
    for word in flags:
        if word.startswith("--"):
            found[name := word] = []
        else:
            found[name].append(word)
    return {name: " ".join(words) for name, words in found.items() if name not in PLACES}


def keep_told(result: Path, told: dict[str, str]) -> None:
    """Write beside the file `result` what it was told; before it, so that no result is without."""
    result.parent.mkdir(parents=True, exist_ok=True)
    (result.parent / TOLD_FILE).write_text(json.dumps(told, indent=1))


def refuse_other(result: Path, told: dict[str, str]) -> None:
    """Leave if the file `result` is there and was told otherwise. Older ones do not say, and are taken as they are."""
    path = result.parent / TOLD_FILE
    kept = json.loads(path.read_text()) if result.exists() and path.exists() else told
    for name in told | kept:
        if kept.get(name) != told.get(name):
            sys.exit(
                f"{result.parent} was made {_said(name, kept)}, and not {_said(name, told)}:"
                f" give the same again, or another --output_dir"
            )


def _said(name: str, told: dict[str, str]) -> str:
    return f"with {name} {told[name]}" if name in told else f"without {name}"
