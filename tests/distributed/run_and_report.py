"""`run_quantformer.py`, and each process writes what its model was when the main one saved it."""

import hashlib
import json
import os
import sys
from pathlib import Path

from accelerate import PartialState


sys.path.insert(0, str(Path(__file__).parents[2]))

import run_quantformer
from quantformer_hf import QuantformerTrainer


def fingerprint(model) -> dict[str, str]:
    return {
        name: hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
        for name, tensor in model.state_dict().items()
    }


save_model = QuantformerTrainer.save_model


def save_and_report(self, *args, **kwargs):
    save_model(self, *args, **kwargs)
    model = self.accelerator.unwrap_model(self.model)
    path = Path(os.environ["REPORT_DIR"]) / f"{self.args.output_dir.replace('/', '_')}_{PartialState().process_index}"
    path.write_text(json.dumps(fingerprint(model)))


QuantformerTrainer.save_model = save_and_report
run_quantformer.main()
