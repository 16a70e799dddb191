"""A wrapper around torch.compile that raises the recompile limit to cover all variants in a run."""

from collections.abc import Callable
from typing import Any

import torch

# Upper bound on the variants per function: layer types x autograd modes (grad, no-grad, inference) x shapes (training
# and validation in both stages). Beyond the limit, which is 8 by default, Dynamo only warns and stops compiling.
VARIANTS = 64


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Wrap a function with torch.compile, after raising the recompile limit."""
    torch._dynamo.config.recompile_limit = VARIANTS
    return torch.compile(function, **options)
