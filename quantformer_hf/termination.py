"""SIGTERM as a wish: a checkpoint first, then the end."""

import contextlib
import ctypes
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from transformers import TrainerCallback


logger = logging.getLogger(__name__)

#: What a shell reports of a process that SIGTERM has ended.
SIGTERM_EXIT_CODE = 128 + signal.SIGTERM


class TerminationCallback(TrainerCallback):
    """On SIGTERM, asks for a checkpoint at the end of the step and ends the process with code 143.

    Schedulers send SIGTERM and some time later SIGKILL (Slurm after `KillWait`, torchrun and `accelerate launch` after 30
    seconds). A signal that reaches one process counts for all: they agree at the end of each step.

    Args:
        saves: whether there is a checkpoint to go on from; if not, the process ends at once.
    """

    def __init__(self, saves: bool = True):
        self.saves = saves
        self._received = False
        self._stopping = False
        self._saved_step = -1
        self._group: dist.ProcessGroup | None = None

    @contextlib.contextmanager
    def listen(self) -> Iterator[None]:
        """Take SIGTERM as a wish, within."""
        if threading.current_thread() is not threading.main_thread():
            # Only there can Python set a handler; SIGTERM ends the process as ever.
            yield
            return
        self._received = self._stopping = False
        self._saved_step = -1
        previous = signal.signal(signal.SIGTERM, self._receive)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, previous)
        if self._received:
            # After the last step, whose checkpoint is there already.
            raise SystemExit(SIGTERM_EXIT_CODE)

    def _receive(self, signum, frame):
        self._received = True

    def _agreed(self) -> bool:
        if self._group is None:
            return self._received
        received = torch.tensor(int(self._received))
        dist.all_reduce(received, op=dist.ReduceOp.MAX, group=self._group)
        return bool(received)

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1 and self._group is None:
            # On the CPU, so that asking does not wait for the device.
            self._group = dist.new_group(backend="gloo")

    def on_step_end(self, args, state, control, **kwargs):
        # After the last step of an epoch its own log follows, which the checkpoint is to hold: on_epoch_end then asks.
        if not float(state.epoch).is_integer():
            self._stop_if_asked(state, control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._stop_if_asked(state, control)

    def _stop_if_asked(self, state, control) -> None:
        if not self._agreed():
            return
        self._stopping = True
        if self._saved_step == state.global_step or not self.saves:
            self._stop(state)
        control.should_save = True
        # It may take longer than the scheduler waits.
        control.should_evaluate = False

    def on_save(self, args, state, control, **kwargs):
        self._saved_step = state.global_step
        if self._stopping:
            self._stop(state)

    def _stop(self, state) -> None:
        if state.is_world_process_zero:
            written = f"the checkpoint of step {state.global_step} is written; the same command goes on from there"
            logger.warning(f"SIGTERM: {written if self.saves else 'the same command begins anew'}")
        raise SystemExit(SIGTERM_EXIT_CODE)


def ignore_sigterm(worker: int, running: ctypes.c_byte, then: Callable[[int], None] | None) -> None:
    """Start of a loader's worker, which the last step still needs; then `then(worker)`.

    When the training is over, however it ended, SIGTERM is how Python's multiprocessing ends its workers as the process
    exits, and it waits until they have obeyed.

    Args:
        running: shared with the process that trains, and false when its training is over.
    """

    def receive(signum, frame):
        if not running.value:
            # As those of PyTorch do: it takes any other code for a fault, and would say so as well.
            os._exit(0)

    signal.signal(signal.SIGTERM, receive)
    if then is not None:
        then(worker)
