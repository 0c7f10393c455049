"""Tokenizer, images, chat template and stop tokens of a released Florence-VL, read from its own folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from florence_vl.model.convert.shards import read_json


@dataclass(frozen=True)
class ImageToken:
    """The placeholder of images.

    Attributes:
        token: Its text.
        id: Its id.
        rows: Rows that the LLM's embedding needs.
    """

    token: str
    id: int
    rows: int


@dataclass
class ReleasedProcessor:
    """What a released checkpoint's folder says about text and images.

    Args:
        tokenizer: The checkpoint's own.
        config: Its config.json.
        template: Chat template by name; by default the one whose control tokens the tokenizer has.
        image_size: Height and width in pixels.
        template_options: Options of the template; by default those that the released code's tokenization implies.
        generation: Its generation_config.json.
    """

    tokenizer: Any
    config: dict[str, Any]
    template: str | None = None
    image_size: int = 768
    template_options: dict[str, Any] | None = None
    generation: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        folder: Path,
        config: dict[str, Any],
        tokenizer_folder: Path | None = None,
        tower_folder: Path | None = None,
        template: str | None = None,
        template_options: dict[str, Any] | None = None,
    ) -> ReleasedProcessor:
        """Read the tokenizer and settings of a folder.

        Raises:
            ValueError: No tokenizer there, or one that can't be read.
        """
        tokenizer = load_tokenizer(tokenizer_folder or folder)
        size = 768
        if tower_folder is not None and (tower_folder / "preprocessor_config.json").is_file():
            found = read_json(tower_folder / "preprocessor_config.json").get("size")
            if isinstance(found, dict) and found.get("height") == found.get("width"):
                size = found.get("height", size)
        path = folder / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}
        return cls(tokenizer, config, template, size, template_options, generation)

    def __post_init__(self) -> None:
        from florence_vl.data.chat_template import choose_template

        self.template = self.template or choose_template(self.tokenizer)
        if self.template_options is None:
            self.template_options = parity_options(self.template, self.tokenizer)

    @property
    def aspect_ratio(self) -> str:
        """`pad` when config.json says so; without `image_aspect_ratio` the released code squashes."""
        return "pad" if self.config.get("image_aspect_ratio") == "pad" else "squash"

    def image_token(self, rows: int) -> ImageToken:
        """The first token that the vocabulary keeps free, else a new `<image>`.

        Args:
            rows: Rows of the LLM's embedding.
        """
        from florence_vl.model.assemble import RESERVED_IMAGE_TOKENS, VOCABULARY_MULTIPLE

        vocabulary = self.tokenizer.get_vocab()
        for token in RESERVED_IMAGE_TOKENS:
            if vocabulary.get(token, rows) < rows:
                return ImageToken(token, vocabulary[token], rows)
        index = len(self.tokenizer)
        multiple = VOCABULARY_MULTIPLE
        return ImageToken("<image>", index, rows if index < rows else -(-(index + 1) // multiple) * multiple)

    def settings(self) -> dict[str, Any]:
        """Template and image switches, for the report."""
        return {"template": self.template, **(self.template_options or {}), "image_aspect_ratio": self.aspect_ratio}

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the template's end token and the checkpoint's own end tokens."""
        from florence_vl.data.chat_template import CHAT_TEMPLATES

        end = CHAT_TEMPLATES[str(self.template)].end_text(self.tokenizer)
        ids = [self.tokenizer.convert_tokens_to_ids(end)]
        for found in (
            self.generation.get("eos_token_id"),
            self.config.get("eos_token_id"),
            self.tokenizer.eos_token_id,
        ):
            ids += found if isinstance(found, list) else [found]
        return list(dict.fromkeys(i for i in ids if i is not None))

    def save(self, folder: Path, config: Any) -> None:
        """Write processor, chat template and generation settings for a model with `config`."""
        from transformers import AddedToken, GenerationConfig

        from florence_vl.data.chat_template import CHAT_TEMPLATES
        from florence_vl.model.image_processing import FlorenceVLImageProcessor
        from florence_vl.model.processing import FlorenceVLProcessor, ImageTokenRule

        token = self.image_token(config.text_config.vocab_size).token
        self.tokenizer.add_tokens([AddedToken(token, special=True, normalized=False)], special_tokens=True)
        processor = FlorenceVLProcessor(
            FlorenceVLImageProcessor(
                image_aspect_ratio=self.aspect_ratio, size={"height": self.image_size, "width": self.image_size}
            ),
            self.tokenizer,
            chat_template=CHAT_TEMPLATES[str(self.template)].build(
                self.tokenizer, image_token=token, **(self.template_options or {})
            ),
            image_token=token,
            image_token_rule=ImageTokenRule.from_config(config),
        )
        if processor.image_token_id != config.image_token_id:
            raise ValueError(
                f"the tokenizer gives {token!r} the id {processor.image_token_id}, planned was {config.image_token_id}"
            )
        processor.save_pretrained(folder)
        known = ("temperature", "top_p", "top_k", "do_sample", "repetition_penalty", "max_new_tokens")
        fields = {key: self.generation[key] for key in known if key in self.generation}
        pad = self.tokenizer.pad_token_id
        GenerationConfig(
            **fields,
            bos_token_id=self.generation.get("bos_token_id", self.config.get("bos_token_id")),
            eos_token_id=self.stop_ids(),
            pad_token_id=pad if pad is not None else self.config.get("pad_token_id"),
        ).save_pretrained(folder)


def load_tokenizer(folder: Path) -> Any:
    """A fast tokenizer from a folder, whatever model type its config.json names.

    Raises:
        ValueError: There is none, or it can't be read.
    """
    from transformers import AutoTokenizer, LlamaConfig

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"{folder}: no tokenizer (tokenizer.json or tokenizer.model); pass --tokenizer FOLDER")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, config=LlamaConfig(), trust_remote_code=False)
    except Exception as error:  # readers of four formats raise what they raise
        raise ValueError(f"{folder}: its tokenizer can't be read ({type(error).__name__}: {error})") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: its tokenizer has no fast version; convert it with tokenizers or pass --tokenizer")
    return tokenizer


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts its begin token in front of every text by itself."""
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id


def parity_options(template: str, tokenizer: Any) -> dict[str, Any]:
    """Template options that repeat the released code's token sequence.

    It tokenizes the text before and after each image apart and, when the first piece begins with the begin token, drops
    the first token of every later piece, taking it for one more begin token. With a tokenizer that adds none, that
    token is the newline after the image; with one that does, the llama3 template (which writes its own) gives two.
    """
    if template == "llama3":
        own = adds_bos(tokenizer)
        return {"newline_after_image": own, "double_bos": own}
    if template == "plain":
        return {"end": "newline"}
    return {}
