"""Files and folders: the cache, atomic writes, digests, and the resolution of names to paths or hub ids."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from florence_vl.registry import did_you_mean

MARK = ".florence-vl.json"
"""File with the names of the files that `atomic_folder` wrote. Only folders that contain it may be replaced."""

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that stands for another one in Git LFS, which was not fetched."""

MAX_YAML_VALUES = 20_000
"""Values in a YAML document, its aliases counted each time."""

_ACTIVE: set[str] = set()  # names, without suffix, of the folders that this process writes

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def cache_dir() -> Path:
    """The cache folder: `$FLORENCE_VL_CACHE`, else `$XDG_CACHE_HOME/florence-vl`, else `~/.cache/florence-vl`."""
    explicit = os.environ.get("FLORENCE_VL_CACHE")
    if explicit:
        return Path(explicit).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "florence-vl"


def sha256(path: str | os.PathLike[str]) -> str:
    """Hexadecimal SHA-256 digest of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ValueError: The file is a Git LFS pointer, not JSON, not an object, or has a key twice; the message names it.
    """
    refuse_pointer(path)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [key for key, _ in pairs]
            raise ValueError(f"it has the key {next(key for key in names if names.count(key) > 1)!r} twice")
        return found

    try:
        value = json.loads(Path(path).read_bytes().decode(), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError(f"{path} is not a JSON object: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object, but a {type(value).__name__}")
    return value


def refuse_pointer(path: str | os.PathLike[str]) -> None:
    """Refuse a file that stands for another one in Git LFS.

    Raises:
        ValueError: It is a pointer; the message says how to fetch the file.
    """
    with open(path, "rb") as content:
        if content.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a Git LFS pointer, not the file itself: fetch the files with `git lfs pull`")


def locate(name: str | os.PathLike[str], what: str = "model") -> Path | str:
    """A local file or folder, or an id on the Hugging Face Hub. Nothing is downloaded.

    An existing name is a path. Any other name is a hub id if it has the form `owner/name` and its first part is not a
    local folder (otherwise it is a mistyped path).

    Args:
        name: The name that the user gave.
        what: Kind of object for the error message, e.g. `LLM`.

    Returns:
        A `Path` that exists, or a hub id as `str`.

    Raises:
        FileNotFoundError: The name does not exist locally and cannot be a hub id.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if path.exists():
        return path
    if _HUB_ID.fullmatch(text) and not path.parent.exists():
        return text
    parent = path.parent
    while not parent.exists():
        path, parent = parent, parent.parent
    near = [str(child.name) for child in parent.iterdir()] if parent.is_dir() and text else []
    hint = did_you_mean(path.name, near) if near else ""
    hint = f" {hint}" if hint.startswith("Did") else ""
    raise FileNotFoundError(
        f"no {what} {text!r}: there is no such file or folder in {parent.resolve()}, and an id on the Hugging Face Hub "
        f"has the form owner/name.{hint}"
    )


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path next to `path`; rename it to `path` if the block succeeds, remove it otherwise.

    The temporary path has the suffix of `path`. Missing parent folders are created. A link is followed.

    Raises:
        ValueError: `path` is a folder, a device or a named pipe.

    Example:
        >>> with atomic_file(folder / "state.pt") as temporary:
        ...     torch.save(state, temporary)
    """
    target = Path(path).expanduser().resolve()
    if target.exists() and not target.is_file():
        raise ValueError(f"{path} is not a regular file: name another one to write")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.stem}.{uuid.uuid4().hex[:8]}{target.suffix}")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str, errors: str = "strict") -> None:
    """Write a UTF-8 file atomically.

    Args:
        path: The file; missing parent folders are created.
        text: The content.
        errors: Treatment of lone surrogates, see `str.encode`.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", errors))


def parse_yaml(text: str, where: str) -> Any:
    """Read a YAML document of limited size: nested aliases could expand a short text beyond any memory.

    Raises:
        ValueError: Not YAML, or too large.
    """
    import yaml

    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ValueError(f"{where}: the YAML is nested too deeply") from None
    sizes: dict[int, int | None] = {}

    def size(node: Any) -> int:
        if not isinstance(node, (dict, list)):
            return 1
        if id(node) in sizes:
            known = sizes[id(node)]
            if known is None:
                raise ValueError(f"{where}: an alias is inside its own anchor")
            return known
        sizes[id(node)] = None
        total = 1 + sum(size(item) for item in (node.values() if isinstance(node, dict) else node))
        if total > MAX_YAML_VALUES:
            raise ValueError(f"{where}: more than {MAX_YAML_VALUES} values, aliases counted each time")
        sizes[id(node)] = total
        return total

    size(content)
    return content


@contextmanager
def atomic_folder(
    destination: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    sources: Iterable[str | os.PathLike[str]] = (),
    owned: Callable[[Path], bool] | None = None,
) -> Iterator[Path]:
    """Yield a temporary folder that replaces `destination` if the block succeeds; remove it otherwise.

    Symbolic links are followed. Leftovers of killed processes are removed.

    Args:
        destination: The folder to write.
        overwrite: Whether a folder that `atomic_folder` wrote earlier may be replaced.
        sources: Files and folders that the block reads. The destination may not contain them or be inside them.
        owned: Returns whether a folder that `atomic_folder` did not write may be replaced, e.g. because the caller
            created the folder around it.

    Raises:
        ValueError: See `check_destination`.
    """
    target = check_destination(destination, overwrite=overwrite, sources=sources, owned=owned)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{_process()}-{uuid.uuid4().hex[:8]}.partial")
    _ACTIVE.add(partial.stem)
    try:
        partial.mkdir()
        yield partial
        names = sorted(str(file.relative_to(partial)) for file in partial.rglob("*") if not file.is_dir())
        (partial / MARK).write_text(json.dumps({"files": names}, indent=1) + "\n", encoding="utf-8")
        if target.exists():
            old = partial.with_suffix(".old")
            os.replace(target, old)
            os.replace(partial, target)
            shutil.rmtree(old)
        else:
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _ACTIVE.discard(partial.stem)


def check_destination(
    destination: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    sources: Iterable[str | os.PathLike[str]] = (),
    owned: Callable[[Path], bool] | None = None,
) -> Path:
    """The folder that `destination` resolves to, if it may be written. Arguments as in `atomic_folder`.

    Call it before long work whose result `atomic_folder` will write. A folder that a killed process was replacing is
    restored first.

    Raises:
        ValueError: The destination is a file or a device; it is not empty and `overwrite` is false; it contains files
            that `atomic_folder` did not write; or it contains a source or is inside one.
    """
    target = Path(destination).expanduser().resolve()
    if target.exists() and not target.is_dir():
        raise ValueError(f"{destination} is not a folder: name a new or empty folder")
    for source in sources:
        origin = Path(source).expanduser().resolve()
        if target == origin or target in origin.parents or origin in target.parents:
            raise ValueError(f"{destination} and the source {source} are the same or one is inside the other")
    _sweep(target)
    if not target.exists() or not any(target.iterdir()):
        return target
    if not overwrite:
        raise ValueError(f"{destination} exists and is not empty: name another folder, or pass --overwrite")
    if not (owned is not None and owned(target)):
        foreign = _foreign(target)
        if foreign:
            raise ValueError(
                f"{destination} contains {foreign}, which florence-vl did not write: it will not be deleted. Name "
                "another folder, or remove it yourself"
            )
    return target


def _foreign(folder: Path) -> str | None:
    """The first file of the folder that its mark does not list; without a mark, any file."""
    try:
        known = {MARK, *json.loads((folder / MARK).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        known = set()
    for path in sorted(folder.rglob("*")):
        if (path.is_symlink() or not path.is_dir()) and str(path.relative_to(folder)) not in known:
            return str(path.relative_to(folder))
    return None if known else "folders"


def _process() -> str:
    host = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
    return f"{host}-{os.getpid()}"


def _sweep(target: Path) -> None:
    """Remove leftovers of killed processes on this machine, and restore a folder that one was replacing."""
    host = _process().partition("-")[0]
    pattern = re.compile(rf"\.{re.escape(target.name)}\.{host}-(\d+)-[0-9a-f]{{8}}\.(partial|old)")
    for left in list(target.parent.iterdir()) if target.parent.is_dir() else ():
        match = pattern.fullmatch(left.name)
        if match is None or left.stem in _ACTIVE or (int(match[1]) != os.getpid() and _alive(int(match[1]))):
            continue
        if match[2] == "old" and not target.exists():
            os.replace(left, target)
        else:
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    if os.name == "nt":
        return True  # on Windows os.kill(pid, 0) ends the process
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
