"""Which class of a model is which of a data set, by their names."""

from collections import Counter
from collections.abc import Iterable, Sequence

from timm.data import ImageNetInfo

from .checkpoints import imagenet_class_names


def share_a_name(one: str, other: str) -> bool:
    """Whether one has a name of the other: ImageNet's are lists of them, such as "tench, Tinca tinca"."""
    return not _synonyms(one).isdisjoint(_synonyms(other))


def numbers_among(own: Sequence[str], names: Sequence[str]) -> list[int] | None:
    """Which class of a model each class of a data set is: by its whole name, or by one that no other class has.

    Where the model's are ImageNet's 1,000, their numbers in WordNet (n01440764) are names as well.

    Args:
        own: the model's names, in its order.
        names: the data set's.

    Returns:
        None where a class is none of the model's, or two are the same.
    """
    whole = _of_one_class({name} for name in own)
    any_name = _of_one_class(_all_names(own))
    numbers = [whole.get(name, any_name.get(name.lower())) for name in names]
    return None if None in numbers or len(set(numbers)) < len(numbers) else numbers


def _synonyms(name: str) -> set[str]:
    return {name.lower() for name in name.split(", ")}


def _all_names(own: Sequence[str]) -> list[set[str]]:
    """By class, in lower case."""
    found = [{name.lower(), *_synonyms(name)} for name in own]
    info = ImageNetInfo()
    if len(own) == info.num_classes():
        words, unlike = info.label_descriptions(), imagenet_class_names()
        for names, number, *spelled in zip(found, info.label_names(), words, unlike, strict=True):
            if not names.isdisjoint({name.lower() for name in spelled}.union(*map(_synonyms, spelled))):
                names.update({number, *(name.lower() for name in spelled)})
    return found


def _of_one_class(names: Iterable[set[str]]) -> dict[str, int]:
    """The class of each name that no other one has."""
    numbered = [(name, number) for number, of_class in enumerate(names) for name in of_class]
    occurrences = Counter(name for name, _ in numbered)
    return {name: number for name, number in numbered if occurrences[name] == 1}
