"""Uploads by the real client to a hub on the loopback address, and what comes back from there."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers.utils.hub
from conftest import IMAGE_SIZE, make_batches, make_full_precision, make_quantized
from fake_hub import TOKEN, FakeHub
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from runs import run_as_typed, write_recipe
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessor, pipeline

from quantformer_hf import QuantformerForImageClassification, QuantformerTrainingArguments
from quantformer_hf.destination import Destination
from quantformer_hf.model_card import MARK


NAME = "user/tiny"

#: Stages whose models are pushed and loaded back.
PUSHED_STAGES = ("finetune", "packed")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process talks to, with an empty cache."""
    with FakeHub() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        # Its storage has servers of its own.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        api = HfApi(endpoint=served.url, token=TOKEN, library_name="transformers")
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", api)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture(params=PUSHED_STAGES)
def model(request):
    return make_model(request.param)


def make_model(stage="finetune"):
    model = make_quantized("vit", "finetune")
    model.image_processor = ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    return model.pack() if stage == "packed" else model


@torch.no_grad()
def logits(model):
    return model(pixel_values=make_batches(1)[0]).logits


def picture():
    return Image.effect_noise((IMAGE_SIZE, IMAGE_SIZE), 80).convert("RGB")


def test_what_was_pushed_is_loaded_by_its_name(hub, model):
    model.push_to_hub(NAME)
    assert set(hub.files(NAME)) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    loaded = AutoModelForImageClassification.from_pretrained(NAME)
    assert loaded.config.stage == model.config.stage
    assert torch.equal(logits(loaded), logits(model))
    assert AutoImageProcessor.from_pretrained(NAME).size["height"] == IMAGE_SIZE
    best = pipeline("image-classification", model=NAME)(picture(), top_k=1)
    assert best[0]["label"] in model.config.label2id


def test_large_files_go_through_lfs_once(hub):
    model = make_model()
    model.push_to_hub(NAME)
    assert hub.seen.count("PUT store") == 1
    assert hub.seen.count("POST commit") == 1
    model.push_to_hub("user/again")
    assert hub.seen.count("PUT store") == 1
    assert hub.files("user/again")["model.safetensors"] == hub.files(NAME)["model.safetensors"]


def test_sharded_files_come_back(hub, model):
    model.push_to_hub(NAME, max_shard_size="10KB")
    assert sum(path.endswith(".safetensors") for path in hub.files(NAME)) > 1
    loaded = AutoModelForImageClassification.from_pretrained(NAME)
    assert torch.equal(logits(loaded), logits(model))


def test_a_revision_is_a_model_of_its_own(hub, model):
    model.push_to_hub(NAME)
    main = hub.repositories[NAME].branches["main"]
    other = make_quantized("vit", "finetune", bit_width=2)
    other.push_to_hub(NAME, revision="two-bits")
    assert hub.repositories[NAME].branches["main"] == main
    for revision, expected in (("two-bits", other), ("main", model), (main, model)):
        loaded = AutoModelForImageClassification.from_pretrained(NAME, revision=revision)
        assert loaded.config.weight_bits == expected.config.weight_bits
        assert torch.equal(logits(loaded), logits(expected))
    with pytest.raises(OSError, match="three-bits"):
        AutoModelForImageClassification.from_pretrained(NAME, revision="three-bits")


def test_a_subfolder_is_a_model_of_its_own(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    api = HfApi(endpoint=hub.url, token=TOKEN)
    api.create_repo(NAME)
    api.upload_folder(repo_id=NAME, folder_path=tmp_path / "model", path_in_repo="w4a4")
    loaded = AutoModelForImageClassification.from_pretrained(NAME, subfolder="w4a4")
    assert torch.equal(logits(loaded), logits(model))
    assert AutoImageProcessor.from_pretrained(NAME, subfolder="w4a4").size["height"] == IMAGE_SIZE
    with pytest.raises(ValueError, match=r"config\.json"):
        AutoModelForImageClassification.from_pretrained(NAME)


def test_saving_with_push_to_hub_pushes_the_same_files(hub, model, tmp_path):
    model.push_to_hub(NAME)
    model.save_pretrained(tmp_path / "tiny", push_to_hub=True, repo_id="user/saved")
    assert hub.files("user/saved").keys() == hub.files(NAME).keys()
    assert hub.files("user/saved")["model.safetensors"] == hub.files(NAME)["model.safetensors"]
    assert (tmp_path / "tiny" / "README.md").exists()


@pytest.mark.slow
def test_a_run_pushes_its_packed_model_and_nothing_of_this_machine(hub, tmp_path, monkeypatch):
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "secret").mkdir()
    quick = {"stages": ["full_precision", "finetune"], "num_train_epochs": 1, "max_train_samples": 32}
    recipe = write_recipe(tmp_path / "secret", **quick, save_strategy="no", max_eval_samples=16)
    done = run_as_typed(recipe, "--push_to_hub", "True", "--hub_model_id", NAME)
    assert f"It is {NAME} on the hub" in done.stdout
    files = hub.files(NAME)
    assert files.keys() == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert not [name for name, content in files.items() if b"secret" in content]
    assert json.loads(files["config.json"])["stage"] == "packed"


def test_a_model_in_full_precision_is_pushed_with_its_own_card_and_without_its_stage(hub, tmp_path):
    stock = make_full_precision("vit")
    stock.save_pretrained(tmp_path)
    card = f"---\nlibrary_name: transformers\n---\n{MARK}\n"
    for name, text in {"README.md": card, "preprocessor_config.json": "{}", "stage.json": "{}"}.items():
        (tmp_path / name).write_text(text)
    Destination(NAME).created().push(str(tmp_path))
    files = hub.files(NAME)
    assert files.keys() == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert files["README.md"].decode() == card
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content]


@pytest.mark.parametrize("quantized", [True, False])
def test_a_hub_that_does_not_answer_is_told_before_the_run_and_after_it(hub, tmp_path, quantized, monkeypatch):
    (make_model() if quantized else make_full_precision("vit")).save_pretrained(tmp_path)
    destination = Destination(NAME).created()
    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", HfApi(endpoint=nowhere, token=TOKEN))
    with pytest.raises(OSError, match=r"cannot be reached \(ConnectError: .*leave out --push_to_hub"):
        destination.created()
    with pytest.raises(OSError, match=f"cannot be reached .*the model is in {tmp_path}; the same command pushes it"):
        destination.push(str(tmp_path))


@pytest.mark.parametrize("quantized", [True, False])
def test_a_model_goes_to_the_branch_that_is_named_of_a_repository_that_may_be_there(hub, tmp_path, quantized):
    (make_model() if quantized else make_full_precision("vit")).save_pretrained(tmp_path)
    destination = Destination(NAME, private=True, revision="other").created()
    assert hub.repositories[NAME].private is True
    assert destination.created() == destination
    HfApi(endpoint=hub.url, token=TOKEN).create_branch(NAME, branch="other")
    destination.push(str(tmp_path))
    assert "config.json" in hub.files(NAME, "other")
    assert not hub.files(NAME)


def test_what_a_run_is_told_of_the_hub_is_where_it_goes(tmp_path):
    told = {"push_to_hub": True, "report_to": "none", "use_cpu": True}
    assert Destination.of(QuantformerTrainingArguments(str(tmp_path / "tiny"), **told)) == Destination("tiny")
    told |= {"hub_model_id": NAME, "hub_private_repo": True, "hub_revision": "other"}
    expected = Destination(NAME, private=True, revision="other")
    assert Destination.of(QuantformerTrainingArguments(str(tmp_path), **told)) == expected
    assert Destination.of(QuantformerTrainingArguments(str(tmp_path), **told | {"push_to_hub": False})) is None


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_a_run_that_is_to_push_its_checkpoints_is_refused(tmp_path, strategy):
    told = {"push_to_hub": True, "hub_model_id": NAME, "report_to": "none", "use_cpu": True}
    assert Destination.of(QuantformerTrainingArguments(str(tmp_path), **told)) == Destination(NAME)
    with pytest.raises(ValueError, match=f"hub_strategy is '{strategy}', and a run pushes its last model alone"):
        Destination.of(QuantformerTrainingArguments(str(tmp_path), hub_strategy=strategy, **told))


def test_local_paths_stay_at_home(hub, tmp_path):
    make_full_precision("vit").save_pretrained(tmp_path / "secret")
    model = QuantformerForImageClassification.from_full_precision(tmp_path / "secret")
    model.push_to_hub(NAME)
    assert not [name for name, content in hub.files(NAME).items() if b"secret" in content]
    assert AutoConfig.from_pretrained(NAME).full_precision_name_or_path is None
    # One that was saved and pushed at once knows its teacher.
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="user/saved")
    assert not [name for name, content in hub.files("user/saved").items() if b"secret" in content]
    assert AutoConfig.from_pretrained(tmp_path / "saved").full_precision_name_or_path == str(tmp_path / "secret")
    model.config.full_precision_name_or_path = "user/full"
    model.push_to_hub(NAME)
    assert AutoConfig.from_pretrained(NAME).full_precision_name_or_path == "user/full"


def test_our_card_goes_along_with_its_results_and_a_hand_written_one_stays(hub):
    model = make_model()
    record = {"stage": "finetune", "source": "user/full", "dataset": "digits", "evaluation": {}, "recipe": {}}
    model.config.run_history = [record | {"results": {"finetune_accuracy": 0.5}}]
    model.push_to_hub(NAME, tags=["flowers"])
    card = ModelCard.load(NAME)
    assert MARK in card.text
    assert f'pipeline("image-classification", model="{NAME}")' in card.text
    assert "flowers" in card.data.tags
    assert card.data.eval_results[0].metric_value == 0.5
    loaded = AutoModelForImageClassification.from_pretrained(NAME)
    loaded.pack().push_to_hub(NAME)
    card = ModelCard.load(NAME)
    assert "packed integer codes" in card.text
    assert card.data.eval_results[0].metric_value == 0.5
    by_hand = str(card).replace(MARK, "My words.").encode()
    hub.repositories[NAME].commit("main", {"README.md": by_hand})
    loaded.push_to_hub(NAME)
    assert hub.files(NAME)["README.md"] == by_hand


def test_without_leave_to_write_nothing_is_uploaded(hub):
    with pytest.raises(HfHubHTTPError, match="401"):
        make_model().push_to_hub(NAME, token="hf_of_somebody_else")
    assert not hub.repositories


def test_the_client_asks_for_nothing_that_the_hub_of_the_tests_lacks(hub):
    make_model().push_to_hub(NAME)
    pipeline("image-classification", model=NAME)
    assert not hub.unknown


@pytest.mark.slow
@pytest.mark.parametrize("stage", PUSHED_STAGES)
def test_another_process_needs_nothing_but_the_import(hub, tmp_path, stage):
    make_model(stage).push_to_hub(NAME)
    picture().save(tmp_path / "image.png")
    script = (
        "import sys, quantformer_hf\nfrom transformers import pipeline\n"
        "print(pipeline('image-classification', model=sys.argv[1])(sys.argv[2], top_k=1)[0]['label'])"
    )
    # HF_TOKEN of the fixture goes along; xet would be asked for by the environment alone.
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-c", script, NAME, str(tmp_path / "image.png")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("LABEL_")
