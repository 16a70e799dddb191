"""Limits busy-waiting of OpenMP threads. Must be imported before torch.

GNU's OpenMP runtime, used by the Linux builds of torch, spins for 300,000 iterations by default. When other processes
share the cores, spinning threads take CPU time from the thread they are waiting for, and small models decode up to 40
times slower. With no spinning at all, decoding is slow even on idle cores. 5,000 iterations (a fraction of a
millisecond) are a compromise; docs/results/performance.md has the measurements. The number of threads does not change,
so results are bitwise identical.
"""

import os

SPIN_COUNT = "5000"

if "OMP_WAIT_POLICY" not in os.environ:  # keep the user's setting: GOMP_SPINCOUNT would override it
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when the OpenMP runtime loads
