"""Bounds on the quality figures: which clips are good enough."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from wan_accel.data.schema import QUALITY


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """The least and the most that a figure may be, both inclusive; None: no bound."""

    min: float | None = None
    max: float | None = None

    def describes(self, value: float) -> bool:
        """Say whether a value lies inside."""
        return not ((self.min is not None and value < self.min) or (self.max is not None and value > self.max))


def load_bounds(path: Path | None) -> dict[str, Bound]:
    """Read a YAML file `figure: {min: ..., max: ...}`; None: the bounds that ship with the package.

    Raises:
        ValueError: it cannot be read, or has unknown figures, bounds or values; all problems at once.
    """
    try:
        text = (files("preprocessing") / "quality.yaml").read_text() if path is None else path.read_text()
        content = yaml.safe_load(text) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--quality {path}: cannot be read as YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"--quality {path}: expected lines like `hand_score: {{min: 0.3}}`, found {content!r}")
    problems = [problem for name, bound in content.items() for problem in _problems(name, bound)]
    if problems:
        raise ValueError(f"--quality {path}: " + "; ".join(problems))
    return {name: Bound(**bound) for name, bound in content.items()}


def _problems(name: Any, bound: Any) -> list[str]:
    if name not in QUALITY:
        return [f"{name!r} is no figure of a clip: use {', '.join(QUALITY)}"]
    if not isinstance(bound, dict) or not bound or set(bound) - {"min", "max"}:
        return [f"{name}: give {{min: ...}}, {{max: ...}} or both, not {bound!r}"]
    return [
        f"{name}.{side}: {value!r} is not a number"
        for side, value in bound.items()
        if isinstance(value, bool) or not isinstance(value, (int, float))
    ]


def violation(quality: Mapping[str, float | None], bounds: Mapping[str, Bound]) -> tuple[str, str] | None:
    """Return the first figure that lies outside its bound with a sentence about it; None for a good clip.

    A figure that the clip does not have (no face, say) violates a `min`, but no `max`.
    """
    for name, bound in bounds.items():
        value = quality.get(name)
        if value is None and bound.min is not None:
            return name, f"{name} was not measured, at least {bound.min:g} is asked for"
        if value is not None and not bound.describes(value):
            limits = [f"at least {bound.min:g}"] if bound.min is not None else []
            limits += [f"at most {bound.max:g}"] if bound.max is not None else []
            return name, f"{name} is {value:.4g}, {' and '.join(limits)} is asked for"
    return None
