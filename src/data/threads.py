"""Let OpenMP's threads spin only briefly while they wait for one another. Commands import this before torch.

GNU's OpenMP runtime, which torch's Linux builds use, lets them spin for 300,000 rounds. Beside other programs on the
same cores, spinning threads take the time that the thread they wait for needs: small models decode up to 40 times as
slowly. Threads that never spin are slow on idle cores, too. 5,000 rounds, a fraction of a millisecond, are a compromise
(docs/results/performance.md has the figures). The number of threads stays the same, so results stay the same bit for
bit.
"""

import os

SPIN_COUNT = "5000"

if "OMP_WAIT_POLICY" not in os.environ:  # the user's choice, which GOMP_SPINCOUNT would override
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when the runtime is loaded
