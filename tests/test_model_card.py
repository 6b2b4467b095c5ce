"""The model card: what it states was so, and what was not measured is not stated."""

import json

import pytest
import torch
from conftest import IMAGE_SIZE, make_batches, make_full_precision, make_quantized
from huggingface_hub import ModelCard
from transformers import (
    AutoModelForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)

from quantformer_hf import QuantformerForImageClassification, QuantformerTrainer, QuantformerTrainingArguments
from quantformer_hf.model_card import MARK, add_to_model_card, write_model_card
from quantformer_hf.run_history import UNRECORDED, history_in, hub_id, is_local, record_of


def told(**changes):
    arguments = {
        "dataset_name": "user/flowers",
        "dataset_dir": None,
        "learning_rate": 1e-4,
        "num_train_epochs": 3,
        # A folder of the user's own machine, which no card may tell.
        "output_dir": "/home/somebody/out",
        "source": "user/deit",
    }
    return arguments | changes


def history():
    return [
        record_of("pretrain", told(), {"full_precision_accuracy": 0.9, "pretrain_accuracy": 0.8}),
        record_of("finetune", told(source="/home/somebody/out/pretrain"), {"finetune_accuracy": 0.85}),
    ]


def recorded(stage="finetune", **arguments):
    model = make_quantized("vit", stage, **arguments)
    model.config.run_history = history()
    return model


def saved_card(model, folder):
    model.save_pretrained(folder)
    return ModelCard.load(folder / "README.md")


def test_a_folder_is_no_model_of_the_hub_from_wherever_one_looks(tmp_path, monkeypatch):
    finetune = tmp_path / "out" / "finetune"
    finetune.mkdir(parents=True)
    written = {"arguments": told(source="models/deit"), "results": {}, "source_digest": None}
    for local, source in ((True, None), (False, "models/deit")):
        (finetune / "stage.json").write_text(json.dumps(written | {"local_source": local}))
        assert [record["source"] for record in history_in(finetune)] == [source]
    (tmp_path / "models" / "deit").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_local("models/deit")
    assert not is_local("models/vit")
    assert not is_local(None)


def test_a_model_without_a_run_claims_no_result(tmp_path, backbone, stage):
    card = saved_card(make_quantized(backbone, stage), tmp_path)
    data = card.data.to_dict()
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-classification"
    assert "quantformer" in data["tags"]
    assert not {"model-index", "metrics", "datasets", "base_model"} & set(data)
    assert "| linears of the blocks | 4 bits | 4 bits |" in card.text
    for section in ("## Accuracy", "## How it was made", "speed", "None"):
        assert section not in card.text
    assert "## Size" in card.text
    assert "10.1109/TPAMI.2022.3229313" in card.text


def test_results_and_recipes_of_a_run_are_in_text_and_metadata(tmp_path):
    card = saved_card(recorded(), tmp_path)
    data = card.data.to_dict()
    assert data["base_model"] == "user/deit"
    assert data["base_model_relation"] == "quantized"
    assert data["datasets"] == ["user/flowers"]
    assert data["metrics"] == ["accuracy"]
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 0.85, "user/flowers")
    for row in ("| full precision | 90.00 % |", "| finetune | 85.00 % |"):
        assert row in card.text
    assert "- **pretrain**: started from user/deit, num_train_epochs 3, learning_rate 0.0001" in card.text


def test_the_widths_of_every_part_are_stated(tmp_path):
    layer_bits = {"*.mlp.fc1": {"weight_bits": 2}, "vit.layers.0.attention.o_proj": 8}
    model = make_quantized(
        "vit",
        "finetune",
        weight_bits=1,
        activation_bits=3,
        attention_bits=None,
        classifier_bits=32,
        layer_bits=layer_bits,
    )
    text = saved_card(model, tmp_path).text
    for row in (
        "# ViT mixed precision",
        "| linears of the blocks | 1 to 8 bits, by layer | 3 to 8 bits, by layer |",
        "| attention products: q, k, v and probabilities |  | floating point |",
        "| patch embedding | 8 bits | 8 bits |",
        "| classifier | floating point | floating point |",
        "assigned to 4 groups",
    ):
        assert row in text


@pytest.mark.parametrize(
    ("arguments", "rows", "missing"),
    [
        (
            {"layer_bits": {"*": 6}},
            ["# ViT W6A6", "| linears of the blocks | 6 bits | 6 bits |", "| classifier | 6 bits | 6 bits |"],
            "W4A4",
        ),
        (
            {"activation_bits": 32},
            ["# ViT W4A32", "| linears of the blocks | 4 bits | floating point |", "packed integer codes"],
            "groups, each with a scale",
        ),
        (
            {"layer_bits": {"*.mlp.fc2": {"activation_bits": 32}}},
            [
                "| linears of the blocks | 4 bits | 4 bits or floating point, by layer |",
                "each quantized linear of a block",
            ],
            "W4A4",
        ),
        (
            {"bit_width": 32, "attention_bits": 32, "embedding_bits": 32, "classifier_bits": 32},
            ["# ViT W32A32", "The file holds the weights in floating point: none is quantized."],
            "packed integer codes",
        ),
    ],
)
def test_a_card_claims_what_is_there(tmp_path, arguments, rows, missing):
    text = saved_card(make_quantized("vit", "finetune", **arguments).pack(), tmp_path).text
    for row in rows:
        assert row in text
    assert missing not in text


def test_the_card_shows_how_to_load_what_is_there(tmp_path):
    model = make_quantized("vit", "finetune")
    without = saved_card(model, tmp_path / "without").text
    code = without.split("```python\n")[1].split("```")[0]
    assert "pipeline" not in code
    assert "No image processor was saved" in without
    names = {"pixel_values": make_batches(1)[0]}
    exec(code.replace("path/to/this/folder", str(tmp_path / "without")), names)
    assert torch.equal(names["logits"], model(make_batches(1)[0]).logits)
    assert f"(batch, 3, {IMAGE_SIZE}, {IMAGE_SIZE})" in code

    # Of other images, too.
    config = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, num_labels=2)
    config.image_size, config.patch_size, config.num_channels = [16, 24], 8, 1
    grey = QuantformerForImageClassification.from_full_precision(ViTForImageClassification(config))
    assert "# (batch, 1, 16, 24), made as" in saved_card(grey, tmp_path / "grey").text

    # A trainer saves it by itself, after the model.
    arguments = QuantformerTrainingArguments(output_dir=str(tmp_path / "run"), report_to="none")
    processor = ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    QuantformerTrainer(model, arguments, processing_class=processor).save_model(tmp_path / "trained")
    trained = (tmp_path / "trained" / "README.md").read_text()
    assert 'pipeline("image-classification", model="path/to/this/folder")' in trained
    assert "No image processor" not in trained
    pipeline("image-classification", model=str(tmp_path / "trained"))


def test_a_packed_model_keeps_its_results_and_states_both_sizes(tmp_path):
    recorded().save_pretrained(tmp_path / "finetune")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "finetune")
    card = saved_card(model.pack(), tmp_path / "packed")
    assert card.data.eval_results[0].metric_value == 0.85
    full = 4 * sum(parameter.numel() for parameter in make_full_precision("vit").parameters())
    assert f"in float32 have {full / 1e6:.2f} MB" in card.text
    assert "packed integer codes" in card.text


@pytest.mark.parametrize("change", ["train", "reconstruct"])
def test_a_model_that_was_changed_since_has_no_result_of_its_own(tmp_path, change):
    model = recorded()
    if change == "train":
        model.train()
    else:
        model.reconstruct(make_batches(1))
    assert [record["stage"] for record in model.config.run_history] == ["pretrain", "finetune", UNRECORDED]
    card = saved_card(model.eval(), tmp_path)
    assert card.data.eval_results is None
    assert "The model was changed since, and has not been evaluated" in card.text
    assert "| finetune | 85.00 % |" in card.text


def test_no_local_path_gets_into_a_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_full_precision("vit").save_pretrained("user/model")
    assert hub_id("user/model") is None
    model = QuantformerForImageClassification.from_full_precision("user/model")
    monkeypatch.chdir(tmp_path / "user")
    model.config.run_history = [
        record_of("pretrain", told(source=str(tmp_path), dataset_name=str(tmp_path)), {"pretrain_accuracy": 0.5})
    ]
    card = saved_card(model, tmp_path / "out")
    assert str(tmp_path) not in str(card)
    assert "user/model" not in str(card)
    assert card.data.eval_results[0].dataset_type == "custom"
    assert "datasets" not in card.data.to_dict()


@pytest.mark.parametrize("name", ["/home/me/model", "./model", "out/a/b", "plain", "~/model", "a/b c", None])
def test_what_is_no_hub_id(name):
    assert hub_id(name) is None


def test_a_full_precision_stage_has_a_card_without_quantization(tmp_path):
    model = make_full_precision("swin")
    model.save_pretrained(tmp_path)
    write_model_card(tmp_path, model.config, [record_of("full_precision", told(), {"full_precision_accuracy": 0.9})])
    card = ModelCard.load(tmp_path / "README.md")
    assert "| full precision | 90.00 % |" in card.text
    assert "import quantformer_hf" not in card.text
    assert "quantformer" not in card.data.tags
    assert card.data.eval_results[0].metric_value == 0.9


def test_a_card_written_by_hand_is_kept_and_ours_is_renewed_with_its_license(tmp_path):
    model = make_quantized("vit", "finetune")
    saved_card(model, tmp_path)
    add_to_model_card(tmp_path, "flowers", license="mit")
    model.config.run_history = history()
    card = saved_card(model, tmp_path)
    assert card.data.license == "mit"
    assert {"flowers", "low-bit"} <= set(card.data.tags)
    assert card.data.eval_results
    own = (tmp_path / "README.md").read_text().replace(MARK, "My words.")
    (tmp_path / "README.md").write_text(own)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == own


@pytest.mark.parametrize("content", [b"caf\xe9", b"---\n- a\n---\n", b"---\na: [\n---\n"])
@pytest.mark.parametrize("ours", [False, True])
def test_what_is_no_card_does_not_take_the_model_with_it(content, ours, tmp_path):
    content += f"\n{MARK}\n".encode() if ours else b""
    (tmp_path / "README.md").write_bytes(content)
    make_quantized("vit", "finetune").save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert ((tmp_path / "README.md").read_bytes() == content) is not ours
    add_to_model_card(tmp_path, "flowers")


def test_the_trainers_draft_of_a_card_does_not_replace_ours(tmp_path):
    args = QuantformerTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = QuantformerTrainer(recorded(), args)
    trainer.save_model()
    trainer.create_model_card(model_name="tiny", tags=["flowers"], license="mit")
    card = ModelCard.load(tmp_path / "README.md")
    assert MARK in card.text
    assert card.data.license == "mit"
    assert "flowers" in card.data.tags
    assert card.data.eval_results[0].metric_value == 0.85


def test_a_card_tells_no_path_of_the_machine_that_made_it(tmp_path):
    text = saved_card(recorded(), tmp_path).text
    assert "## How it was made" in text
    assert "/home/somebody" not in text
    assert "/home/somebody" not in (tmp_path / "config.json").read_text()
