"""The average of the weights; and with it, that a run with every part of the recipe resumes bit for bit."""

import pytest
import torch
from conftest import IMAGE_SIZE, NUM_LABELS, make_full_precision, make_quantized
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState, ViTImageProcessor

from quantformer_hf import QuantformerTrainer, QuantformerTrainingArguments
from quantformer_hf.augmentation import Collator, train_transform
from quantformer_hf.data import DataArguments, ImageData, load_image_data
from quantformer_hf.ema import EMA_FILE, EmaCallback
from quantformer_hf.images import TransformedImages
from quantformer_hf.metrics import compute_metrics, rank_and_loss
from quantformer_hf.streaming import StreamedTrainingImages


PROCESSOR = ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


class Weights(TrainerCallback):
    """The weights at the start and after each step."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.seen.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    on_step_end = on_train_begin


def small_digits(streaming=False) -> ImageData:
    """24 images of the first classes."""
    data = load_image_data(DataArguments(dataset_name="digits"), seed=0)
    few = data.train.filter(lambda row: row["label"] < NUM_LABELS).select(range(24))
    data.train, data.validation, data.train_samples = few.to_iterable_dataset(2) if streaming else few, few, 24
    return data


def make_trainer(folder, streaming=False, **arguments):
    data = small_digits(streaming)
    augment = train_transform(PROCESSOR, DataArguments("digits", auto_augment="rand-m9-mstd0.5-inc1"))
    arguments = QuantformerTrainingArguments(
        folder,
        report_to="none",
        use_cpu=True,
        per_device_train_batch_size=8,
        max_steps=8,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=5,
        label_smoothing_factor=0.1,
        **arguments,
    )
    place = {"batch_size": 8, "num_processes": 1, "process_index": 0}
    images = (
        StreamedTrainingImages(data, augment, 0, **place)
        if streaming
        else TransformedImages(data.train, data, PROCESSOR, augment)
    )
    return QuantformerTrainer(
        make_full_precision(),
        arguments,
        train_dataset=images,
        eval_dataset=None if streaming else TransformedImages(data.validation, data, PROCESSOR),
        data_collator=Collator(NUM_LABELS, mixup=0.8, cutmix=1.0, label_smoothing=0.1),
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=rank_and_loss,
    )


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_average_is_evaluated_and_kept_and_training_goes_on_from_the_weights(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=0.5)
    weights = Weights()
    trainer.add_callback(weights)
    trainer.train()
    expected = weights.seen[0]
    for step in weights.seen[1:]:
        expected = {name: 0.5 * expected[name] + 0.5 * step[name] for name in expected}
    ended = trainer.model.state_dict()
    assert all(torch.allclose(ended[name], expected[name], atol=1e-6) for name in expected)
    assert not same(ended, weights.seen[-1])
    # A checkpoint has both.
    checkpoint = tmp_path / "checkpoint-5"
    assert same(type(trainer.model).from_pretrained(checkpoint).state_dict(), weights.seen[5])
    average = load_file(checkpoint / EMA_FILE)
    assert average.keys() == weights.seen[5].keys()
    assert not same(average, weights.seen[5])


def test_evaluation_during_training_sees_the_average():
    callback = EmaCallback(0.5)
    model = make_full_precision()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    callback.start(model)
    with torch.no_grad():
        model.classifier.bias += 1
    callback.on_step_end(None, None, None, model=model)
    with callback.applied(model):
        assert torch.allclose(model.classifier.bias, before["classifier.bias"] + 0.5)
    assert torch.allclose(model.classifier.bias, before["classifier.bias"] + 1)


def test_of_scales_magnitudes_are_averaged():
    model, callback = make_quantized("vit"), EmaCallback(0.5)
    name = "backbone.classifier.weight_quantizer.scale"
    before = model.get_parameter(name).clone()
    with torch.no_grad():
        model.get_parameter(name).mul_(-1)
    callback.start(model)
    with torch.no_grad():
        model.get_parameter(name).mul_(-3)
    callback.on_step_end(None, None, None, model=model)
    assert torch.allclose(callback.average.module.get_parameter(name), 2 * before)
    with torch.no_grad():
        model.get_parameter(name).mul_(-1)
    callback.on_step_end(None, None, None, model=model)
    assert torch.allclose(callback.average.module.get_parameter(name), 2.5 * before)
    # What is trained keeps its sign, with which the optimizer's moments go.
    assert torch.equal(model.get_parameter(name), -3 * before)


def test_a_run_that_begins_again_begins_its_average_anew():
    model, callback, state = make_quantized("vit"), EmaCallback(0.5), TrainerState()
    # By a run that broke off.
    callback.start(model)
    left = callback.average
    state.global_step = 2
    callback.on_train_begin(None, state, None, model=model)
    assert callback.average is left
    state.global_step = 0
    with torch.no_grad():
        model.get_parameter("backbone.classifier.bias").add_(1)
    callback.on_train_begin(None, state, None, model=model)
    own = callback.average.module.get_parameter("backbone.classifier.bias")
    assert torch.equal(own, model.get_parameter("backbone.classifier.bias"))


def test_the_average_starts_anew_when_the_groups_are_frozen():
    model = make_quantized(stage="search")
    callback = EmaCallback(0.9)
    callback.start(model)
    model.freeze_groups()
    callback.on_stage_switch(None, None, None, stage="finetune", model=model)
    with callback.applied(model):
        assert model.config.stage == "finetune"
    assert same(callback.average.module.state_dict(), model.state_dict())


@pytest.mark.parametrize("streaming", [False, True])
def test_with_all_of_the_recipe_a_run_resumes_bit_for_bit_within_a_later_epoch(streaming, tmp_path):
    # Three steps an epoch: step 5 is in the middle of the second.
    recipe = {"ema_decay": 0.9, "drop_path_rate": 0.2, "repeated_augmentation": 1 if streaming else 3}
    whole = make_trainer(tmp_path, streaming, **recipe)
    whole.train()
    resumed = make_trainer(tmp_path, streaming, **recipe)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert same(whole.model.state_dict(), resumed.model.state_dict())


def test_a_checkpoint_without_an_average_is_refused(tmp_path):
    make_trainer(tmp_path).train()
    with pytest.raises(ValueError, match=r"has no ema\.safetensors: resume without ema_decay"):
        make_trainer(tmp_path, ema_decay=0.9).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ema_decay": 1.0}, "ema_decay is 1.0"),
        ({"ema_decay": 0.9, "save_only_model": True}, "save_only_model"),
        ({"repeated_augmentation": 0}, "repeated_augmentation is 0"),
        ({"repeated_augmentation": 3, "balance_classes": True}, "both say how often an image is drawn: leave out one"),
    ],
)
def test_values_out_of_range_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantformerTrainingArguments("out", **arguments)
