"""Tokenizer, images, chat template and stop tokens of a released Florence-VL, read from its folder."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from florence_vl.files import read_json
from florence_vl.model.chat_template import CHAT_TEMPLATES, choose_template, own_bos

_BOS = re.compile(r'(\{%- set bos = "[^"\n]*)(" -%\})')  # lines written by `ChatTemplate.build`
_IMAGE = re.compile(r'\{%- set image_token = "([^"\n]*)" -%\}')


@dataclass(frozen=True)
class ImageToken:
    """The placeholder of images.

    Attributes:
        token: Its text.
        id: Its id.
        rows: Number of rows that the LLM's embedding needs.
    """

    token: str
    id: int
    rows: int


@dataclass
class ReleasedProcessor:
    """Text and image settings of a released checkpoint's folder.

    Args:
        tokenizer: The checkpoint's tokenizer.
        config: Its config.json.
        template: Chat template by name; by default the one whose control tokens are in the vocabulary.
        images: Size, mean and standard deviation of the image processor, if not those of the released weights.
        template_options: Options of the template; by default those that match the released code's tokenization.
        generation: Its generation_config.json.
        piece_prefix: Whether the released code's slow tokenizer put a space before each text piece.

    Attributes:
        notes: Notes on the tokens for the user.
    """

    tokenizer: Any
    config: dict[str, Any]
    template: str | None = None
    images: dict[str, Any] = field(default_factory=dict)
    template_options: dict[str, Any] | None = None
    generation: dict[str, Any] = field(default_factory=dict)
    piece_prefix: bool = False
    notes: list[str] = field(default_factory=list)
    _chosen: ImageToken | None = None
    _chat_template: str = ""

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
            ValueError: There is no tokenizer, or it is unreadable.
        """
        tokenizer = load_tokenizer(tokenizer_folder or folder, config.get("model_type", ""))
        found = image_settings(tower_folder) if tower_folder is not None else {}
        images: dict[str, Any] = {key: found[key] for key in ("image_mean", "image_std") if key in found}
        size = found.get("size")
        if isinstance(size, dict) and size.get("height", 0) == size.get("width"):
            images["size"] = size
        path = folder / "generation_config.json"
        generation = read_json(path) if path.is_file() else {}
        prefix = has_piece_prefix(tokenizer_folder or folder)
        return cls(tokenizer, config, template, images, template_options, generation, prefix)

    def __post_init__(self) -> None:
        self.template = self.template or choose_template(self.tokenizer)
        if self.template_options is None:
            self.template_options = parity_options(self.template, self.tokenizer)

    @property
    def aspect_ratio(self) -> str:
        """`pad` if config.json specifies it; without `image_aspect_ratio` the released code squashes."""
        return "pad" if self.config.get("image_aspect_ratio") == "pad" else "squash"

    def choose_image_token(self, rows: int) -> ImageToken:
        """Choose the image placeholder: the first unused token of the vocabulary, otherwise a new `<image>`.

        It is added to the tokenizer as a token that keeps the white space around it, and the chat template is built.

        Args:
            rows: Rows of the LLM's embedding.
        """
        from transformers import AddedToken

        self._chosen = self._free_token(rows)
        token = AddedToken(self._chosen.token, special=True, normalized=False, lstrip=False, rstrip=False)
        self.tokenizer.add_tokens([token], special_tokens=True)
        self._chat_template = self._build_template()
        return self._chosen

    def _free_token(self, rows: int) -> ImageToken:
        from florence_vl.model.assemble import RESERVED_IMAGE_TOKENS

        vocabulary = self.tokenizer.get_vocab()
        for token in RESERVED_IMAGE_TOKENS:
            if vocabulary.get(token, rows) < rows:
                return ImageToken(token, vocabulary[token], rows)
        index = len(self.tokenizer)
        return ImageToken("<image>", index, rows if index < rows else enlarged_rows(index))

    def released_ids(self, question: str) -> list[int]:
        """Ids of one question about one image in the released code; the image is one placeholder.

        The text before and after the image is tokenized separately; after a leading begin token the first token of the
        second piece is dropped.
        """
        assert self._chosen is not None
        text = self._render(self._build(newline=True), question)
        before, after = text.split(self._chosen.token)
        first, second = self._piece(before), self._piece(after)
        if first[:1] == [self.tokenizer.bos_token_id]:
            second = second[1:]
        return [*first, self._chosen.id, *second]

    def our_ids(self, question: str) -> list[int]:
        """Ids of the same conversation with the converted chat template."""
        return self.tokenizer(self._render(self._chat_template, question), add_special_tokens=False)["input_ids"]

    def _piece(self, text: str) -> list[int]:
        if not self.piece_prefix:
            return self.tokenizer(text)["input_ids"]
        # SentencePiece's slow tokenizer (`legacy: false`): a space before the text, none after control tokens. After
        # another control token a fast tokenizer adds none either, so a literal space is equivalent.
        assert self._chosen is not None
        ids = self.tokenizer(f"{self._chosen.token} {text}", add_special_tokens=False)["input_ids"][1:]
        bos = [self.tokenizer.bos_token_id] if own_bos(self.tokenizer) else []
        if len(ids) > 1 and ids[1] in self.tokenizer.all_special_ids and self._named_special(ids[1]):
            ids = ids[1:]
        return bos + ids

    def _named_special(self, index: int) -> bool:
        named = [self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id]
        return index in [*named, self.tokenizer.unk_token_id]

    def _build(self, newline: bool | None = None, after_image: str = "") -> str:
        assert self._chosen is not None
        options = dict(self.template_options or {})
        template = CHAT_TEMPLATES[str(self.template)]
        if newline is not None and template.newline_after_image:  # the released string itself
            options |= {"newline_after_image": newline, "double_bos": False}
        built = template.build(self.tokenizer, image_token=self._chosen.token + after_image, **options)
        if newline is not None and template.bos is None:  # the tokenizer writes the begin token, if any
            built = _BOS.sub('{%- set bos = "" -%}', built, count=1)
        return built

    def _build_template(self) -> str:
        """The template with the released code's tokens, with spaces at the seams where a slow tokenizer had them."""
        question = "What is in the image?"
        for lead, after_image in itertools.product(("", " "), ("", " ")):
            self._chat_template = with_lead(self._build(after_image=after_image), lead)
            if self.our_ids(question) == self.released_ids(question):
                return self._chat_template
        self.notes.append(
            "the chat template does not reproduce the released code's tokens exactly (near the image or at the start): "
            "compare ReleasedProcessor.released_ids and our_ids"
        )
        return self._build()

    def _render(self, chat_template: str, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        if self.template == "plain":
            messages.append({"role": "assistant", "content": [{"type": "text", "text": question}]})
        return self.tokenizer.apply_chat_template(
            messages, chat_template=chat_template, tokenize=False, add_generation_prompt=self.template != "plain"
        )

    def settings(self) -> dict[str, Any]:
        """Template and image switches, for the report."""
        return {"template": self.template, **(self.template_options or {}), "image_aspect_ratio": self.aspect_ratio}

    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the template's end if it is one token, and the checkpoint's end tokens."""
        end = (self.template_options or {}).get("end", "eos")
        ids: list[int | None] = [*CHAT_TEMPLATES[str(self.template)].end_ids(self.tokenizer, end)]
        for found in (
            self.generation.get("eos_token_id"),
            self.config.get("eos_token_id"),
            self.tokenizer.eos_token_id,
        ):
            ids += found if isinstance(found, list) else [found]
        return list(dict.fromkeys(i for i in ids if i is not None))

    def save(self, folder: Path, config: Any) -> None:
        """Write processor, chat template and generation settings for a model with `config`."""
        from transformers import GenerationConfig

        from florence_vl.model.image_processing import FlorenceVLImageProcessor
        from florence_vl.model.processing import FlorenceVLProcessor, pad_left

        assert self._chosen is not None
        pad_left(self.tokenizer)
        token = self._chosen.token
        processor = FlorenceVLProcessor(
            FlorenceVLImageProcessor(image_aspect_ratio=self.aspect_ratio, **self.images),
            self.tokenizer,
            chat_template=self._chat_template,
            image_token=token,
        ).fit(config)
        if processor.image_token_id != config.image_token_id:
            raise ValueError(
                f"the tokenizer gives {token!r} the id {processor.image_token_id}, expected {config.image_token_id}"
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


def with_lead(chat_template: str, lead: str) -> str:
    """A built chat template that writes `lead` after its begin token."""
    return _BOS.sub(rf"\g<1>{lead}\g<2>", chat_template, count=1)


def seams(chat_template: str) -> tuple[str, str]:
    """Spaces that a converted folder's chat template writes after its begin token and after each image."""
    bos, image = _BOS.search(chat_template), _IMAGE.search(chat_template)
    return (" " if bos and bos[1].endswith(" ") else ""), (" " if image and image[1].endswith(" ") else "")


def load_tokenizer(folder: Path, model_type: str = "") -> Any:
    """Load a fast tokenizer from a folder, whatever model type its config.json names.

    Args:
        folder: Contains tokenizer.json, or SentencePiece's tokenizer.model.
        model_type: The authors' model type (`llava_phi` ...): transformers reads the files differently for different
            LLMs.

    Raises:
        ValueError: There is none, or it is unreadable.
    """
    from transformers import AutoTokenizer, LlamaConfig, Phi3Config

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"{folder}: no tokenizer (tokenizer.json or tokenizer.model); pass --tokenizer FOLDER")
    try:
        llm = Phi3Config() if model_type == "llava_phi" else LlamaConfig()
        tokenizer = AutoTokenizer.from_pretrained(folder, config=llm, trust_remote_code=False)
    except Exception as error:  # readers of four formats raise many types
        raise ValueError(
            f"{folder}: its tokenizer is unreadable ({type(error).__name__}: {error}). A tokenizer.model "
            "needs: pip install 'florence-vl[convert]'"
        ) from error
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: its tokenizer has no fast version; convert it with tokenizers or pass --tokenizer")
    return tokenizer


def image_settings(folder: Path) -> dict[str, Any]:
    """Settings of a saved image processor; empty where there is none."""
    for path in (folder / "processor_config.json", folder / "preprocessor_config.json"):
        found = read_json(path) if path.is_file() else {}
        found = found.get("image_processor", found)
        if "size" in found:
            return dict(found)
    return {}


def has_piece_prefix(folder: Path) -> bool:
    """Whether a folder's tokenizer is SentencePiece's slow one that puts a space before each text (`legacy: false`).

    The released code loads slow tokenizers. Those with `legacy: true` also put it after control tokens, as the fast
    version does.
    """
    path = folder / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    slow = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast")
    return slow and config.get("legacy") is False and config.get("add_prefix_space") is not False


def enlarged_rows(index: int) -> int:
    """Rows of an embedding that was enlarged for the new token `index`."""
    from florence_vl.model.assemble import VOCABULARY_MULTIPLE

    return -(-(index + 1) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def parity_options(template: str, tokenizer: Any) -> dict[str, Any]:
    """Template options that reproduce the released code's token sequence.

    It tokenizes the text before and after each image separately. If the first piece begins with the begin token, it
    drops the first token of every later piece, as if it were another begin token. With a tokenizer that adds none, that
    token is the newline after the image; with one that does, the llama3 template (which also writes one) gives two.
    """
    if template == "llama3":
        own = bool(own_bos(tokenizer))
        return {"newline_after_image": own, "double_bos": own}
    if template == "plain":
        return {"end": "newline"}
    return {}
