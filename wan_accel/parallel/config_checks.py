"""Whether an accelerate config asks for what training would not do: as a file, and as launched. Torch-free."""

import difflib
import os
from collections.abc import Mapping
from typing import Any

from wan_accel.parallel.settings import DEEPSPEED, DYNAMO, FP8, FSDP, PARALLELISM, REFUSED, TOP, known_keys

# Fields that the launcher also takes without it.
_PREFIXES = {FSDP: "fsdp_", DYNAMO: "dynamo_", FP8: "fp8_"}
_OLD_DYNAMO = "dynamo_backend"  # at the top level, as configs of accelerate 0.x have it
_ENGINE_OF = {FSDP: "FSDP", DEEPSPEED: "DEEPSPEED", PARALLELISM: "FSDP"}


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """Every field of an accelerate config file that is not honoured, one line each."""
    top = {key: value for key, value in config.items() if key != _OLD_DYNAMO}
    sections = {TOP: top, **{name: _section(config, name) for name in (*_ENGINE_OF, DYNAMO, FP8)}}
    kind = str(config.get("distributed_type", "NO")).upper()
    problems = [
        f"{name} has no effect with distributed_type: {kind}: remove it"
        for name, engine in _ENGINE_OF.items()
        if sections[name] and kind != engine
    ]
    for name, fields in sections.items():
        problems += [_unknown(name, key) for key in fields if key not in known_keys(name)]
    for row in REFUSED:
        value = _written(sections[row.section].get(row.key))
        if value is not None and value not in row.allowed:
            problems.append(_line(row.key, value, row.advice))
    return problems


def launched_problems(environ: Mapping[str, str], *, has_recipe: bool = True) -> list[str]:
    """The same for what the launcher has put into the environment, options of its command line among it.

    Args:
        environ: of a launched process.
        has_recipe: a recipe decides what it has keys for; in a loop of the user's own accelerate does.
    """
    problems = []
    for row in REFUSED:
        value = _written(environ.get(row.env)) if row.env is not None else None
        if value is not None and value not in row.allowed and (has_recipe or not row.recipe_only):
            problems.append(_line(row.key, value, row.advice))
    fields = set(environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")) - {"", "mixed_precision"}
    problems += [_unknown(DEEPSPEED, key) for key in sorted(fields - known_keys(DEEPSPEED))]
    if _is_true(environ, "ACCELERATE_USE_PARALLELISM_CONFIG") and not _is_true(environ, "ACCELERATE_USE_FSDP"):
        problems.append(f"{PARALLELISM} has no effect without distributed_type: FSDP: remove it")
    return problems


def refuse_launched(*, has_recipe: bool = True) -> None:
    """Stop a run whose accelerate config asks for what would not happen.

    Raises:
        ValueError: every such field, with what to do.
    """
    problems = launched_problems(os.environ, has_recipe=has_recipe)
    if problems:
        raise ValueError("\n".join(["the accelerate config asks for what is not done here:", *problems]))


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    prefix = _PREFIXES.get(name, "")
    fields = dict(config.get(name) or {})
    if name == DYNAMO and _OLD_DYNAMO in config:
        fields[_OLD_DYNAMO] = config[_OLD_DYNAMO]
    return {key if key.startswith(prefix) else prefix + key: value for key, value in fields.items()}


def _written(value: Any) -> str | None:
    """A value as the launcher would write it, in lower case; None for one that asks for nothing."""
    text = str(value).lower()
    return None if text in ("none", "", "{}", "[]") else "no" if text == "false" else text


def _is_true(environ: Mapping[str, str], name: str) -> bool:
    return environ.get(name, "false").lower() == "true"


def _line(key: str, value: str, advice: str) -> str:
    return f"{key}={value} is not honoured here: {advice}"


def _unknown(section: str, key: str) -> str:
    near = difflib.get_close_matches(key, known_keys(section), n=1)
    hint = f"did you mean {near[0]}?" if near else "remove it"
    return f"{section + '.' if section else ''}{key} is not a field that accelerate's launcher passes on: {hint}"
