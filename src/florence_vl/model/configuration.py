"""`FlorenceVLConfig`: a vision tower with several prompts, a fusion, a projector and a decoder LLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from florence_vl.model.geometry import DAVIT
from florence_vl.registry import did_you_mean

# Feature name -> Florence-2's task prompt: the strings of the released weights' training. The first three are used by
# the paper (section 3.2, worded differently); the others are Florence-2's remaining prompts without an input.
FLORENCE2_PROMPTS: dict[str, str] = {
    "caption": "Describe in detail what is shown in the image.",
    "ocr": "What is the text in the image?",
    "grounding": "Locate the objects in the image, with their descriptions.",
    "brief_caption": "What does the image describe?",
    "paragraph": "Describe with a paragraph what is shown in the image.",
    "ocr_regions": "What is the text in the image, with regions?",
    "detection": "Locate the objects with category name in the image.",
    "proposals": "Locate the region proposals in the image.",
}

# Their ids in Florence-2's BART vocabulary (0 = <s>, 2 = </s>): the ids of the released Florence-2 weights.
FLORENCE2_PROMPT_IDS: dict[str, tuple[int, ...]] = {
    "caption": (0, 47066, 21700, 11, 4617, 99, 16, 2343, 11, 5, 2274, 4, 2),
    "ocr": (0, 2264, 16, 5, 2788, 11, 5, 2274, 116, 2),
    "grounding": (0, 574, 22486, 5, 8720, 11, 5, 2274, 6, 19, 49, 24173, 4, 2),
    "brief_caption": (0, 2264, 473, 5, 2274, 6190, 116, 2),
    "paragraph": (0, 47066, 21700, 19, 10, 17818, 99, 16, 2343, 11, 5, 2274, 4, 2),
    "ocr_regions": (0, 2264, 16, 5, 2788, 11, 5, 2274, 6, 19, 3806, 116, 2),
    "detection": (0, 574, 22486, 5, 8720, 19, 4120, 766, 11, 5, 2274, 4, 2),
    "proposals": (0, 574, 22486, 5, 976, 5327, 11, 5, 2274, 4, 2),
}

FLORENCE2_GRID = (24, 24)  # released Florence-2 weights at 768 px

BACKBONE_LAYERS = {"last": -2}  # any other vision model, as in LLaVA-1.5

DBFUSION_FEATURES: tuple[str, ...] = (DAVIT, "caption", "ocr", "grounding")

MeanToken = Literal["grid", "all", "grid_before_encoder"]
PromptPadding = Literal["masked", "attended"]
Positions = Literal["absolute", "resampled"]


@strict
class FlorenceVLConfig(PreTrainedConfig):
    r"""Configuration of a Florence-VL (arXiv 2412.04424, section 3).

    Args:
        vision_config: Config of the tower: a `Florence2Config`, or that of any transformers vision model (CLIP, SigLIP,
            DINOv2 ...) with `tower="backbone"`.
        text_config: Config of any decoder LLM.
        tower: `"florence2"` or `"backbone"`.
        features: Names of the features that are fused, in the order of their channels. For `florence2`: `davit` and
            names of `prompts`; for `backbone`: names of `feature_layers`.
        prompts: Prompt text by feature name; for documentation only, as the tower reads `prompt_token_ids`.
        prompt_token_ids: Ids of each prompt, with begin and end tokens and without padding, so that no Florence-2
            tokenizer is needed at run time.
        prompt_padding: Treatment of the padding after shorter prompts in the encoder: `masked` (correct), or `attended`
            (most probably used for the released weights).
        prompt_length: Length to which prompts are padded, in tokens; `None` pads to the longest prompt in use.
            The released weights have 14.
        mean_token: Treatment of Florence-2's mean token: `grid` drops it after the encoder (576 tokens at 768 px),
            `all` keeps it (577), `grid_before_encoder` drops it before the encoder. For a `backbone` tower `grid` drops
            class and register tokens and `all` keeps them.
        positions: Position numbering of the Florence-2 tower at sizes other than the trained one: `absolute` (as in
            transformers; exact at the trained size, degraded at others) or `resampled` (both position tables are
            interpolated from `position_grid`; the same at the trained size).
        position_grid: (rows, columns) at the trained size; Florence-2's 24x24 (768 px) if None. With `absolute`
            positions it is only used to warn of other sizes.
        merge: Side of the square of neighboring tokens that are merged into one before fusion, 1 or 2. With 2, an image
            of 1536 px has the same number of tokens as one of 768 px with 1, each four times as wide.
        tiles: `{"max": 4, "global": True}`: a large image is encoded as a grid of at most `max` images of the tower's
            size, after a global view; for towers with fixed positions. See `florence_vl.model.tiles`.
        views: Named pairs of size and features, `{"glance": {"size": 384, "features": ["davit"]}}`; see
            `florence_vl.model.views`.
        feature_layers: For `backbone`: feature name -> index into the backbone's hidden states; `{"last": -2}` if None,
            as in LLaVA-1.5.
        fusion: Registered name of the fusion: `channel`, `token` or `average` (paper section 3.3), or `gated`.
        gate: Options of `gated` fusion: `context` (`none`, `image` or `question`, the default), `per_token`, `hidden`.
        projector_depth: Number of linear layers of the projector, 1 to 4.
        projector_hidden_act: Activation between the linear layers.
        image_token_id: Id of the image placeholder in the LLM's vocabulary.
        tie_word_embeddings: Whether the LLM's head is its embedding table. Follows `text_config`.

    Raises:
        ValueError: A name is unknown or two settings contradict each other; the message gives the known names.
    """

    model_type = "florence_vl"
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    # Typed Any because None until __post_init__ sets them; the docstring gives the types afterwards.
    vision_config: Any = None
    text_config: Any = None
    tower: str = "florence2"
    features: Any = None
    prompts: Any = None
    prompt_token_ids: Any = None
    prompt_padding: str = "masked"
    prompt_length: int | None = None
    positions: str = "absolute"
    position_grid: Any = None
    merge: int = 1
    tiles: Any = None
    views: Any = None
    mean_token: str = "grid"
    feature_layers: Any = None
    fusion: str = "channel"
    gate: Any = None
    projector_depth: int = 3
    projector_hidden_act: str = "gelu"
    image_token_id: int = 3
    tie_word_embeddings: bool = False
    is_encoder_decoder: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.vision_config = _part_config(self.vision_config, "florence2")
        self.text_config = _part_config(self.text_config, "llama")
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        if self.tower == "florence2":
            if self.features is None:
                self.features = list(DBFUSION_FEATURES)
            if self.prompts is None:
                self.prompts = {n: t for n, t in FLORENCE2_PROMPTS.items() if n in self.features}
            if self.prompt_token_ids is None:
                self.prompt_token_ids = {n: list(i) for n, i in FLORENCE2_PROMPT_IDS.items() if n in self.features}
        else:
            if self.feature_layers is None:
                self.feature_layers = dict(BACKBONE_LAYERS)
            if self.features is None:
                self.features = list(self.feature_layers)
            self.prompts = self.prompts or {}
            self.prompt_token_ids = self.prompt_token_ids or {}
        if isinstance(self.features, str):
            raise ValueError(f"features is {self.features!r}, a string; give a list, e.g. ['davit', 'caption']")
        self.features = list(self.features)
        self.prompt_token_ids = {name: list(ids) for name, ids in self.prompt_token_ids.items()}
        self.check()

    def check(self) -> None:
        """Check the fields against each other.

        Raises:
            ValueError: See the class.
        """
        from florence_vl.model.fusion import FUSIONS
        from florence_vl.model.fusion.gated import check_gate
        from florence_vl.model.tiles import check_tiles
        from florence_vl.model.towers import TOWERS
        from florence_vl.model.views import check_views

        _ = TOWERS[self.tower]
        _ = FUSIONS[self.fusion]
        if self.gate is not None and self.fusion != "gated":
            raise ValueError(f"gate is for fusion='gated', but fusion is {self.fusion!r}")
        check_gate(self.gate or {})
        _choice("mean_token", self.mean_token, MeanToken.__args__)  # type: ignore[attr-defined]
        _choice("positions", self.positions, Positions.__args__)  # type: ignore[attr-defined]
        _choice("prompt_padding", self.prompt_padding, PromptPadding.__args__)  # type: ignore[attr-defined]
        if self.position_grid is not None:
            self.position_grid = tuple(self.position_grid)
        if self.merge not in (1, 2):
            raise ValueError(f"merge is {self.merge}; it must be 1 or 2")
        if self.merge > 1 and self.mean_token == "all":
            raise ValueError("merge=2 merges tokens of the grid; it cannot be combined with mean_token='all'")
        if self.tiles is not None:
            self.tiles = check_tiles(self.tiles)
            if self.mean_token == "all":
                raise ValueError("tiles place tokens of the grid; they cannot be combined with mean_token='all'")
        if not 1 <= self.projector_depth <= 4:
            raise ValueError(f"projector_depth is {self.projector_depth}; it must be 1 to 4")
        names = list(self.features)
        if not names:
            raise ValueError("features is empty; name at least one, e.g. features=['davit', 'caption']")
        if len(set(names)) != len(names):
            raise ValueError(f"features names a feature twice: {names}")
        is_florence2 = getattr(self.vision_config, "model_type", None) == "florence2"
        if is_florence2 != (self.tower == "florence2"):
            raise ValueError(
                f"tower={self.tower!r} does not fit a vision_config of model_type "
                f"{getattr(self.vision_config, 'model_type', None)!r}: 'florence2' needs a Florence2Config, 'backbone' "
                "any other vision model's config"
            )
        if self.views is not None:
            self.views = check_views(self.views, names)
            sized = [name for name, view in self.views.items() if view["size"] is not None]
            if self.tiles is not None and sized:
                raise ValueError(f"views of another size cannot be combined with tiles: leave out the size of {sized}")
        if self.tower == "florence2":
            self._check_prompts(names)
        else:
            for name in names:
                _known("feature", name, self.feature_layers, "feature_layers")
            if self.mean_token == "grid_before_encoder":
                raise ValueError("mean_token='grid_before_encoder' is for the florence2 tower only")

    def _check_prompts(self, names: Sequence[str]) -> None:
        if self.feature_layers is not None:
            raise ValueError("feature_layers is for the 'backbone' tower; the florence2 tower's depth is 'davit'")
        if DAVIT in self.prompt_token_ids:
            raise ValueError(f"{DAVIT!r} names the unprompted feature and cannot be a prompt; choose another name")
        longest = 0
        for name in names:
            if name == DAVIT:
                continue
            _known("feature", name, [DAVIT, *self.prompt_token_ids], "prompt_token_ids")
            ids = self.prompt_token_ids[name]
            vocab_size = self.vision_config.text_config.vocab_size
            if not ids or min(ids) < 0 or max(ids) >= vocab_size:
                raise ValueError(
                    f"prompt_token_ids[{name!r}] is {ids}: ids must be in [0, {vocab_size}), the vocabulary of this "
                    "Florence-2. Tokenize the prompt with that Florence-2's own tokenizer (build_model does)"
                )
            longest = max(longest, len(ids))
        rows, columns = self.position_grid or FLORENCE2_GRID
        tables = self.vision_config.vision_config.max_position_embeddings
        if self.positions == "resampled" and not 0 < max(rows, columns) <= tables:
            raise ValueError(
                f"position_grid is {rows}x{columns}, but this Florence-2 has {tables} trained positions per axis: give "
                "the grid of its trained size"
            )
        if self.prompt_length is not None and self.prompt_length < longest:
            raise ValueError(f"prompt_length is {self.prompt_length}, but a prompt in use has {longest} tokens")

    @property
    def fusion_options(self) -> dict[str, Any]:
        """Arguments of the fusion in addition to the features."""
        if self.fusion != "gated":
            return {}
        return {"context_dim": self.text_config.hidden_size, "context": "question", **(self.gate or {})}

    @property
    def context_length(self) -> int | None:
        """Context length of the LLM in tokens, including image tokens; None if its config has no limit."""
        return getattr(self.text_config, "max_position_embeddings", None)

    @property
    def trained_grid(self) -> tuple[int, int] | None:
        """The grid from which position tables are resampled; None with absolute positions."""
        return (self.position_grid or FLORENCE2_GRID) if self.positions == "resampled" else None

    def to_diff_dict(self) -> dict[str, Any]:
        """The saved fields: all except the local paths of the parts."""
        return _without_paths(super().to_diff_dict())

    @property
    def prompt_names(self) -> list[str]:
        """Names of the prompted features, in order."""
        return [name for name in self.features if name != DAVIT] if self.tower == "florence2" else []


def _without_paths(values: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in values.items() if key != "_name_or_path"}
    return {key: _without_paths(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _part_config(config: PreTrainedConfig | Mapping[str, Any] | None, default_type: str) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    values = dict(config or {})
    return AutoConfig.for_model(values.pop("model_type", default_type), **values)


def _choice(field: str, value: str, options: Sequence[str]) -> None:
    if value not in options:
        raise ValueError(f"unknown {field} {value!r}. {did_you_mean(value, options)}")


def _known(kind: str, name: str, options: Mapping[str, Any] | Sequence[str], where: str) -> None:
    if name not in options:
        raise ValueError(f"unknown {kind} {name!r}: {where} has no such name. {did_you_mean(name, options)}")
