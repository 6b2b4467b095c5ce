"""What a trainer is told."""

import pytest
from conftest import make_quantized

from quantformer_hf import QuantformerTrainer, QuantformerTrainingArguments


def test_one_process_trains_on_one_gpu(tmp_path, caplog):
    arguments = QuantformerTrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    assert arguments.n_gpu <= 1
    arguments._n_gpu = 2
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, arguments.per_device_train_batch_size)
    trainer = QuantformerTrainer(make_quantized("vit"), arguments)
    assert trainer.args.n_gpu == 1
    assert "accelerate launch --num_processes 2" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"hub_token": "hf_secret"}, "training_args.bin, which is pushed: set HF_TOKEN"),
        ({"bf16_full_eval": True}, "casts the model itself.*--bf16 computes"),
        ({"search_steps": 2, "learning_rate": 0.0}, "learning_rate is 0"),
    ],
)
def test_what_would_spoil_a_run_is_refused_before_it(tmp_path, arguments, said):
    with pytest.raises(ValueError, match=said):
        QuantformerTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, **arguments)


def test_arguments_come_back_from_what_was_written_of_them(tmp_path):
    written = QuantformerTrainingArguments(str(tmp_path), report_to="none", use_cpu=True, aux_weight=2.0).to_dict()
    assert QuantformerTrainingArguments(**written).aux_weight == 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"aux_weight": float("nan")}, "aux_weight is nan: choose 0"),
        ({"scale_learning_rate": -0.1}, "scale_learning_rate is -0.1: choose 0 or more"),
        ({"learning_rate_per_bit": 0.0}, "learning_rate_per_bit is 0.0: choose more than 0"),
        ({"assignment_temperature": 0.0}, "assignment_temperature is 0.0: choose from 1e-6 to 1"),
        ({"assignment_temperature": 0.1, "ema_decay": 0.9}, "ema_decay would average assignments of all temperatures"),
        ({"search_steps": 0}, "search_steps is 0: choose at least 1, or -1"),
        ({"finetune_learning_rate": 1e-3}, "finetune_learning_rate is for after the freeze"),
        (
            {"search_steps": 2, "lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch"},
            "reduce_lr_on_plateau none: choose another",
        ),
        ({"aux_weight": -1.0}, "aux_weight is -1.0: choose 0"),
        (
            {
                "search_steps": 2,
                "load_best_model_at_end": True,
                "eval_strategy": "steps",
                "eval_steps": 1,
                "save_steps": 1,
            },
            "may go back to before the freeze",
        ),
        ({"block_gradient_scale": 0.0}, "block_gradient_scale is 0.0: choose more than 0"),
        ({"pnorm": "sharp"}, "pnorm is 'sharp': choose a finite number of at least 1, or 'entropy'"),
        ({"pnorm": float("inf")}, "pnorm is 'inf': choose a finite number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan: choose 0 or more"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1: choose 0 or more"),
        ({"num_train_epochs": -1}, "num_train_epochs is -1: choose 0 or more"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0: choose 1 or more"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size is 0: choose 1 or more"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0: choose 1 or more"),
        ({"label_smoothing_factor": 1.0}, "label_smoothing_factor is 1.0: choose 0"),
        ({"pnorm": 0.5}, "pnorm is '0.5'"),
        ({"report_to": ["tensorboard", "neptune"]}, "report_to names neptune, not installed here"),
        ({"distillation_temperature": 0.0}, "distillation_temperature is 0.0"),
        (
            {
                "aux_weight": 1.0,
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": True},
            },
            "use_reentrant of .* leaves the attention maps without a gradient",
        ),
        ({"search_steps": 10, "max_steps": 10}, "leave steps to finetune after it"),
    ],
)
def test_impossible_training_arguments_are_refused(arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        QuantformerTrainingArguments(output_dir=str(tmp_path), **arguments)
