"""Limit the busy-waiting of OpenMP threads. Commands import this module before torch.

GNU's OpenMP runtime, which the Linux builds of torch use, spins for 300,000 iterations by default. When other processes
share the cores, spinning threads take CPU time from the thread they wait for, and small models decode up to 40 times
slower. Without any spinning, decoding is slow even on idle cores. 5,000 iterations, a fraction of a millisecond, are a
compromise (measurements in docs/results/performance.md). The number of threads is unchanged, so results are bitwise
identical.
"""

import os

SPIN_COUNT = "5000"

if "OMP_WAIT_POLICY" not in os.environ:  # set by the user; GOMP_SPINCOUNT would override it
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)  # read when the OpenMP runtime loads
