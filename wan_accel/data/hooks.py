"""Functions that a recipe names to change what is encoded during training. Torch-free."""

import importlib
from collections.abc import Callable

import numpy as np

Augment = Callable[[np.ndarray, np.random.Generator], np.ndarray]
AugmentCaption = Callable[[str, np.random.Generator], str]


def horizontal_flip(frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Mirror a clip (T, H, W, 3) half of the times. Not for Animate, whose poses would not follow."""
    return frames[:, :, ::-1] if rng.random() < 0.5 else frames


_BUILT_IN = {"horizontal_flip": horizontal_flip}


def load_hook(name: str, key: str) -> Callable:
    """The function that a recipe names as `package.module:function`, or a built-in.

    Raises:
        ValueError: it cannot be imported; `key` is where it was named.
    """
    if name in _BUILT_IN:
        return _BUILT_IN[name]
    module, _, function = name.partition(":")
    try:
        hook = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{key}={name} cannot be imported ({error}): write package.module:function, importable from where you "
            f"launch, or {', '.join(_BUILT_IN)}"
        ) from None
    if not callable(hook):
        raise ValueError(f"{key}={name} is not a function")
    return hook
