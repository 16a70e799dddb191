"""transformers' own cache: what a model calls it, what it holds, and how it is cut.

Names are asked for, since they change: `past_key_values` became `cache` in transformers 5.24, and a name that a forward
does not know vanishes in its `**kwargs` without a word.
"""

import functools
import inspect

from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

NAMES = ("cache", "past_key_values")  # from 5.24 on, and before


@functools.cache
def arguments(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names that a module's forward takes one by one, in order."""
    parameters = inspect.signature(kind.forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL))


def require(kind: type[nn.Module], names: set[str]) -> None:
    """
    Raises:
        ValueError: a forward does not take these names, and would lose what is passed by them.
    """
    if missing := sorted(names - set(arguments(kind))):
        raise ValueError(
            f"{kind.__name__}.forward of this transformers version takes no {', '.join(missing)}, but "
            f"{', '.join(arguments(kind))}. Install a version that pyproject.toml names."
        )


def forward_cached(model: PreTrainedModel, tokens: Tensor, cache: DynamicCache, **kwargs: object):
    """What a model's forward gives for tokens [R, T] behind those in a cache, which grows by them.

    Raises:
        ValueError: the cache has no name in the model's forward, or did not grow by the tokens.
    """
    names = [name for name in NAMES if name in arguments(type(model))] or list(NAMES[:1])
    require(type(model), set(names))
    length = cache.get_seq_length() + tokens.shape[1]
    output = model(input_ids=tokens, use_cache=True, **{names[0]: cache}, **kwargs)
    for number in range(model.config.num_hidden_layers):
        keys_values(cache, number, length)
    return output


def keys_values(cache: DynamicCache, layer: int, length: int | None = None) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer, [R, key/value heads, tokens, head size] each, by reference.

    Raises:
        ValueError: the cache holds something else, or other than `length` tokens.
    """
    layers = getattr(cache, "layers", ())
    pair = [getattr(layers[layer], name, None) for name in ("keys", "values")] if layer < len(layers) else []
    pair = [tensor for tensor in pair if isinstance(tensor, Tensor) and tensor.ndim == 4]
    sizes = [tensor.shape[2] for tensor in pair]
    length = cache.get_seq_length() if length is None else length
    if sizes != [length, length]:
        raise ValueError(
            f"Layer {layer} of {type(cache).__name__} holds keys and values of {sizes} tokens, expected {length} each. "
            "Install a transformers version that pyproject.toml names."
        )
    return pair[0], pair[1]


def crop(cache: DynamicCache, length: int) -> None:
    """Forget all behind the first tokens; not `cache.crop`, whose meaning differs between versions."""
    held = cache.get_seq_length()
    for number, layer in enumerate(cache.layers):
        layer.keys, layer.values = (tensor[:, :, :length] for tensor in keys_values(cache, number, held))
