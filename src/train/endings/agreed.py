"""Errors raised on all ranks at the same step: rank 0 reports them, the others exit silently."""

import os
import sys

from data.errors import UserError

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h: scripts/slurm/train.sbatch requeues a job with this status
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


class AgreedEnd(UserError):
    """Error raised on every rank at the same step."""

    status, kind = 1, "error: "

    def leave(self) -> None:
        """Exit the process; rank 0 prints the message first.

        Raises:
            SystemExit: with `status` on rank 0 and 0 on the others. The launcher would take any other status for a
                failure and kill rank 0 before it has reported.
        """
        if not first_rank():
            sys.exit(0)
        print(f"{self.kind}{self}", file=sys.stderr, flush=True)
        sys.exit(self.status)


class Diverged(AgreedEnd):
    """Training cannot continue: loss, gradients or weights are not finite."""


class NotFinished(AgreedEnd):
    """The loop ended before the last step of the stage, for a reason other than `patience`."""

    status, kind = TRY_AGAIN, ""


def first_rank() -> bool:
    """Return whether this process is rank 0, judging by environment variables only, without imports."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)
