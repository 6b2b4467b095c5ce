"""The method earns its name: at two bits, and with equal data, steps and distillation, it beats plain LSQ."""

import pytest
import torch
import torch.nn.functional as F
from runs import ROOT, run
from transformers import AutoImageProcessor, AutoModelForImageClassification

from quantformer_hf.arguments import DataArguments
from quantformer_hf.data import load_image_data
from quantformer_hf.images import TransformedImages


STEPS = 24

#: Of both. At two bits the preset moves weights at four times the learning rate.
FLAGS = [
    *("--preset", "lightning", "--dataset_name", "digits", "--crop_scale", "0.7", "--horizontal_flip", "0"),
    *("--bit_width", "2", "--per_device_train_batch_size", "64", "--learning_rate", "2.5e-4", "--save_strategy", "no"),
    *("--report_to", "none", "--seed", "0", "--use_cpu", "True"),
]
PLAIN_LSQ = [
    *("--stages", "pretrain", "--centre_channels", "False", "--rotate_channels", "False"),
    *("--reconstruction_samples", "0", "--feature_weight", "0", "--aux_weight", "0", "--block_gradient_scale", "1"),
]


@torch.no_grad()
def divergence(folder, teacher_folder) -> float:
    """Mean KL divergence of the predictions from the teacher's, on the held-out digits."""
    data = load_image_data(DataArguments(dataset_name="digits"), seed=0)
    images = TransformedImages(data.validation, data, AutoImageProcessor.from_pretrained(teacher_folder))
    pixel_values = torch.stack([row["pixel_values"] for row in images.__getitems__(range(len(images)))])
    student, teacher = (
        AutoModelForImageClassification.from_pretrained(path)(pixel_values).logits.log_softmax(1)
        for path in (folder, teacher_folder)
    )
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True).item()


@pytest.mark.slow
def test_ours_is_nearer_to_full_precision_than_distilled_lsq_at_two_bits(tmp_path):
    recipe = ROOT / "configs" / "quickstart.yaml"
    epochs = ["--full_precision.num_train_epochs", "15", "--save_strategy", "no", "--use_cpu", "True"]
    run(recipe, "--stages", "full_precision", *epochs, "--output_dir", tmp_path)
    teacher = tmp_path / "full_precision"
    start = [*FLAGS, "--model_name_or_path", teacher]
    run(*start, *PLAIN_LSQ, "--max_steps", STEPS, "--output_dir", tmp_path / "lsq")
    run(*start, "--max_steps", STEPS, "--output_dir", tmp_path / "ours")
    lsq = divergence(tmp_path / "lsq" / "pretrain", teacher)
    ours = divergence(tmp_path / "ours" / "finetune", teacher)
    print(f"KL divergence from the teacher: LSQ {lsq:.3f}, ours {ours:.3f}")
    assert ours < lsq
