"""Reads recipes: YAML with `extends`, `key.path=value` overrides, strict keys, and the origin of each value."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from florence_vl.files import parse_yaml
from florence_vl.registry import did_you_mean, plugins
from florence_vl.train import config
from florence_vl.train.config import Recipe

Settings = TypeVar("Settings")

# Keys of earlier versions: key -> the only allowed value, which has no effect.
RETIRED: dict[str, Any] = {
    "parallel.reshard_after_forward": True,
    "parallel.cpu_offload": False,
    "checkpoint.every_minutes": None,
    "guards.non_finite": True,
    "guards.first_loss_factor": 1.2,
    "guards.spike_factor": 5.0,
}
MAX_FILES = 64  # read through `extends`
OVERRIDE = "command line"
DEFAULT = "default"
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(:-([^}]*))?\}")


@dataclass
class ResolvedRecipe:
    """A recipe and where each of its values comes from.

    Attributes:
        recipe: The typed recipe.
        origins: `a.b.c` -> the file, "command line", or "default".
        files: Files that were read, the most general one first.
    """

    recipe: Recipe
    origins: dict[str, str]
    files: list[Path]


def recipe_folders() -> list[Path]:
    """Folders in which recipes are looked up by name: `$FLORENCE_VL_RECIPES`, `./recipes`, this package's, plugins'."""
    folders = []
    if explicit := os.environ.get("FLORENCE_VL_RECIPES"):
        folders.append(Path(explicit).expanduser())
    folders += [Path.cwd() / "recipes", Path(str(resources.files("florence_vl") / "recipes"))]
    folders += [point.load() for point in plugins("recipes").values()]
    unique: list[Path] = []
    for folder in folders:
        if folder.is_dir() and folder.resolve() not in unique:
            unique.append(folder.resolve())
    return unique


def list_recipes() -> dict[str, Path]:
    """All recipes by name: the path below its recipe folder without the suffix, as in `paper/8b-pretrain`.

    Files and folders whose name begins with an underscore are only to be extended.
    """
    found: dict[str, Path] = {}
    for folder in recipe_folders():
        for path in sorted(folder.rglob("*.yaml")):
            relative = path.relative_to(folder)
            if not any(piece.startswith("_") for piece in relative.parts):
                found.setdefault(relative.with_suffix("").as_posix(), path)
    return found


def find_recipe(name: str | Path, relative_to: Path | None = None) -> Path:
    """The file of a recipe, from its path or its name.

    Raises:
        FileNotFoundError: The recipe does not exist; similar names are suggested.
    """
    text = str(name)
    candidates = [Path(text), Path(f"{text}.yaml")]
    bases = ([relative_to] if relative_to else []) + [Path.cwd(), *recipe_folders()]
    for base in bases:
        for candidate in candidates:
            path = candidate.expanduser() if candidate.is_absolute() else base / candidate.expanduser()
            if path.is_file():
                return path.resolve()
    raise FileNotFoundError(f"no recipe {text!r}. {did_you_mean(text, list_recipes())}")


def load_recipe(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe.

    Args:
        source: Path or name of a recipe, or its content.
        overrides: `key.path=value` texts; values are YAML. List entries are addressed by number.

    Raises:
        FileNotFoundError: The recipe does not exist.
        ValueError: Unknown keys (similar names are suggested), wrong types, contradictions, or a cycle of `extends`.

    Example:
        >>> load_recipe({"steps": 10}, ["optimizer.lr=1e-3"]).optimizer.lr
        0.001
    """
    return resolve_recipe(source, overrides).recipe


def resolve_recipe(
    source: str | Path | Mapping[str, Any], overrides: Iterable[str] = (), need_variables: bool = True
) -> ResolvedRecipe:
    """Like `load_recipe`, with the origin of each value.

    Args:
        source: As in `load_recipe`.
        overrides: As in `load_recipe`.
        need_variables: False keeps a `${NAME}` that the environment does not set.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    files: list[Path] = []
    if isinstance(source, Mapping):
        content, name = dict(source), "given values"
        _extend(values, origins, files, content.pop("extends", None), Path.cwd(), ())
        _merge(values, deepcopy(content), origins, name)
        default_name = ""
    else:
        path = find_recipe(source)
        _read(path, values, origins, files, ())
        default_name = _recipe_name(path)
    for override in overrides:
        _apply_override(values, origins, override)
    written, values = values, _expand_variables(values, need_variables)
    _drop_retired(values, origins)
    if not values.get("name"):
        values["name"] = default_name
    recipe = _validate(values, Recipe)
    recipe.unexpanded = MappingProxyType(_unexpanded(written, values))
    try:
        recipe.output.format(name=recipe.name)
    except (KeyError, IndexError, ValueError):
        raise ValueError(f"output {recipe.output!r} may contain only the field {{name}}") from None
    for path_text in _leaves(recipe.to_dict()):
        origins.setdefault(path_text, _inherited_origin(path_text, origins))
    return ResolvedRecipe(recipe.check(), {k: origins[k] for k in _leaves(recipe.to_dict())}, files)


def read_dataclass(cls: type[Settings], source: str | Path, overrides: Iterable[str] = ()) -> Settings:
    """Read a dataclass other than `Recipe` in the same way: `extends`, overrides, numbers such as `1e-5`.

    Args:
        cls: The dataclass; with `__pydantic_config__ = STRICT` unknown keys are errors.
        source: Path or name of a YAML file.
        overrides: `key.path=value` texts; values are YAML.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: Unknown keys (similar names are suggested), missing keys, wrong types, or errors of the dataclass.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    _read(find_recipe(source), values, origins, [], ())
    for override in overrides:
        _apply_override(values, origins, override)
    return _validate(_expand_variables(values, True), cls)


def _read(path: Path, values: dict, origins: dict[str, str], files: list[Path], chain: tuple[Path, ...]) -> None:
    if path in chain:
        raise ValueError("recipes extend each other in a circle: " + " -> ".join(p.name for p in (*chain, path)))
    if len(files) >= MAX_FILES:
        raise ValueError(f"{path}: `extends` reads more than {MAX_FILES} files; extend each base once")
    content = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected keys and values, found {type(content).__name__}")
    _extend(values, origins, files, content.pop("extends", None), path.parent, (*chain, path))
    inherited = {key: values.get(key) for key in ("name", "description")}
    for key in inherited:  # a name belongs to only one file
        if key not in content:
            values.pop(key, None)
            origins.pop(key, None)
    _merge(values, content, origins, _display(path))
    files.append(path)


def _extend(
    values: dict, origins: dict[str, str], files: list[Path], parents: Any, folder: Path, chain: tuple[Path, ...]
) -> None:
    if parents is None:
        return
    for parent in [parents] if isinstance(parents, str) else parents:
        if not isinstance(parent, str):
            raise ValueError(f"`extends` accepts a recipe's path or name, or a list of them, found {parent!r}")
        _read(find_recipe(parent, folder), values, origins, files, chain)


def _merge(base: dict, new: Mapping[str, Any], origins: dict[str, str], origin: str, prefix: str = "") -> None:
    for key, value in new.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value, origins, origin, f"{path}.")
            continue
        for old in [k for k in origins if k == path or k.startswith(f"{path}.")]:
            del origins[old]
        base[key] = deepcopy(dict(value)) if isinstance(value, Mapping) else deepcopy(value)
        for leaf in _leaves({key: base[key]}, prefix):
            origins[leaf] = origin


def _apply_override(values: dict, origins: dict[str, str], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise ValueError(f"override {override!r} is not of the form key.path=value")
    value = parse_yaml(text, f"override {override!r}") if text else None
    pieces = key.strip().split(".")
    node: Any = values
    for depth, piece in enumerate(pieces[:-1]):
        if isinstance(node, list):
            node = node[_list_index(node, piece, override)]
            continue
        if not isinstance(node.get(piece), (dict, list)):
            node[piece] = {}
            origins.pop(".".join(pieces[: depth + 1]), None)
        node = node[piece]
    if isinstance(node, list):
        node[_list_index(node, pieces[-1], override)] = value
    else:
        node[pieces[-1]] = value
    path = key.strip()
    for old in [k for k in origins if k == path or k.startswith(f"{path}.")]:
        del origins[old]
    origins[path] = OVERRIDE


def _drop_retired(values: dict, origins: dict[str, str]) -> None:
    """Drop keys of earlier versions, which saved recipe.yaml files contain."""
    for path, old in RETIRED.items():
        section, key = path.split(".")
        node = values.get(section)
        if not isinstance(node, dict) or key not in node:
            continue
        if (found := node.pop(key)) != old:
            raise ValueError(f"`{path}` is no longer a key, and the value {found!r} is no longer supported: remove it")
        origins.pop(path, None)


def _list_index(node: list, piece: str, override: str) -> int:
    if not piece.isdigit() or int(piece) >= len(node):
        raise ValueError(f"override {override!r}: {piece!r} is not an entry of a list of {len(node)}")
    return int(piece)


def _expand_variables(value: Any, need: bool) -> Any:
    """Fill `${NAME}` and `${NAME:-default}` in texts from the environment."""
    if isinstance(value, dict):
        return {key: _expand_variables(item, need) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand_variables(item, need) for item in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        name, default = match.group(1), match.group(3)
        if name in os.environ:
            return os.environ[name]
        if default is None and need:
            raise ValueError(f"the recipe uses ${{{name}}}, which the environment does not set")
        return match.group(0) if default is None else default

    return _VARIABLE.sub(fill, value)


def _unexpanded(written: Any, values: Any, path: str = "") -> dict[str, tuple[str, str]]:
    """Texts with variables: key path -> (as written, as filled in)."""
    if isinstance(written, dict):
        pairs = [(str(key), item, values[key]) for key, item in written.items() if key in values]
    elif isinstance(written, list):
        pairs = [(str(index), *both) for index, both in enumerate(zip(written, values, strict=True))]
    else:
        return {path: (written, values)} if isinstance(written, str) and _VARIABLE.search(written) else {}
    found: dict[str, tuple[str, str]] = {}
    for key, item, value in pairs:
        found |= _unexpanded(item, value, f"{path}.{key}" if path else key)
    return found


def _validate(values: dict[str, Any], cls: type[Settings]) -> Settings:
    build = values.get("model", {}).get("build") if isinstance(values.get("model"), dict) else None
    if isinstance(build, dict):  # in files of earlier versions, null leaves the choice to build_model
        values = {**values, "model": {**values["model"], "build": {k: v for k, v in build.items() if v is not None}}}
    try:
        return TypeAdapter(cls).validate_python(_numbers(values))
    except ValidationError as error:
        raise ValueError("; ".join(_explain(item, cls) for item in error.errors())) from None


def _numbers(value: Any) -> Any:
    """Convert texts such as `1e-5` to numbers, which YAML 1.1 reads as text."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return float(value)
    return value


def _explain(item: Any, cls: type) -> str:
    if item["type"] == "value_error":  # raised by the dataclass itself
        return str(item["ctx"]["error"])
    location = [str(piece) for piece in item["loc"] if not _is_branch(piece)]
    path = ".".join(location)
    if item["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _field_names_at(location[:-1], cls)
        return f"unknown key `{path}`. {did_you_mean(location[-1], known) if known else ''}".strip()
    if item["type"] in ("missing", "missing_argument"):
        return f"`{path}` is missing"
    message = item["msg"].removeprefix("Input should be ")
    near = ""
    expected = (item.get("ctx") or {}).get("expected")
    if item["type"] == "literal_error" and isinstance(item["input"], str) and expected:
        options = re.findall(r"'([^']*)'", expected)
        matches = difflib.get_close_matches(item["input"], options, n=1)
        near = f". Did you mean {matches[0]!r}?" if matches else ""
    return f"`{path}` should be {message}, found {item['input']!r}{near}"


def _is_branch(piece: Any) -> bool:
    """True for location items of pydantic that name a branch of a union, not a key."""
    return isinstance(piece, str) and (
        "[" in piece or piece in {"str", "int", "float", "bool", "dict", "list"} or hasattr(config, piece)
    )


def _field_names_at(location: list[str], cls: Any) -> list[str]:
    for piece in location:
        if piece.isdigit():
            continue
        hints = typing.get_type_hints(cls)
        if piece not in hints:
            return []
        cls = _dataclass_in(hints[piece])
        if cls is None:
            return []
    return [f.name for f in dataclasses.fields(cls)]


def _dataclass_in(hint: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return hint
    if typing.get_origin(hint) in (typing.Union, types.UnionType, list):
        return next((found for arg in typing.get_args(hint) if (found := _dataclass_in(arg))), None)
    return None


def _leaves(value: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths of all values; lists of mappings are indexed by number, other lists are one value."""
    found = []
    for key, item in value.items():
        path = f"{prefix}{key}"
        if isinstance(item, Mapping) and item:
            found += _leaves(item, f"{path}.")
        elif isinstance(item, list) and item and all(isinstance(entry, Mapping) for entry in item):
            for index, entry in enumerate(item):
                found += _leaves(entry, f"{path}.{index}.")
        else:
            found.append(path)
    return found


def _inherited_origin(path: str, origins: Mapping[str, str]) -> str:
    """Origin of the nearest enclosing key that was given as a whole, as by an override with a mapping."""
    pieces = path.split(".")
    for end in range(len(pieces) - 1, 0, -1):
        if origins.get(".".join(pieces[:end])) == OVERRIDE:
            return OVERRIDE
    return DEFAULT


def _recipe_name(path: Path) -> str:
    for folder in recipe_folders():
        if path.is_relative_to(folder):
            return path.relative_to(folder).with_suffix("").as_posix()
    return path.stem


def _display(path: Path) -> str:
    for folder in recipe_folders():
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return path.name
