"""torch.compile with a recompile limit that covers all variants of a run."""

from collections.abc import Callable
from typing import Any

import torch

# Variants per function: layer types x grad, no-grad and inference mode x the shapes in training and validation of both
# stages. Past its limit (8 by default), Dynamo only issues a warning and runs further variants uncompiled.
VARIANTS = 64


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Wrap a function with torch.compile, after raising the recompile limit."""
    torch._dynamo.config.recompile_limit = VARIANTS
    return torch.compile(function, **options)
