"""Signals that ask a run to stop: by SLURM before the time limit (SIGUSR1), by anyone (SIGTERM).

While a stage trains, the signal is noted, and the run stops at the next boundary of a step, with a checkpoint. At any
other time everything on disk is whole anyway, and the run stops at once. The first rank's exit status says that it was
stopped; the others end with 0, since whoever launched them takes any other status for a failure and kills the first.
"""

import os
import signal
import sys
from types import FrameType
from typing import Any

from train.endings.agreed import TRY_AGAIN, first_rank

STATUS = {number: 128 + number for number in (signal.SIGTERM, signal.SIGINT)} | {signal.SIGUSR1: TRY_AGAIN}

_watching = False
_starting = True
_training = False
_received = 0
_said = False  # how to go on
_process = 0  # that watches; those that it forks inherit the handlers


def watch() -> None:
    """Take over the signals, in a process that is ours. In a job of submitit they are submitit's."""
    global _watching, _process
    _watching, _process = True, os.getpid()
    for number in STATUS:
        signal.signal(number, _handle)


def set_training(training: bool, received: int = 0) -> None:
    """Whether a boundary of a step will come. If not, and a signal was `received` by any rank, this is the end."""
    global _starting, _training
    _starting, _training = False, training
    if _watching:
        watch()  # Lightning has installed its own handlers meanwhile
    if not training and (received or _received):
        stop(received or _received)


def received() -> int:
    """The signal that this process is ending for; 0 if none."""
    return _received


def agreed_signal(strategy: Any) -> int:
    """The signal that any rank has received, 0 if none: the same answer on every rank. Called on every rank.

    Args:
        strategy: Lightning's, which knows the ranks and the device.
    """
    if strategy.world_size == 1:
        return _received
    import torch  # late: whoever watches should not wait for it

    received = torch.tensor(_received, device=strategy.root_device)
    torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
    return int(received)


def stop(number: int) -> None:
    """
    Raises:
        SystemExit: with the signal's exit status.
    """
    global _said
    if not first_rank():  # nothing may be imported here: the signal may have interrupted an import
        status = 0
    else:
        status, said, _said = STATUS[signal.Signals(number)], _said, True
        text = "the same command goes on from here, without overwrite=<stage> if it has that"
        if not said:
            print(f"stopped by {signal.Signals(number).name}; {text}", file=sys.stderr, flush=True)
    if _starting:
        os._exit(status)  # an exception in the middle of an import may end anywhere
    sys.exit(status)


def _handle(number: int, frame: FrameType | None) -> None:
    global _received
    if os.getpid() != _process:
        if number != signal.SIGINT and not _training:  # a worker is ended by its process, which decides about Ctrl-C
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    again, _received = _received, number
    if not _training or number == signal.SIGINT == again:
        stop(number)
    if number == signal.SIGINT and first_rank():
        print("\nstopping after this step, with a checkpoint; Ctrl-C again stops at once", file=sys.stderr, flush=True)
