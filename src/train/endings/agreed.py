"""Ends of a run that all ranks have agreed on: the first rank reports, the others leave quietly."""

import os
import sys

from data.errors import UserError

TRY_AGAIN = 75  # the system's EX_TEMPFAIL: scripts/slurm/train.sbatch puts such a job back into the queue
RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


class AgreedEnd(UserError):
    """Raised on every rank at the same step."""

    status, kind = 1, "error: "

    def leave(self) -> None:
        """
        Raises:
            SystemExit: with this end's status on the first rank. With 0 on the others: whoever launched them takes any
                other status for a failure, and ends the first rank before it has reported.
        """
        if not first_rank():
            sys.exit(0)
        print(f"{self.kind}{self}", file=sys.stderr, flush=True)
        sys.exit(self.status)


class Diverged(AgreedEnd):
    """Training cannot go on: its loss, its gradients or its weights are not finite."""


class NotFinished(AgreedEnd):
    """The loop ended before the stage's last step, and not because of its own `patience`."""

    status, kind = TRY_AGAIN, ""


def first_rank() -> bool:
    """From the environment, so that nothing has to be imported."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)
