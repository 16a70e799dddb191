"""torch.compile with room for all the variants that a run needs."""

from collections.abc import Callable
from typing import Any

import torch

# Of one function: kinds of layers, with and without gradient and under inference mode, times the shapes of training,
# validation and both stages. Beyond dynamo's own limit of 8 the rest would run uncompiled, with but a warning.
VARIANTS = 64


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """The function, compiled on its first call."""
    torch._dynamo.config.recompile_limit = VARIANTS
    return torch.compile(function, **options)
