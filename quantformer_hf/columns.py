"""Columns of images and labels: found, and made what they are where a file does not say so."""

from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict, Value

from .configuration_quantformer import nearest
from .labels import IGNORED_LABEL, check_labelled


def find_column(features: Features, role: str, name: str | None, kind: type) -> str:
    """The column `name`, or without one the only one of the type `kind`.

    Args:
        role: "image" or "label".

    Raises:
        ValueError: no such column, none or several of the type, or one of which nothing of the type can be made.
    """
    if name is not None:
        if name not in features:
            raise ValueError(f"the data set has no {role} column {name!r}{nearest(name, features)}")
        if not isinstance(features[name], kind) and not (_is_file if kind is Image else _is_name)(features[name]):
            raise ValueError(
                f"the {role} column {name!r} holds {features[name]}: name one of the type {kind.__name__}, or of"
                f" {'the bytes of image files' if kind is Image else 'strings or integers'}, by {role}_column"
            )
        return name
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    if len(found) != 1:
        # What `datasets` makes of a folder without folders of classes in each split, or with a single one.
        folder = list(features) == ["image"]
        raise ValueError(
            f"the data set has {len(found)} columns of the type {kind.__name__} among {', '.join(features)}: "
            + (
                "put its images into folders of two or more classes, in each split"
                if folder
                else f"name one by {role}_column"
            )
        )
    return found[0]


def _is_file(feature: Any) -> bool:
    """As `datasets` writes images: what it does not say of them is that they are images."""
    fields = feature if isinstance(feature, dict) else {"bytes": feature}
    return {"bytes"} <= fields.keys() <= {"bytes", "path"} and _is_of(fields["bytes"], "binary", "large_binary")


def _is_name(feature: Any) -> bool:
    return _is_of(feature, "string", "large_string", "integer", "boolean")


def _is_of(feature: Any, *kinds: str) -> bool:
    return isinstance(feature, Value) and any(getattr(pa.types, f"is_{kind}")(feature.pa_type) for kind in kinds)


def with_images(rows: Dataset | IterableDataset, column: str, split: str) -> Dataset | IterableDataset:
    """The rows of `split` with `column` as images, where it holds files.

    Raises:
        ValueError: it has no such column.
    """
    if column not in rows.features:
        raise ValueError(f"the split {split!r} has no image column {column!r}{nearest(column, rows.features)}")
    return rows if isinstance(rows.features[column], Image) else rows.cast_column(column, Image())


def with_classes(splits: DatasetDict | IterableDatasetDict, column: str, used: list[str]) -> dict[str, Any]:
    """The splits that are `used`, with `column` as classes: its values in all splits together, in their order.

    A value below 0 is no class, but a row without one.

    Raises:
        ValueError: a stream, whose values are known only after all of it is read.
    """
    feature = splits[used[0]].features[column]
    if isinstance(feature, ClassLabel):
        return {name: splits[name] for name in used}
    if isinstance(splits, IterableDatasetDict):
        raise ValueError(
            f"the label column {column!r} holds {feature}, and a stream does not say which classes there are: leave out"
            f" --streaming, or write them as class_label into dataset_info of the data set's README.md"
        )
    alike = {name: rows for name, rows in splits.items() if rows.features.get(column) == feature}
    values = {value for rows in alike.values() for value in rows.unique(column)} - {None}
    values = sorted(value for value in values if isinstance(value, str) or value >= 0)
    classes = ClassLabel(names=[str(value) for value in values])
    index = {value: i for i, value in enumerate(values)}

    def cast(rows: Dataset) -> Dataset:
        # Not `cast_column`, which writes all images anew.
        labels = [index.get(value) for value in rows[column][:]]
        return rows.remove_columns(column).add_column(column, labels, feature=classes)

    return {name: cast(splits[name]) if name in alike else splits[name] for name in used}


def check_all_labelled(rows: Dataset, column: str, where: str, argument: str) -> None:
    """Raise ValueError, which names `argument`, for the first row without a class; `where` says what `rows` are."""
    labels = rows.select_columns(column).with_format("arrow")[:].column(column)
    missing = pc.is_null(labels)
    if pa.types.is_signed_integer(labels.type):
        missing = pc.fill_null(pc.and_(pc.less(labels, 0), pc.not_equal(labels, IGNORED_LABEL)), True)
    row = pc.index(missing, True).as_py()
    if row >= 0:
        many = f"row {row} of {where}, and {pc.sum(missing).as_py()} of {len(rows)} rows in all,"
        check_labelled(labels[row].as_py(), many, column, argument)
