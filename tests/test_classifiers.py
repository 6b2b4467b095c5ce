"""The classifier that a stage starts from, and the classes of the data set."""

import itertools
import logging

import pytest
import torch
from conftest import IMAGE_SIZE, NUM_LABELS, make_full_precision, make_quantized
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from timm.data import ImageNetInfo
from timm_checkpoints import VIT, make_timm_model, save_torch
from transformers import ViTForImageClassification, ViTImageProcessor, ViTModel

from quantformer_hf.arguments import ModelArguments
from quantformer_hf.checkpoints import imagenet_class_names
from quantformer_hf.class_names import numbers_among
from quantformer_hf.classifiers import build_full_precision, load_classifier
from quantformer_hf.data import ImageData
from quantformer_hf.images import TransformedImages
from quantformer_hf.labels import IGNORED_LABEL
from quantformer_hf.streaming import StreamedEvaluationImages, StreamedTrainingImages


NAMES = ["ant", "bee", "cat", "dog", "elk"]


def data_of(*names: str) -> ImageData:
    return ImageData(None, None, "image", "label", list(names), None, 10)


def save(folder, model, names=None, **processor):
    """A checkpoint with its image processor; its classes have no names of their own unless they are given."""
    if names is not None:
        model.config.id2label = dict(enumerate(names))
        model.config.label2id = {name: index for index, name in enumerate(names)}
    model.save_pretrained(folder)
    ViTImageProcessor(**({"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}} | processor)).save_pretrained(folder)
    return str(folder)


def load(name, *names, new=False):
    return load_classifier(name, data_of(*names), ModelArguments(ignore_mismatched_sizes=new))[0]


def names_of(model):
    config = model.config
    assert config.label2id == {name: index for index, name in config.id2label.items()}
    assert getattr(config, "backbone_config", config).id2label == config.id2label
    return [config.id2label[index] for index in range(config.num_labels)]


@pytest.mark.parametrize("names", [NAMES[:2], NAMES])
@pytest.mark.parametrize("form", ["transformers", "timm"])
def test_an_encoder_alone_gets_a_classifier_on_request(form, names, tmp_path):
    if form == "transformers":
        source = save(tmp_path, ViTModel(make_full_precision().config))
    else:
        model = make_timm_model("vit_tiny_patch16_224", num_classes=0, **VIT)
        source = str(save_torch(tmp_path / "vit_tiny_patch16_224.pth", model.state_dict()))
    assert names_of(load(source, *names, new=True)) == names
    with pytest.raises(ValueError, match=r"it has no classifier .*by labels first, as the stage full_precision does"):
        load(source, *names)


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("make", [make_full_precision, make_quantized])
def test_a_classifier_without_names_gets_those_of_the_data_set(make, new, tmp_path, caplog):
    model = make()
    source = save(tmp_path, model)
    with caplog.at_level(logging.WARNING, "quantformer_hf"):
        loaded = load(source, *NAMES, new=new)
    assert names_of(loaded) == NAMES
    assert not caplog.records
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("make", [make_full_precision, make_quantized])
def test_other_names_are_told_and_the_flag_says_whose_count(make, new, tmp_path, caplog):
    model = make()
    others = ["plane", "car", "bird", "cat", "deer"]
    source = save(tmp_path, model, others)
    with caplog.at_level(logging.WARNING, "quantformer_hf"):
        loaded = load(source, *NAMES, new=new)
    assert "other class names (class 0 is 'plane' and 'ant', class 1 is 'car' and 'bee'" in caplog.text
    assert names_of(loaded) == (NAMES if new else others)
    # The same classes may have two names each: what the classifier knows is not thrown away.
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def test_a_quantized_checkpoint_says_its_own_architecture(tmp_path):
    source, told = save(tmp_path, make_quantized(), NAMES), {"architecture": "vit_tiny_patch16_224"}
    with pytest.raises(ValueError, match="is quantized and says its own: leave it out"):
        load_classifier(source, data_of(*NAMES), ModelArguments(model_name_or_path=source, **told))
    load_classifier(source, data_of(*NAMES), ModelArguments(model_name_or_path="what_it_was_made_of", **told))


def test_a_swin_takes_images_of_another_size(tmp_path):
    source = save(tmp_path, make_full_precision("swin"), NAMES, size={"height": 24, "width": 24})
    assert names_of(load(source, *NAMES)) == NAMES


def test_a_name_in_common_is_enough_and_some_may_be_spelled_otherwise(tmp_path, caplog):
    source = save(tmp_path, make_full_precision(), ["Ant, emmet", "honeybee", "cat: a pet", "hound, dog", "moose, elk"])
    with caplog.at_level(logging.WARNING, "quantformer_hf"):
        load(source, *NAMES)
    assert not caplog.records


def test_another_number_of_classes_is_new_on_request_and_has_the_names_of_the_data_set(tmp_path):
    source = save(tmp_path, make_full_precision(), NAMES)
    assert names_of(load(source, "yes", "no", new=True)) == ["yes", "no"]
    with pytest.raises(ValueError, match="data set 2, not all by names of the former: give --ignore_mismatched_sizes"):
        load(source, "yes", "no")
    with pytest.raises(ValueError, match="has 5 classes and the data set 2, not all by names of the former"):
        load(source, "cat", "no")


@pytest.mark.parametrize("make", [make_full_precision, make_quantized])
def test_classes_in_another_order_or_not_all_there_get_the_numbers_of_the_checkpoint(make, tmp_path, caplog):
    model = make()
    source = save(tmp_path, model, NAMES)
    with caplog.at_level(logging.INFO, "quantformer_hf"):
        loaded = load_classifier(source, data_of("dog", "bee"), ModelArguments())
    assert "the data set's 2 classes are numbered as the 5 of" in caplog.text
    assert loaded.data.label_names == NAMES == names_of(loaded.model)
    # Rows without a class stay such.
    assert [loaded.data.class_of(label) for label in (0, 1, -1, IGNORED_LABEL, None)] == [3, 1, -1, IGNORED_LABEL, None]
    with pytest.raises(ValueError, match="label 2 in 'label' is outside of its 2 classes"):
        loaded.data.class_of(2)
    for new in (False, True):
        loaded = load_classifier(source, data_of(*reversed(NAMES)), ModelArguments(ignore_mismatched_sizes=new))
        assert loaded.data.label_names == NAMES == names_of(loaded.model)
        assert all(torch.equal(tensor, loaded.model.state_dict()[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("bad", [(), (1,)])
def test_images_are_read_with_the_numbers_of_the_checkpoint(bad):
    features = Features({"image": Image(), "label": ClassLabel(names=["dog", "bee"])})
    pictures = [{"bytes": b"none", "path": None} if i in bad else PILImage.new("RGB", (4, 4)) for i in range(4)]
    rows = Dataset.from_dict({"image": pictures, "label": [0, 1, 1, 0]}, features=features)
    processor = ViTImageProcessor(size={"height": 4, "width": 4})
    of = {"image_column": "image", "label_column": "label", "train_samples": 4, "shuffle_buffer_size": 1}
    numbers = {"label_names": NAMES, "numbers": [3, 1]}
    data = ImageData(rows, rows, **of, **numbers)
    stream = ImageData(rows.to_iterable_dataset(1), rows.to_iterable_dataset(1), **of, **numbers)
    place = {"batch_size": 4, "num_processes": 1, "process_index": 0}

    def augment(image, key):
        return torch.zeros(3, 4, 4)

    evaluated = TransformedImages(data.validation, data, processor)
    assert evaluated.labels == [3, 1, 1, 3]
    for images in (evaluated, StreamedEvaluationImages(stream, processor, **place)):
        expected = [IGNORED_LABEL if i in bad else label for i, label in enumerate([3, 1, 1, 3])]
        assert [row["labels"] for row in images] == expected
    for images in (
        TransformedImages(data.train, data, processor, augment),
        StreamedTrainingImages(stream, augment, 0, **place),
    ):
        assert {row["labels"] for row in itertools.islice(images, 4)} == {3, 1}


IMAGENET = imagenet_class_names()


@pytest.mark.parametrize(
    ("own", "names", "numbers"),
    [
        (NAMES, ["Cat", "ANT"], [2, 0]),
        (["Ant, emmet", "bee", "bee, drone"], ["emmet", "drone"], [0, 2]),
        # A whole name before a part of another one, and a part of two for neither.
        (["ant", "bee", "bee, drone"], ["bee"], [1]),
        (["ant, drone", "bee, drone"], ["drone"], None),
        (["ant", "bee, drone"], ["bee", "drone"], None),
        (["LABEL_0", "LABEL_1"], ["ant", "bee"], None),
        (IMAGENET, ["n03445777", "n01440764"], [574, 0]),
        # Names of the hub's imagenette; and the two cranes, that have the same word and other numbers.
        (IMAGENET, ["tench", "English springer", "chain saw", "church"], [0, 217, 491, 497]),
        (IMAGENET, ["crane"], None),
        (IMAGENET, ["n02012849", "n03126707"], [134, 517]),
        (["crane" if name.startswith("crane:") else name for name in IMAGENET], ["n02012849", "n03126707"], [134, 517]),
    ],
)
def test_classes_are_found_by_any_name_that_no_other_has(own, names, numbers):
    assert numbers_among(own, names) == numbers


def test_imagenet_by_its_numbers_stays_in_its_order():
    assert numbers_among(IMAGENET, ImageNetInfo().label_names()) == list(range(1000))
    assert numbers_among(ImageNetInfo().label_descriptions(), ImageNetInfo().label_names()) == list(range(1000))


@pytest.mark.parametrize("make", [make_full_precision, make_quantized])
def test_a_processor_that_does_not_fit_the_model_is_told_before_any_image(make, tmp_path):
    source = save(tmp_path, make(), NAMES, size={"height": 20, "width": 20})
    with pytest.raises(ValueError, match="takes images of 16 x 16, and its ViTImageProcessor makes 20 x 20"):
        load(source, *NAMES)
    source = save(tmp_path, make(), NAMES, size={"shortest_edge": 16})
    with pytest.raises(ValueError, match="makes images of many sizes"):
        load(source, *NAMES)


def test_a_model_of_gray_images_is_refused(tmp_path):
    config = make_full_precision().config
    config.num_channels = 1
    source = save(tmp_path, ViTForImageClassification(config), NAMES)
    with pytest.raises(
        ValueError, match=r"takes images of 1 channels, and those of a data set are decoded to 3 \(RGB\)"
    ):
        load(source, *NAMES)
    with pytest.raises(ValueError, match="backbone_config takes images of 1 channels"):
        build_full_precision({"num_channels": 1}, data_of(*NAMES))


def test_an_architecture_is_for_a_file(tmp_path):
    folder = save(tmp_path / "source", make_full_precision())
    told = ModelArguments(model_name_or_path=folder, architecture="vit_tiny_patch16_224")
    data = data_of(*(f"LABEL_{index}" for index in range(NUM_LABELS)))
    with pytest.raises(TypeError, match="architecture is for a single file"):
        load_classifier(folder, data, told)
    # A later stage starts from the folder of an earlier one, and is told the same.
    load_classifier(save(tmp_path / "stage", make_full_precision()), data, told)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_checkpoint_without_a_processor_says_what_to_save(quantized, tmp_path):
    (make_quantized("vit", "finetune") if quantized else make_full_precision()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no image processor: save one beside it"):
        load(str(tmp_path), *(f"LABEL_{index}" for index in range(NUM_LABELS)))
