"""`BuildConfig`: the options of a new model. Imports only light modules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass
class BuildConfig:
    """Parts of a new model and their combination: the options of `build_model`, `florence-vl build` and recipes.

    Attributes:
        vision: Folder or hub id of a Florence-2 in transformers' layout (`florence-vl convert` converts Microsoft's),
            or of any vision backbone (CLIP, SigLIP, DINOv2); its config determines the tower. `mini` is the packaged
            Florence-2.
        llm: Folder or hub id of any decoder LLM, a `.gguf` file (dequantized), or the packaged `smollm2` or `mini` (the
            LLM of the mini Florence-VL).
        features: Names of the fused features in order; by default `davit caption ocr grounding` and all `prompts`, or
            all `feature_layers` of a backbone.
        prompts: More prompts by feature name, or other wordings; tokenized with the Florence-2's own tokenizer.
        feature_layers: For a backbone: feature name -> index into its hidden states; `{"last": -2}` if None.
        fusion: `channel`, `token`, `average` or `gated`.
        gate: Options of `gated` fusion; see `FlorenceVLConfig`.
        projector_depth: Linear layers of the projector, 1 to 4.
        mean_token: See `FlorenceVLConfig`.
        prompt_padding: See `FlorenceVLConfig`.
        prompt_length: Pad prompts to this number of tokens.
        positions: See `FlorenceVLConfig`. At the vision model's own size both give the same result.
        merge: 1, or 2 to merge squares of 2x2 tokens; see `FlorenceVLConfig`.
        tiles: `{max: 4, global: true}` for large images as tiles of the tower's size; see `FlorenceVLConfig`.
        views: Named pairs of size and features; see `FlorenceVLConfig`.
        image_size: Pixels per side; by default the size of the vision model's own preprocessing.
        image_token: Image placeholder in the LLM's vocabulary; by default a reserved token, otherwise a new one.
        chat_template: Name of a chat template; by default the one that fits the tokenizer.
        chat_template_options: Options of the template; see `florence_vl.model.chat_template`.
    """

    __pydantic_config__ = {"extra": "forbid"}

    vision: str
    llm: str
    features: list[str] | None = None
    prompts: dict[str, str] | None = None
    feature_layers: dict[str, int] | None = None
    fusion: str = "channel"
    gate: dict[str, Any] | None = None
    projector_depth: int = 3
    mean_token: Literal["grid", "all", "grid_before_encoder"] = "grid"
    prompt_padding: Literal["masked", "attended"] = "masked"
    prompt_length: int | None = None
    positions: Literal["resampled", "absolute"] = "resampled"
    merge: int = 1
    tiles: dict[str, Any] | None = None
    views: dict[str, Any] | None = None
    image_size: int | None = None
    image_token: str | None = None
    chat_template: str | None = None
    chat_template_options: dict[str, Any] | None = None
