"""Faults for runs of `run_server.py`: SIGKILL at a moment that is counted in calls of functions, Python's and C's.

A `kill` is {"in": "training_step" or "_save_checkpoint", "stage", "step", "calls"}, or {"in": "end", "stage"}, when the
stage has saved its model and not yet said so. The signal is SIGKILL, so that nothing of Python's runs afterwards.
"""

import json
import os
import signal
import sys
from pathlib import Path

from quantformer_hf.trainer import QuantformerTrainer


class CallCounter:
    """Counts calls of functions within, and kills this process at the given one."""

    def __init__(self, kill_at=None):
        self.calls, self.kill_at = 0, kill_at

    def _count(self, frame, event, argument):
        if event in ("call", "c_call"):
            self.calls += 1
            if self.calls == self.kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def __enter__(self):
        sys.setprofile(self._count)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)


def arm(kill: dict | None, report: str) -> None:
    """Count the calls of each training step and save into the file `report`, and kill in the chosen one."""
    calls = open(report, "w")  # noqa: SIM115  open until the run ends

    def armed(function, name):
        def wrapper(self, *args, **kwargs):
            stage = Path(self.args.output_dir).name
            step = self.state.global_step + (name == "training_step")
            here = kill and kill["in"] == name and (kill["stage"], kill["step"]) == (stage, step)
            with CallCounter(kill["calls"] if here else None) as counter:
                result = function(self, *args, **kwargs)
            if here:
                # Fewer calls than in the run that was counted: the end of it is a moment as well.
                os.kill(os.getpid(), signal.SIGKILL)
            calls.write(json.dumps([stage, name, step, counter.calls]) + "\n")
            calls.flush()
            return result

        return wrapper

    for name in ("training_step", "_save_checkpoint"):
        setattr(QuantformerTrainer, name, armed(getattr(QuantformerTrainer, name), name))
    if kill and kill["in"] == "end":
        save_model = QuantformerTrainer.save_model

        def save_and_die(self, output_dir=None, _internal_call=False):
            save_model(self, output_dir, _internal_call)
            if not _internal_call and Path(self.args.output_dir).name == kill["stage"]:
                os.kill(os.getpid(), signal.SIGKILL)

        QuantformerTrainer.save_model = save_and_die
