"""A classifier keeps its class names, and another number of classes is new only on request."""

import pytest
import torch
from timm.data import ImageNetInfo
from timm_checkpoints import VIT, assert_same_logits, make_timm_model, save_timm_folder, save_torch
from transformers import ViTConfig, ViTModel

from quantformer_hf.checkpoints import load_full_precision


def test_a_classifier_of_1000_has_the_names_of_imagenet(tmp_path):
    path = save_torch(tmp_path / "deit_tiny_patch16_224.pth", make_timm_model("deit_tiny_patch16_224").state_dict())
    config = load_full_precision(path).model.config
    assert config.id2label[0] == "tench, Tinca tinca"
    assert config.id2label[134].startswith("crane: ")
    assert config.label2id == {label: index for index, label in config.id2label.items()}
    assert len(config.label2id) == 1000
    descriptions = ImageNetInfo().label_descriptions()
    assert [index for index in range(1000) if config.id2label[index] != descriptions[index]] == [134, 517]


def test_another_classifier_has_the_names_that_are_saved_or_given(tmp_path):
    model = make_timm_model("vit_tiny_patch16_224", num_classes=3, **VIT)
    path = save_torch(tmp_path / "vit_tiny_patch16_224.pth", model.state_dict())
    assert load_full_precision(path).model.config.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    names = {0: "ant", 1: "bee", 2: "cat"}
    given = load_full_precision(path, id2label=names)
    assert given.model.config.id2label == names
    assert load_full_precision(path, label2id={"ant": 0, "bee": 1, "cat": 2}).model.config.id2label == names
    assert_same_logits(given, model)
    folder = save_timm_folder(tmp_path, "vit_tiny_patch16_224", model, VIT, label_names=["ant", "bee", "cat"])
    assert load_full_precision(folder).model.config.id2label == names


@pytest.fixture(params=["file", "folder", "transformers"])
def three_classes(request, tmp_path):
    """A checkpoint of three classes in each form."""
    name = "deit_tiny_distilled_patch16_224"
    model = make_timm_model(name, num_classes=3, **VIT)
    if request.param == "file":
        return save_torch(tmp_path / f"{name}.pth", {"model": model.state_dict()})
    folder = save_timm_folder(tmp_path / "timm", name, model, VIT)
    if request.param == "transformers":
        load_full_precision(folder).model.save_pretrained(tmp_path / "transformers")
        return tmp_path / "transformers"
    return folder


def test_a_classifier_of_another_size_is_new_only_on_request(three_classes, caplog):
    names = dict(enumerate("abcd"))
    with pytest.raises(ValueError, match="has 3 classes, and 4 are asked for: pass ignore_mismatched_sizes=True"):
        load_full_precision(three_classes, id2label=names)
    before = load_full_precision(three_classes).model
    caplog.clear()
    model = load_full_precision(three_classes, id2label=names, ignore_mismatched_sizes=True).model
    assert any(record.name.startswith("quantformer_hf") for record in caplog.records)
    assert model.config.id2label == names
    assert model.num_labels == model.config.num_labels == 4
    for classifier in (model.cls_classifier, model.distillation_classifier):
        assert classifier.weight.shape == (4, 192)
        assert 0.005 < classifier.weight.std() < 0.05
    encoder = model.deit.state_dict()
    assert all(torch.equal(encoder[name], tensor) for name, tensor in before.deit.state_dict().items())
    assert load_full_precision(three_classes, num_labels=2, ignore_mismatched_sizes=True).model.num_labels == 2


def test_an_encoder_without_a_classifier_gets_one_on_request(tmp_path):
    model = make_timm_model("vit_tiny_patch16_224", num_classes=0, **VIT)
    path = save_torch(tmp_path / "vit_tiny_patch16_224.pth", model.state_dict())
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, image_size=32)
    ViTModel(config).save_pretrained(tmp_path / "encoder")
    for source in (path, tmp_path / "encoder"):
        with pytest.raises(ValueError, match="it has no classifier"):
            load_full_precision(source)
        new = load_full_precision(source, id2label={0: "a", 1: "b", 2: "c"}, ignore_mismatched_sizes=True)
        assert new.model.classifier.out_features == 3
