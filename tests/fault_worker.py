"""One warmed process that forks a `run_quantformer.py` per line of its input, and kills it where the line says.

A line is `{"argv": [...], "kill": null or {...}, "log": file, "report": file}`; the answer is the child's exit code, and
`report` gets the number of calls (of functions, Python's and C's) that each training step and save took. `kill` is
{"in": "training_step" or "_save_checkpoint", "stage", "step", "calls"}, the moment counted in such calls, or {"in": "end",
"stage"}, when the stage has saved its model and not yet said so. The signal is SIGKILL, so that
nothing of Python's runs afterwards. Forking saves ten seconds of imports a run, and is sound as torch has started no
thread by then: nothing is computed before the fork.
"""

import json
import os
import runpy
import signal
import sys
from pathlib import Path

import torch


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import run_quantformer  # noqa: E402, F401  found by the path above; warms the imports
from quantformer_hf.trainer import QuantformerTrainer  # noqa: E402  likewise


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


def arm(kill, report):
    """Count the calls of each training step and save, and kill in the chosen one."""

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
            report.write(json.dumps([stage, name, step, counter.calls]) + "\n")
            report.flush()
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


def child(order):
    with open(order["log"], "a") as log, open(order["report"], "w") as report:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        arm(order["kill"], report)
        sys.argv = ["run_quantformer.py", *order["argv"]]
        status = 1
        try:
            runpy.run_path(str(ROOT / "run_quantformer.py"), run_name="__main__")
            status = 0
        except SystemExit as error:
            print(error)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            child(json.loads(line))
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
