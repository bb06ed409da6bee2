"""Read recipes: strict YAML with lines, inheritance, overrides. Torch-free."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from wan_accel.recipe.arguments import problems_of, with_no_as_written
from wan_accel.recipe.schema import Recipe

Keys = tuple[str | int, ...]


class RecipeError(ValueError):
    """A recipe that cannot be used; the message lists every problem with file and line."""


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-4 is a number, as everyone means it (YAML 1.1 wants 1.0e-4)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def recipes_folder() -> Path:
    """The folder of the shipped recipes."""
    return Path(str(files("wan_accel.recipes")))


def shipped_recipes() -> list[str]:
    """Names of the shipped recipes, e.g. `animate-14b/lora`."""
    root = recipes_folder()
    paths = sorted(path for path in root.glob("*/*.yaml") if path.parent.name != "accelerate")
    return [str(path.relative_to(root).with_suffix("")) for path in paths]


def find_recipe(name: str, *, relative_to: Path | None = None) -> Path:
    """The file of a recipe given as a path or as a shipped name.

    Raises:
        RecipeError: neither exists; the nearest shipped name is named.
    """
    candidates = [Path(name)] if relative_to is None else [relative_to / name, Path(name)]
    candidates.append(recipes_folder() / f"{name}.yaml")
    for path in candidates:
        if path.is_file():
            return path
    near = difflib.get_close_matches(name, shipped_recipes(), n=1)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise RecipeError(f"recipe {name!r} is neither a file nor a shipped recipe{hint}: see `wan-accel recipes list`")


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Load, inherit, override and validate a recipe.

    Args:
        name: a path, or the name of a shipped recipe.
        overrides: `a.b=value` or `--a.b value` (two items); values are YAML.

    Raises:
        RecipeError: every problem at once, as `file:line: key: what`.
    """
    path = find_recipe(name)
    content, lines, problems = _read(path, ())
    for key, text in _pairs(overrides):
        try:
            value = yaml.load(text, Loader=_Loader)
        except yaml.YAMLError as error:
            raise RecipeError(f"override {key}={text}: {error}") from None
        keys: Keys = tuple(key.split("."))
        _set(content, keys, value)
        lines[keys] = f"override {key}"
    if isinstance(training := content.get("training"), dict):
        content["training"] = with_no_as_written(training)
    problems += problems_of(content.get("training") or {}, lambda field: _where(lines, ("training", field), path))
    try:
        recipe = TypeAdapter(Recipe).validate_python(content)
    except ValidationError as error:
        problems += [_describe(item, lines, path) for item in error.errors()]
    if problems:
        raise RecipeError("\n".join(problems))
    return recipe


def _pairs(overrides: Sequence[str]) -> list[tuple[str, str]]:
    """Split `a.b=c` and `--a.b c` into (key, text)."""
    pairs, items = [], list(overrides)
    while items:
        item = items.pop(0)
        key, separator, text = item.removeprefix("--").partition("=")
        if not separator:
            if not item.startswith("--") or not items:
                raise RecipeError(f"override {item!r} has no value: write {key}=value")
            text = items.pop(0)
        pairs.append((key, text))
    return pairs


def _set(content: dict[str, Any], keys: Keys, value: Any) -> None:
    *parents, leaf = map(str, keys)
    for key in parents:
        child = content.get(key)
        content[key] = child if isinstance(child, dict) else {}
        content = content[key]
    content[leaf] = value


def _read(path: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], dict[Keys, str], list[str]]:
    """A file merged over its `base:`, where each key stands, and problems found on the way."""
    if path.resolve() in seen:
        chain = " -> ".join(str(p) for p in (*seen, path))
        raise RecipeError(f"{path}: `base` goes in a circle: {chain}")
    try:
        node = yaml.compose(path.read_text(), Loader=_Loader)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(f"{path}: a recipe is a mapping of sections, see `wan-accel recipes show animate-14b/lora`")
    lines: dict[Keys, str] = {}
    problems: list[str] = []
    _walk(node, (), path, lines, problems)
    content = _Loader(path.read_text()).get_single_data()
    base = content.pop("base", None)
    if base is None:
        return content, lines, problems
    parent = find_recipe(base, relative_to=path.parent)
    inherited, parent_lines, parent_problems = _read(parent, (*seen, path.resolve()))
    return _merge(inherited, content), {**parent_lines, **lines}, [*parent_problems, *problems]


def _walk(node: yaml.Node, keys: Keys, path: Path, lines: dict[Keys, str], problems: list[str]) -> None:
    """Note the line of every key, and duplicates."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key_node, value_node in node.value:
        key, where = str(key_node.value), f"{path}:{key_node.start_mark.line + 1}"
        if key in seen:
            problems.append(f"{where}: {'.'.join(map(str, (*keys, key)))}: given twice")
        seen.add(key)
        lines[(*keys, key)] = where
        _walk(value_node, (*keys, key), path, lines, problems)


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _where(lines: dict[Keys, str], keys: Keys, path: Path) -> str:
    """The place of a key, or of the nearest section around it."""
    for length in range(len(keys), 0, -1):
        if keys[:length] in lines:
            return lines[keys[:length]]
    return str(path)


def _describe(error: Any, lines: dict[Keys, str], path: Path) -> str:
    """One of pydantic's errors as `file:line: key: what`."""
    keys: Keys = tuple(key for key in error["loc"] if not (isinstance(key, str) and key[:1] in "[lc" and "[" in key))
    name, where = ".".join(map(str, keys)), _where(lines, keys, path)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        near = difflib.get_close_matches(str(keys[-1]), _fields_at(keys[:-1]), n=1)
        hint = f" (did you mean {near[0]}?)" if near else f": use {', '.join(_fields_at(keys[:-1]))}"
        return f"{where}: {name}: unknown key{hint}"
    if error["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"{where}: {name}: missing"
    return f"{where}: {name}: {error['msg']}, got {error['input']!r}"


def _fields_at(keys: Keys) -> list[str]:
    """Valid keys of the section at `keys`."""
    section: Any = Recipe
    for key in keys:
        kinds = {field.name: field.type for field in dataclasses.fields(section)}
        section = kinds.get(str(key))
        section = next(filter(dataclasses.is_dataclass, get_args(section)), section)  # a section that may be left out
        if not dataclasses.is_dataclass(section):
            return []
    return [field.name for field in dataclasses.fields(section)]


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe as YAML."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False)
