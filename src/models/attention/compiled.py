"""torch.compile with a recompile limit that covers all variants of a run."""

from collections.abc import Callable
from typing import Any

import torch

# Variants per function: layer types, times grad/no-grad/inference mode, times the shapes of training, validation
# and both stages. Beyond the limit (8 by default), Dynamo only warns and runs the remaining variants uncompiled.
VARIANTS = 64


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Wrap a function with torch.compile, after raising the recompile limit."""
    torch._dynamo.config.recompile_limit = VARIANTS
    return torch.compile(function, **options)
