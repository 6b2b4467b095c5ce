"""Data sets, their splits, columns and classes."""

import io
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, Value
from PIL import Image as PILImage
from transformers import ViTImageProcessor

from quantformer_hf.columns import find_column
from quantformer_hf.data import DataArguments, load_digits_dataset, load_image_data
from quantformer_hf.images import TransformedImages


PROCESSOR = ViTImageProcessor(size={"height": 16, "width": 16})


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def write_images(folder, splits=("train", "val"), classes=("cat", "dog"), each=3, suffix="png"):
    generator = np.random.default_rng(0)
    for split in splits:
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for i in range(each):
                pixels = generator.integers(0, 255, (20, 24, 3), dtype=np.uint8)
                PILImage.fromarray(pixels).save(folder / split / name / f"{i}.{suffix}")


def write_parquet(folder, columns, split="train"):
    rows = 8
    values = {
        "image": [PILImage.new("RGB", (20, 20), (i, 0, 0)) for i in range(rows)],
        "thumbnail": [PILImage.new("RGB", (4, 4)) for _ in range(rows)],
        "label": [i % 2 for i in range(rows)],
        "coarse": [0] * rows,
        "caption": ["a"] * rows,
    }
    kinds = {
        "image": Image(),
        "thumbnail": Image(),
        "label": ClassLabel(names=["a", "b"]),
        "coarse": ClassLabel(names=["all"]),
        "caption": Value("string"),
    }
    dataset = Dataset.from_dict(
        {name: values[name] for name in columns}, features=Features({name: kinds[name] for name in columns})
    )
    dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def test_digits_are_split_80_20_with_every_class():
    data = load_image_data(DataArguments(dataset_name="digits"), seed=0)
    assert (len(data.train), len(data.validation)) == (1437, 360)
    assert data.label_names == [str(i) for i in range(10)]
    assert set(data.validation["label"]) == set(range(10))
    assert data.train[0]["image"].size == (8, 8)


def test_a_folder_of_images(tmp_path):
    write_images(tmp_path)
    data = load_image_data(DataArguments(dataset_dir=str(tmp_path)), seed=0)
    assert (len(data.train), len(data.validation), data.label_names) == (6, 6, ["cat", "dog"])
    row = TransformedImages(data.validation, data, PROCESSOR)[0]
    assert row["pixel_values"].shape == (3, 16, 16)
    assert row["labels"] == 0


def test_a_folder_of_parquet_files_with_one_split(tmp_path):
    write_parquet(tmp_path, ["image", "label", "caption"])
    data = load_image_data(DataArguments(dataset_dir=str(tmp_path), eval_fraction=0.25), seed=0)
    assert (len(data.train), len(data.validation)) == (6, 2)
    assert (data.image_column, data.label_column) == ("image", "label")


def test_samples_are_limited(tmp_path):
    write_images(tmp_path)
    arguments = DataArguments(dataset_dir=str(tmp_path), max_train_samples=2, max_eval_samples=1)
    data = load_image_data(arguments, seed=0)
    assert (len(data.train), len(data.validation)) == (2, 1)


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        (["image", "label"], {"image_column": "imgae"}, "no image column 'imgae': did you mean 'image'"),
        (["image", "label"], {"label_column": "class"}, "no label column 'class'"),
        (["image", "label"], {"label_column": "image"}, r"label column 'image' holds Image\(.* strings or integers"),
        (
            ["image", "label", "caption"],
            {"image_column": "caption"},
            r"'caption' holds Value\(.* bytes of image files",
        ),
        (["image", "thumbnail", "label"], {}, "2 columns of the type Image .* name one by image_column"),
        (["image", "caption"], {}, "0 columns of the type ClassLabel .* name one by label_column"),
        (["image", "label"], {"eval_split": "validaton"}, "no split 'validaton'"),
        (["image", "coarse"], {}, "the column 'coarse' knows 1 class: a classifier needs two at least"),
    ],
)
def test_columns_and_splits_that_are_not_there_are_named(columns, arguments, message, tmp_path):
    write_parquet(tmp_path, columns)
    with pytest.raises(ValueError, match=message):
        load_image_data(DataArguments(dataset_dir=str(tmp_path), **arguments), seed=0)


def test_a_folder_without_classes_or_with_other_names_says_how_it_should_be(tmp_path):
    one, flat, other = (tmp_path / name for name in ("one", "flat", "other"))
    write_images(one, classes=("cat",))
    write_images(flat, splits=("train",))
    (flat / "train" / "cat").rename(flat / "val")
    for folder in (one, flat):
        with pytest.raises(ValueError, match="put its images into folders of two or more classes, in each split"):
            load_image_data(DataArguments(dataset_dir=str(folder)), seed=0)
    write_images(other, splits=("train", "Validation"))
    with pytest.raises(ValueError, match="Validation is not read as the split 'validation', for its capital letters"):
        load_image_data(DataArguments(dataset_dir=str(other)), seed=0)


def test_files_that_do_not_fit_together_are_told(tmp_path):
    write_parquet(tmp_path, ["image", "label"])
    write_parquet(tmp_path, ["image", "caption"], "train-1")
    with pytest.raises(
        ValueError, match=r"\(CastError: because column names don.t match\): .* parquet files of the same"
    ):
        load_image_data(DataArguments(dataset_dir=str(tmp_path)), seed=0)


def test_a_missing_folder_is_named():
    with pytest.raises(FileNotFoundError, match="no-such-folder"):
        load_image_data(DataArguments(dataset_dir="no-such-folder"), seed=0)


def test_val_is_found_where_the_data_set_calls_it_so(monkeypatch):
    images = load_digits_dataset()
    splits = DatasetDict(train=images["train"].select(range(20)), val=images["validation"].select(range(10)))
    monkeypatch.setattr("quantformer_hf.data.load_dataset", lambda *args, **kwargs: splits)
    data = load_image_data(DataArguments(dataset_name="owner/name"), seed=0)
    assert (len(data.train), len(data.validation)) == (20, 10)


def test_an_imagenet_folder_has_the_same_labels_in_both_splits(tmp_path):
    # The validation folder lacks a class of the middle: its labels must not move up.
    write_images(tmp_path, splits=("train",), classes=("n01440764", "n01443537", "n01484850"), suffix="JPEG")
    write_images(tmp_path, splits=("val",), classes=("n01440764", "n01484850"), suffix="JPEG")
    data = load_image_data(DataArguments(dataset_dir=str(tmp_path)), seed=0)
    assert data.label_names == ["n01440764", "n01443537", "n01484850"]
    assert set(data.train["label"]) == {0, 1, 2}
    assert set(data.validation["label"]) == {0, 2}


def test_splits_with_other_classes_are_refused(tmp_path, monkeypatch):
    one = Dataset.from_dict(
        {"image": [PILImage.new("RGB", (4, 4))], "label": [0]},
        features=Features({"image": Image(), "label": ClassLabel(names=["a", "b"])}),
    )
    other = one.cast_column("label", ClassLabel(names=["b", "a"]))
    monkeypatch.setattr(
        "quantformer_hf.data.load_dataset", lambda *args, **kwargs: DatasetDict(train=one, validation=other)
    )
    with pytest.raises(ValueError, match=r"do not have the same classes in .label. .* in another order"):
        load_image_data(DataArguments(dataset_name="owner/name"), seed=0)


def write_plain_parquet(folder, **labels):
    """Images as structs of bytes, of which the files do not say that they are images; a file for each split."""
    for split, values in labels.items():
        cells = []
        for i in range(len(values)):
            content = io.BytesIO()
            PILImage.new("RGB", (4, 4), (i, 0, 0)).save(content, "png")
            cells.append({"bytes": content.getvalue(), "path": None})
        pq.write_table(pa.table({"img": cells, "kind": values}), folder / f"{split}-0.parquet")
    return {"dataset_dir": str(folder), "image_column": "img", "label_column": "kind"}


@pytest.mark.parametrize(
    ("labels", "validation", "test", "names", "numbers"),
    [
        (["b", "c", "b", "e"], ["a", "e"], [None, "d"], ["a", "b", "c", "d", "e"], [1, 2, 1, 4]),
        ([10, 2, 10, 3], [2, 7], [-1, 4], ["2", "3", "4", "7", "10"], [4, 0, 4, 1]),
        ([True, True], [True], [False], ["False", "True"], [1, 1]),
    ],
)
def test_strings_and_integers_that_are_named_are_classes_of_all_splits_together(
    labels, validation, test, names, numbers, tmp_path
):
    # The classes of a split that is not used count as well, for another command may use it; that rows there have none is no
    # matter.
    arguments = write_plain_parquet(tmp_path, train=labels, validation=validation, test=test)
    data = load_image_data(DataArguments(**arguments), seed=0)
    assert data.label_names == names
    assert data.train["kind"][:] == numbers
    assert [names[label] for label in data.validation["kind"]] == [str(label) for label in validation]
    assert data.train[0]["img"].size == (4, 4)
    assert TransformedImages(data.train, data, PROCESSOR)[1]["labels"] == numbers[1]


def test_what_a_stream_cannot_know_is_told(tmp_path):
    arguments = write_plain_parquet(tmp_path, train=["a", "b"], test=["a", "b"])
    with pytest.raises(ValueError, match=r"'kind' holds Value.* a stream does not say which classes .* --streaming"):
        load_image_data(DataArguments(**arguments, streaming=True), seed=0)


def test_files_of_a_stream_that_are_named_are_images(tmp_path):
    arguments = write_plain_parquet(tmp_path, train=[0, 1])
    features = Features(
        {"img": {"bytes": Value("binary"), "path": Value("string")}, "kind": ClassLabel(names=["a", "b"])}
    )
    rows = Dataset.from_parquet(str(tmp_path / "train-0.parquet"), features=features)
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / f"{split}-0.parquet")
    data = load_image_data(DataArguments(**arguments, streaming=True), seed=0)
    assert next(iter(data.train))["img"].size == (4, 4)


def unlabelled(rows, labels):
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    return Dataset.from_dict({"image": [PILImage.new("RGB", (4, 4))] * rows, "label": labels}, features=features)


@pytest.mark.parametrize("label", [None, -1])
def test_a_split_without_labels_is_named_where_they_are_needed(label, monkeypatch):
    some, none = unlabelled(4, [0, 1, label, 1]), unlabelled(2, [label] * 2)
    splits = DatasetDict(train=some, validation=unlabelled(2, [0, 1]), test=none)
    monkeypatch.setattr("quantformer_hf.data.load_dataset", lambda *args, **kwargs: splits)
    with pytest.raises(
        ValueError, match=rf"row 0 of the split 'test', and 2 of 2 .*\({label} in .*'label'\).*--eval_split"
    ):
        load_image_data(DataArguments(dataset_name="owner/name", eval_split="test"), seed=0)
    splits["test"] = unlabelled(4, [label, 0, 1, label])
    for samples in (1, 4):
        drawn = DataArguments(dataset_name="owner/name", eval_split="test", max_eval_samples=samples)
        kept = splits["test"].shuffle(seed=0).select(range(samples))["label"]
        if label in kept:
            with pytest.raises(ValueError, match="of what is drawn of the split 'test'"):
                load_image_data(drawn, seed=0)
        else:
            assert len(load_image_data(drawn, seed=0).validation) == samples
    # Calibration has no use for labels; training names the row.
    data = load_image_data(DataArguments(dataset_name="owner/name"), seed=0)
    images = TransformedImages(data.train, data, PROCESSOR, augment=lambda image, key: None)
    assert images[1]["labels"] == 1
    with pytest.raises(ValueError, match=rf"image 2 has no class \({label} in the column 'label'\).*--train_split"):
        images[2]
    splits = DatasetDict(train=some)
    with pytest.raises(
        ValueError, match=r"row 2 of the split 'train', and 1 of 4 rows in all, has no class.*--train_split"
    ):
        load_image_data(DataArguments(dataset_name="owner/name"), seed=0)


@pytest.mark.parametrize(("labels", "fraction"), [([0, 0, 0, 1], 0.5), ([0, 0, 0, 1, 1], 0.01), ([0, 0, 1, 1], 0.99)])
def test_what_cannot_be_held_out_is_told_by_the_argument_and_the_rarest_class(labels, fraction, monkeypatch):
    splits = DatasetDict(train=unlabelled(len(labels), labels))
    monkeypatch.setattr("quantformer_hf.data.load_dataset", lambda *args, **kwargs: splits)
    with pytest.raises(
        ValueError, match=rf"eval_fraction {fraction} of {len(labels)} images .*has [12]\).*--eval_split"
    ):
        load_image_data(DataArguments(dataset_name="owner/name", eval_fraction=fraction), seed=0)


def test_a_label_that_no_class_has_is_told_where_some_are_held_out(monkeypatch):
    rows = unlabelled(4, [0, 0, 1, 1])
    features, images = rows.features, rows["image"][:]
    rows = Dataset.from_dict({"image": images, "label": [0, 0, 1, 12]}).cast_column("image", features["image"])
    rows.info.features = features
    monkeypatch.setattr("quantformer_hf.data.load_dataset", lambda *args, **kwargs: DatasetDict(train=rows))
    with pytest.raises(ValueError, match=r"the label column 'label' holds 12, and names \d+ classes"):
        load_image_data(DataArguments(dataset_name="owner/name", eval_fraction=0.5), seed=0)


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_files_are_read_from_urls(streaming, tmp_path):
    for split in ("train", "validation"):
        write_parquet(tmp_path, ["image", "label"], split)
    handler = partial(QuietHandler, directory=tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        files = {split: f"{url}/{split}-00000-of-00001.parquet" for split in ("train", "validation")}
        arguments = DataArguments(data_files=json.dumps(files), streaming=streaming)
        data = load_image_data(arguments, seed=0)
        assert [row["label"] for row in data.train] == [i % 2 for i in range(8)]
        assert data.label_names == ["a", "b"]
    finally:
        server.shutdown()
        server.server_close()


def test_a_folder_is_streamed(tmp_path):
    write_images(tmp_path)
    data = load_image_data(DataArguments(dataset_dir=str(tmp_path), streaming=True, max_eval_samples=2), seed=0)
    assert isinstance(data.train, IterableDataset)
    assert [row["label"] for row in data.train] == [0, 0, 0, 1, 1, 1]
    assert data.label_names == ["cat", "dog"]
    assert data.train_samples is None
    assert len(list(data.validation)) == 2
    arguments = DataArguments(dataset_dir=str(tmp_path), streaming=True, train_samples_per_epoch=5)
    assert load_image_data(arguments, seed=0).train_samples == 5


def test_an_epoch_of_a_stream_has_the_length_that_the_data_set_declares(tmp_path):
    write_parquet(tmp_path, ["image", "label"])
    write_parquet(tmp_path, ["image", "label"], "test")
    (tmp_path / "README.md").write_text(
        "---\ndataset_info:\n  features:\n  - name: image\n    dtype: image\n  - name: label\n    dtype:\n"
        "      class_label:\n        names:\n          '0': a\n          '1': b\n"
        "  splits:\n  - name: train\n    num_examples: 8\n  - name: test\n    num_examples: 8\n---\n"
    )
    data = load_image_data(DataArguments(dataset_dir=str(tmp_path), streaming=True), seed=0)
    assert data.train_samples == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mixup": -1}, "mixup is -1"),
        ({"eval_fraction": 0}, "eval_fraction is 0: choose more than 0 and less than 1, or name a split by eval_split"),
        ({"eval_fraction": 1.5}, "eval_fraction is 1.5"),
        ({"random_erasing": 1.5}, "random_erasing is 1.5: choose a probability"),
        ({"crop_scale": 0}, "crop_scale is 0"),
        ({"auto_augment": "rnd-m9"}, "auto_augment is 'rnd-m9', which timm does not know"),
        ({"train_samples_per_epoch": 5}, "is for --streaming"),
        ({"max_train_samples": 0}, "max_train_samples is 0: choose at least 1"),
        ({"data_files": "x.parquet"}, "data_files is not JSON"),
        ({"data_files": "{}"}, "by one of dataset_name"),
    ],
)
def test_values_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        DataArguments(dataset_name="digits", **arguments)


def test_what_holds_more_than_the_bytes_of_files_is_no_image():
    features = Features({"image": {"bytes": Value("binary"), "size": Value("int32")}})
    with pytest.raises(ValueError, match=r"the image column 'image' holds .*'size'.* the bytes of image files"):
        find_column(features, "image", "image", Image)
