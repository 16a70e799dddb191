"""Let OpenMP's threads sleep while they wait for one another. Commands import this before torch.

By default they spin, which is the fastest on idle cores. Beside other programs the spinning threads use up their share
of the cores, so that the thread they wait for does not run: small models then decode 20 to 100 times as slowly. Asleep,
they cost little on idle cores, and the number of threads stays what it was, so the results stay the same to the bit.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # the OpenMP runtime reads it when it is loaded
