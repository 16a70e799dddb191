"""Errors raised on all ranks at the same step. Rank 0 reports them; the others exit silently."""

import os
import sys

from data.errors import UserError

TRY_AGAIN = 75  # EX_TEMPFAIL from sysexits.h; scripts/slurm/train.sbatch requeues a job that exits with it
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


class AgreedEnd(UserError):
    """Error raised on every rank at the same step."""

    status, kind = 1, "error: "

    def leave(self) -> None:
        """Exit the process; rank 0 prints the message first.

        Raises:
            SystemExit: with `status` on rank 0 and 0 on the others, because the launcher would treat any other status
                as a failure and kill rank 0 before it has reported the error.
        """
        if not first_rank():
            sys.exit(0)
        print(f"{self.kind}{self}", file=sys.stderr, flush=True)
        sys.exit(self.status)


class Diverged(AgreedEnd):
    """Training cannot continue because the loss, gradients or weights are not finite."""


class NotFinished(AgreedEnd):
    """The training loop ended before the stage's last step, for a reason other than `patience`."""

    status, kind = TRY_AGAIN, ""


def first_rank() -> bool:
    """Return whether this process is rank 0, based only on environment variables; needs no imports."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)
