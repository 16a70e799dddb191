"""Signals that stop a run: SIGUSR1 (sent by SLURM before the time limit), SIGTERM and SIGINT (Ctrl-C).

During training, the signal is recorded, and the run saves a checkpoint and stops at the next step boundary; a second
Ctrl-C stops it immediately. At any other time, all files on disk are consistent, and the run stops immediately. Rank 0
exits with a status that identifies the signal. The others exit with 0, because the launcher would treat any other
status as a failure and kill rank 0.
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
_reported = False  # whether the message on how to resume has been printed
_process = 0  # pid of the process that called `watch`; forked children inherit the handlers


def watch() -> None:
    """Install the signal handlers. Not called in submitit jobs, where submitit handles the signals."""
    global _watching, _process
    _watching, _process = True, os.getpid()
    for number in STATUS:
        signal.signal(number, _handle)


def set_training(training: bool, received: int = 0) -> None:
    """Mark the start or end of training, during which signals take effect only at step boundaries.

    At the end, stop the process if this or any other rank has received a signal.

    Args:
        received: signal received by any rank, or 0.
    """
    global _starting, _training
    _starting, _training = False, training
    if _watching:
        watch()  # Lightning has replaced the handlers
    if not training and (received or _received):
        stop(received or _received)


def received() -> int:
    """Return the signal that this process has received, or 0."""
    return _received


def agreed_signal(strategy: Any) -> int:
    """Return the signal that any rank has received, or 0. All ranks must call this and get the same result.

    Args:
        strategy: Lightning strategy that provides the world size and device.
    """
    if strategy.world_size == 1:
        return _received
    import torch  # lazy: `watch` must be available before torch is imported

    received = torch.tensor(_received, device=strategy.root_device)
    torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
    return int(received)


def stop(number: int) -> None:
    """Exit because of a signal; rank 0 prints how to resume.

    Raises:
        SystemExit: with the signal's exit status on rank 0 and 0 on the others.
    """
    global _reported
    if not first_rank():  # no imports in this function: the signal may have interrupted one
        status = 0
    else:
        status, reported, _reported = STATUS[signal.Signals(number)], _reported, True
        text = "rerun the command to resume, without overwrite=<stage> if it was set"
        if not reported:
            print(f"stopped by {signal.Signals(number).name}; {text}", file=sys.stderr, flush=True)
    if _starting:
        os._exit(status)  # an exception raised during an import may be swallowed
    sys.exit(status)


def _handle(number: int, frame: FrameType | None) -> None:
    global _received
    if os.getpid() != _process:
        if number != signal.SIGINT and not _training:  # workers leave Ctrl-C to their parent, which shuts them down
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    again, _received = _received, number
    if not _training or number == signal.SIGINT == again:
        stop(number)
    if number == signal.SIGINT and first_rank():
        text = "saving a checkpoint and stopping after this step; press Ctrl-C again to stop immediately"
        print(f"\n{text}", file=sys.stderr, flush=True)
