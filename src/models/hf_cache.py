"""Access to the KV cache across versions of transformers: argument name, contents and cropping.

The argument name is looked up because it differs between versions: `past_key_values` became `cache` in transformers
5.24, and a forward with `**kwargs` silently swallows an unknown name.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import transformers
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

NAMES = ("cache", "past_key_values")  # since 5.24, and earlier


@functools.cache
def forward_arguments(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Return the parameter names of a `forward` in order, excluding `*args` and `**kwargs`."""
    parameters = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))


def require_arguments(kind: type[nn.Module], names: set[str]) -> None:
    """Check that a module's forward takes these arguments by name rather than swallowing them in `**kwargs`.

    Raises:
        ValueError: an argument is missing from the signature of `forward`.
    """
    if missing := sorted(names - set(forward_arguments(kind.forward))):
        raise ValueError(
            f"{kind.__name__}.forward in transformers {transformers.__version__} does not accept {', '.join(missing)}, "
            f"only {', '.join(forward_arguments(kind.forward))}. Install a version allowed by pyproject.toml."
        )


def forward_cached(model: PreTrainedModel, tokens: Tensor, cache: DynamicCache, **kwargs: object):
    """Run a model on tokens [R, T] that follow the cached ones, and append their keys and values to the cache.

    Raises:
        ValueError: the forward takes no cache argument, or the cache did not grow by T tokens.
    """
    names = [name for name in NAMES if name in forward_arguments(type(model).forward)] or list(NAMES[:1])
    require_arguments(type(model), set(names))
    length = cache.get_seq_length() + tokens.shape[1]
    output = model(input_ids=tokens, use_cache=True, **{names[0]: cache}, **kwargs)
    for number in range(model.config.num_hidden_layers):
        keys_values(cache, number, length)
    return output


def keys_values(cache: DynamicCache, layer: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Return a layer's keys and values, each [R, key/value heads, tokens, head size], without copying them.

    Raises:
        ValueError: the cache does not hold such tensors, or holds more or fewer than `length` tokens.
    """
    layers = getattr(cache, "layers", ())
    found = [getattr(layers[layer], name, None) for name in ("keys", "values")] if layer < len(layers) else []
    pair = [tensor for tensor in found if isinstance(tensor, Tensor) and tensor.ndim == 4]
    sizes = [tensor.shape[2] for tensor in pair]
    length = cache.get_seq_length() if length is None else length
    if sizes != [length, length]:
        raise ValueError(
            f"Layer {layer} of {type(cache).__name__} holds keys and values for {sizes} tokens; expected {length} "
            f"for each. This is transformers {transformers.__version__}; install a version allowed by pyproject.toml."
        )
    return pair[0], pair[1]


def crop(cache: DynamicCache, length: int) -> None:
    """Truncate the cache to its first `length` tokens. Avoids `cache.crop`, whose semantics differ between versions."""
    held = cache.get_seq_length()
    for number, layer in enumerate(cast(list[Any], cache.layers)):  # `keys_values` rejects layers without attention
        layer.keys, layer.values = (tensor[:, :, :length] for tensor in keys_values(cache, number, held))
