"""A process with the imports done, that forks a `run_quantformer.py` for each line of its input.

A line is `{"argv": [...], "stdout": file, "stderr": file, "fault": null or {...}}`, and the answer the
exit code; `fault` holds the arguments of `faults.arm`. Forking saves the seconds of the imports, and is sound as torch has
started no thread by then: nothing is computed before the fork.
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

from faults import arm  # noqa: E402  imports the package, which is found by the path above

import run_quantformer  # noqa: E402, F401  found by the path above; does the imports
from quantformer_hf.ops import eager_functions  # noqa: E402  likewise


#: Seconds after which a run is killed.
TIMEOUT = 540


def become_the_run(argv: list[str], stdout: str, stderr: str, fault: dict | None) -> None:
    """As `python run_quantformer.py *argv`: what it raises is for the interpreter."""
    signal.alarm(TIMEOUT)
    for descriptor, path, flags in ((0, os.devnull, os.O_RDONLY), (1, stdout, os.O_WRONLY), (2, stderr, os.O_WRONLY)):
        os.dup2(os.open(path, flags | os.O_CREAT), descriptor)
    if fault is not None:
        arm(**fault)
    sys.argv = ["run_quantformer.py", *argv]
    # Compiled functions set the number of threads, which torch refuses in a fork (an internal assertion).
    with eager_functions():
        runpy.run_path(str(ROOT / "run_quantformer.py"), run_name="__main__")


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            become_the_run(**json.loads(line))
            return
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
