"""Time and memory of a training step of DeiT-Tiny, as ratios to full precision in the same process.

    python benchmarks/training_step.py [--batch_size 8] [--rounds 9] [--device cpu]

Forward and backward at 224 px, random weights and images; W4A4, patch embedding and classifier at 8 bits.
"""

import argparse
import logging
from collections.abc import Callable

import torch
from _arguments import positive
from _machine import describe_machine, interleaved_medians, peak_extra_bytes
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from quantformer_hf import QuantformerForImageClassification
from quantformer_hf.attention import ATTENTION_IMPLEMENTATION, capture_attention
from quantformer_hf.losses import attention_rank_consistency
from quantformer_hf.report import format_table


#: DeiT-Tiny without its distillation token, as its authors' plain checkpoint.
DEIT_TINY = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=positive, default=8)
    parser.add_argument("--rounds", type=positive, default=9)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    logging.disable(logging.INFO)

    torch.manual_seed(0)
    full_precision = ViTForImageClassification(ViTConfig(**DEIT_TINY, num_labels=1000)).to(arguments.device)
    pixel_values = torch.randn(arguments.batch_size, 3, 224, 224, device=arguments.device)
    labels = torch.randint(0, 1000, (arguments.batch_size,), device=arguments.device)

    def quantized(num_groups: int | None, attention_bits: int | None) -> PreTrainedModel:
        model = QuantformerForImageClassification.from_full_precision(
            full_precision, bit_width=4, attention_bits=attention_bits
        )
        model.calibrate([pixel_values])
        return model.begin_search(num_groups) if num_groups else model

    teacher = ViTForImageClassification(full_precision.config).to(arguments.device).eval().requires_grad_(False)
    teacher.load_state_dict(full_precision.state_dict())
    teacher.set_attn_implementation(ATTENTION_IMPLEMENTATION)

    def step(model: PreTrainedModel) -> Callable[[], None]:
        model.train()

        def run() -> None:
            model(pixel_values=pixel_values, labels=labels).loss.backward()
            model.zero_grad()
            if arguments.device != "cpu":
                torch.cuda.synchronize()

        return run

    def step_with_teacher(model: PreTrainedModel) -> Callable[[], None]:
        model.train()

        def run() -> None:
            with capture_attention(model) as student_maps:
                loss = model(pixel_values=pixel_values, labels=labels).loss
            with torch.no_grad(), capture_attention(teacher) as teacher_maps:
                teacher(pixel_values=pixel_values)
            degrees = torch.full_like(model.concentration_degree, 2.0)
            loss = loss + attention_rank_consistency(student_maps, teacher_maps, degrees, len(pixel_values))
            loss.backward()
            model.zero_grad()
            if arguments.device != "cpu":
                torch.cuda.synchronize()

        return run

    candidates = {
        "full precision": step(full_precision),
        "pretrain, G=1, attention products in floating point": step(quantized(None, None)),
        "search, G=8, attention products in floating point": step(quantized(8, None)),
        "pretrain, G=1, attention products at 8 bits": step(quantized(None, 8)),
        "search, G=8, attention products at 8 bits": step(quantized(8, 8)),
        "search, G=8, 8 bits, with teacher and attention loss": step_with_teacher(quantized(8, 8)),
    }
    seconds = interleaved_medians(candidates, arguments.rounds)
    memory = {name: peak_extra_bytes(candidate, arguments.device) for name, candidate in candidates.items()}
    base_seconds, base_memory = seconds["full precision"], memory["full precision"]
    rows = [
        [
            name,
            f"{1000 * seconds[name]:.0f} ms",
            f"{seconds[name] / base_seconds:.2f}",
            f"{memory[name] / 1e9:.2f} GB",
            f"{memory[name] / base_memory:.2f}",
        ]
        for name in candidates
    ]
    print(f"{describe_machine()}\nbatch {arguments.batch_size}, {arguments.rounds} interleaved rounds, medians\n")
    print(format_table(["training step", "time", "ratio", "memory of the step", "ratio"], rows))


if __name__ == "__main__":
    main()
