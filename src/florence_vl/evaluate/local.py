"""Answers from a local model: batched, left-padded, with each image encoded once for all its questions.

Questions about the same image also share the LLM's key-value cache of their common prefix. Shape letters: B questions,
G groups of one image, P length of the longest common prefix, S length of the longest rest, N tokens of an image, H
width of the LLM.

The serving engine is not used here: it takes requests as they come and prefills one question per image before the
others, which takes 14 % more CPU time than one prefill of all prefixes for batches that are known in advance.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florence_vl.evaluate.answer import Answer, Answerer
from florence_vl.evaluate.benchmark import Generation
from florence_vl.evaluate.question import ImagePicture, Question
from florence_vl.files import cache_dir, sha256, write_text
from florence_vl.model.features import encode_images, identity_digest, state_hash
from florence_vl.model.frozen import eval_mode
from florence_vl.model.pictures import open_image
from florence_vl.model.resolution import resolution_settings
from florence_vl.model.router import Routing, set_view
from florence_vl.serve.sampling import stop_ids


def state_fingerprint(model: Any, processor: Any) -> str:
    """Hash of what answers depend on: weights, configs and chat template."""
    configs = (model.config.to_json_string(), model.generation_config.to_json_string())
    return identity_digest({"weights": state_hash(model), "configs": configs, "template": processor.chat_template})


class LocalAnswerer(Answerer):
    """A transformers image-text-to-text model.

    For a Florence-VL, images are encoded once and prompts share their prefix. Any other model uses its own processor.

    Args:
        model: A model on its device.
        processor: Its processor, with a chat template.
        batch_size: Questions per batch.
        identity: Identity of the model; by default a fingerprint of the weights in memory. For a Florence-VL the
            resolution settings (see `resolution_settings`) are added.
        share_prefix: Whether prompts about the same image share the computation of their prefix.
        cached_images: Number of encoded images that are cached for later batches.
        seed: Seed for sampling, for benchmarks with a temperature.
        routing: Chooses the view of each image by the question.

    Raises:
        ValueError: The processor has no chat template.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        batch_size: int = 16,
        identity: dict[str, Any] | None = None,
        share_prefix: bool = True,
        cached_images: int = 64,
        seed: int = 0,
        routing: Routing | None = None,
    ) -> None:
        template = getattr(processor, "chat_template", None)
        if not (template or getattr(getattr(processor, "tokenizer", None), "chat_template", None)):
            raise ValueError(
                "the model has no chat template, so its prompts are unknown: save one with its processor "
                "(chat_template.jinja), for example from `florence-vl build`"
            )
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.identity = identity or {
            "model": type(model).__name__,
            "fingerprint": state_fingerprint(model, processor),
        }
        self.share_prefix = share_prefix
        self.seed = seed
        self.encoded_images = 0  # number of images encoded by the tower
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self._cached_images = cached_images
        self._own = hasattr(processor, "tokenize") and hasattr(model, "num_image_tokens")
        if self._own:
            self.identity = {**self.identity, **resolution_settings(model, processor)}
        self.routing = routing
        if routing is not None:
            self.identity |= routing.identity
        self._by_question = self._own and (model.model.fusion.uses_context or routing is not None)
        self._stop = stop_ids(model, processor.tokenizer)
        self._context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def close(self) -> None:
        self._cache.clear()

    @torch.inference_mode()
    def answer(self, questions: Sequence[Question], generation: Generation) -> list[Answer]:
        """Greedy answers (sampled with a temperature above 0).

        A question with an unreadable image, or with a prompt that fills the LLM's context, gets no answer but an
        `error`. An answer ends, unfinished, at the end of the context.
        """
        if generation.temperature > 0:  # the same batch is sampled in the same way, also after a resume
            name = "/".join(f"{q.benchmark}:{q.id}" for q in questions)
            torch.manual_seed(int.from_bytes(hashlib.sha256(f"{self.seed}/{name}".encode()).digest()[:7], "big"))
        with eval_mode(self.model):
            opened, unread = self._open_pictures(questions)
            asked = [question for question in questions if id(question) not in unread]
            ask = self._answer_own if self._own else self._answer_any
            found = iter(ask(asked, opened, generation) if asked else [])
            return [Answer("", error=unread[id(q)]) if id(q) in unread else next(found) for q in questions]

    def _open_pictures(self, questions: Sequence[Question]) -> tuple[dict[str, Any], dict[int, str]]:
        """Images that are not encoded yet, by key, and the reasons for questions with an unreadable one, by `id`."""
        opened: dict[str, Any] = {}
        unread: dict[int, str] = {}
        for question in questions:
            for position, picture in enumerate(question.images):
                if picture.key in opened or self._key(question, position) in self._cache:
                    continue
                try:
                    opened[picture.key] = _open(question, position)
                except (OSError, ValueError) as error:
                    unread[id(question)] = str(error)
        return opened, unread

    def _without_long(
        self,
        lengths: Sequence[int],
        questions: Sequence[Question],
        ask: Callable[[list[Question]], list[Answer]],
    ) -> list[Answer] | None:
        """Errors for prompts that fill the LLM's context; the other questions are asked. None if all fit."""
        limit = self._context
        if limit is None or max(lengths) < limit:
            return None
        rest = [q for q, length in zip(questions, lengths, strict=True) if length < limit]
        found = iter(ask(rest) if rest else [])
        message = "the prompt has {} tokens, images included, which leaves no room in the LLM's context of {}"
        return [
            next(found) if length < limit else Answer("", error=message.format(length, limit)) for length in lengths
        ]

    # ---------------------------------------------------------------- any model

    def _answer_any(
        self, questions: Sequence[Question], opened: dict[str, Any], generation: Generation
    ) -> list[Answer]:
        chats = [[{"role": "user", "content": question.content()}] for question in questions]
        texts = [self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
        images = [[opened[picture.key] for picture in question.images] for question in questions]
        bos = getattr(getattr(self.processor, "tokenizer", None), "bos_token", None)
        written = bool(bos) and all(text.startswith(bos) for text in texts)  # by the template, so not added again
        inputs = self.processor(
            text=texts,
            images=images if any(images) else None,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            **({"add_special_tokens": False} if written else {}),
        )
        lengths = inputs["attention_mask"].sum(-1).tolist()
        again = self._without_long(lengths, questions, lambda rest: self._answer_any(rest, opened, generation))
        if again is not None:
            return again
        self.encoded_images += sum(map(len, images))
        inputs = inputs.to(self.model.device)
        for name, value in inputs.items():
            if torch.is_tensor(value) and value.is_floating_point():
                inputs[name] = value.to(self.model.dtype)
        out = self.model.generate(**inputs, **self._options(generation))
        return self._read(out[:, inputs["input_ids"].shape[1] :], lengths)

    # ---------------------------------------------------------------- Florence-VL

    def _key(self, question: Question, position: int) -> str:
        """Key of an image's tokens: the image, and with a gated fusion or a router also the question."""
        picture = question.images[position].key
        return f"{picture}\0{question.text}" if self._by_question else picture

    def encode(self, questions: Sequence[Question], opened: dict[str, Any]) -> dict[str, Tensor]:
        """Projected tokens (N, H) of these questions' images, by `_key`; cached ones are reused.

        Args:
            questions: The questions.
            opened: Images that may not be in the cache, by their own key.
        """
        wanted: dict[str, tuple[Question, int]] = {}
        for question in questions:
            for position in range(len(question.images)):
                wanted.setdefault(self._key(question, position), (question, position))
        missing = [key for key in wanted if key not in self._cache]
        if missing:
            places = [wanted[key] for key in missing]
            context: dict[str, Any] = {}
            if self.model.model.fusion.uses_context:  # one image per chat, so that each has the whole question
                chats = [
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}]
                    for q, _ in places
                ]
                rows = self.processor.question_inputs(chats)
                context = {name: torch.tensor(value, device=self.model.device) for name, value in rows.items()}
            images = [opened[question.images[position].key] for question, position in places]
            if self.routing is not None:
                texts = [question.text for question, _ in places]
                context["views"] = self.routing.views(self.model, self.processor, images, texts)
            encoded = encode_images(self.model, self.processor, images, **context)
            self._cache |= dict(zip(missing, encoded, strict=True))
            self.encoded_images += len(missing)
        found = {}
        for key in wanted:
            self._cache.move_to_end(key)
            found[key] = self._cache[key]
        while len(self._cache) > max(self._cached_images, len(wanted)):
            self._cache.popitem(last=False)
        return found

    def token_ids(self, question: Question, features: dict[str, Tensor]) -> list[int]:
        """Token ids of a question's prompt, with each image's placeholder repeated for its tokens."""
        chat = [{"role": "user", "content": question.content()}]
        text = self.processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids, _ = self.processor.tokenize(text)
        counts = iter([features[self._key(question, i)].shape[0] for i in range(len(question.images))])
        image_id = self.processor.image_token_id
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * (next(counts) if token == image_id else 1)
        return expanded

    def _answer_own(
        self, questions: Sequence[Question], opened: dict[str, Any], generation: Generation
    ) -> list[Answer]:
        features = self.encode(questions, opened)
        rows = [self.token_ids(question, features) for question in questions]
        lengths = [len(row) for row in rows]
        again = self._without_long(lengths, questions, lambda rest: self._answer_own(rest, opened, generation))
        if again is not None:
            return again
        groups: dict[str, list[int]] = {}
        for index, question in enumerate(questions):
            groups.setdefault(question.picture_key, []).append(index)
        prefixes = [self._common(questions[m[0]], [rows[i] for i in m]) for m in groups.values()]
        share = (
            self.share_prefix
            and not self._by_question
            and len(questions) > len(groups)
            and all(prefixes)
            and not self._slides()
        )
        if not share:
            images = [features[self._key(q, i)] for q in questions for i in range(len(q.images))]
            ids, mask = self._pad(rows)
            inputs = {"input_ids": ids, "attention_mask": mask}
            out = self.model.generate(**inputs, **_encoded(images), **self._options(generation))
            return self._read(out[:, ids.shape[1] :], lengths)
        firsts = [questions[members[0]] for members in groups.values()]
        heads_GP, mask_GP = self._pad([rows[m[0]][:n] for m, n in zip(groups.values(), prefixes, strict=True)])
        images = [features[self._key(q, i)] for q in firsts for i in range(len(q.images))]
        cache = self.model(
            input_ids=heads_GP,
            attention_mask=mask_GP,
            position_ids=(mask_GP.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            logits_to_keep=1,
            **_encoded(images),
        ).past_key_values
        group_of = {i: g for g, members in enumerate(groups.values()) for i in members}
        tails = [row[prefixes[group_of[i]] :] for i, row in enumerate(rows)]
        overhead = _PASS_COST["cpu" if heads_GP.device.type == "cpu" else "accelerator"]
        parts = split_lengths([len(tail) for tail in tails], overhead)
        answers: dict[int, Answer] = {}
        for number, part in enumerate(parts):
            index_B = torch.tensor([group_of[i] for i in part], device=heads_GP.device)
            own = cache if number == len(parts) - 1 else copy.deepcopy(cache)
            own.batch_select_indices(index_B)
            tails_BS, tail_mask_BS = self._pad([tails[i] for i in part])
            ids = torch.cat([heads_GP[index_B], tails_BS], dim=1)
            mask = torch.cat([mask_GP[index_B], tail_mask_BS], dim=1)
            out = self.model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=own, **self._options(generation)
            )
            found = self._read(out[:, ids.shape[1] :], [lengths[i] for i in part])
            answers |= dict(zip(part, found, strict=True))
        return [answers[i] for i in range(len(questions))]

    def _common(self, question: Question, rows: list[list[int]]) -> int:
        """Length of the rows' common prefix, 0 unless it contains all images; at least one token stays outside."""
        shortest = min(len(row) for row in rows) - 1
        length = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
        last = max((i for i, token in enumerate(rows[0]) if token == self.processor.image_token_id), default=-1)
        return length if question.images and length > last else 0

    def _slides(self) -> bool:
        """Whether the LLM has a sliding window, in which padding between prefix and rest counts (no sharing then)."""
        text = self.model.config.get_text_config()
        kinds = getattr(text, "layer_types", None) or ()
        return "sliding_attention" in kinds or bool(getattr(text, "sliding_window", None))

    # ---------------------------------------------------------------- both

    def _pad(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows))
        pad = self.processor.tokenizer.pad_token_id
        ids = [[pad] * (longest - len(row)) + row for row in rows]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
        return torch.tensor(ids, device=self.model.device), torch.tensor(mask, device=self.model.device)

    def _options(self, generation: Generation) -> dict[str, Any]:
        options: dict[str, Any] = {
            "max_new_tokens": generation.max_new_tokens,
            "pad_token_id": self.processor.tokenizer.pad_token_id,
            "eos_token_id": self._stop or None,
            "use_cache": True,
            "num_beams": 1,
        }
        if generation.temperature > 0:
            return options | {"do_sample": True, "temperature": generation.temperature, "top_p": 1.0, "top_k": 0}
        return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}

    def _read(self, generated: Tensor, lengths: Sequence[int]) -> list[Answer]:
        """Answers in the generated ids (B, T) to prompts of these lengths, tokens."""
        stop = set(self._stop)
        answers = []
        for row, length in zip(generated.tolist(), lengths, strict=True):
            if self._context is not None:
                row = row[: self._context - length]
            end = next((i for i, token in enumerate(row) if token in stop), None)
            kept = row if end is None else row[:end]
            text = self.processor.tokenizer.decode(kept, skip_special_tokens=True)
            answers.append(Answer(text, finished=end is not None, tokens=len(kept)))
        return answers


# Overhead of a pass of the LLM in tokens: weights are read once per pass, which on a CPU is small compared with the
# matrix products.
_PASS_COST = {"cpu": 64, "accelerator": 8192}


def split_lengths(lengths: Sequence[int], overhead: int) -> list[list[int]]:
    """Divide rows into batches with minimal padding: minimizes the sum of rows x longest, plus `overhead` per batch.

    Args:
        lengths: Tokens of each row.
        overhead: Cost of one more batch, in tokens.

    Returns:
        Indices of the rows of each batch, with rows in order of length.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    best = [(0, 0)]  # minimum cost of the first n rows, and the start of their last batch
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        best.append(min((best[start][0] + (end - start) * longest + overhead, start) for start in range(end)))
    parts: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        parts.append(order[start:end])
        end = start
    return parts[::-1]


def _encoded(images: list[Tensor]) -> dict[str, Any]:
    if not images:
        return {}
    from florence_vl.model.modeling import FlorenceVLImageFeatures

    return {"mm_encoder_outputs": {"image": FlorenceVLImageFeatures(pooler_output=images)}}


def _open(question: Question, position: int) -> Any:
    image = question.images[position]
    if isinstance(image, ImagePicture):
        return image.image
    return open_image(image.read(), name=f"image {position} of {question.benchmark} question {question.id}")


def folder_fingerprint(folder: Path) -> str:
    """Hash of every byte of a saved model's files, except reports and logs.

    Digests of large files are cached under path, size, inode and modification times, so weights are read once.
    """
    known_file = cache_dir() / "fingerprints.json"
    try:
        known = json.loads(known_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    digest, added = hashlib.sha256(), False
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.suffix in {".md", ".log", ".html"}:
            continue
        facts = path.stat()
        key = f"{path.resolve()}:{facts.st_size}:{facts.st_ino}:{facts.st_mtime_ns}:{facts.st_ctime_ns}"
        if key not in known:
            known[key] = sha256(path)
            added = added or facts.st_size > 1 << 20
        digest.update(f"{path.name}:{known[key]}\n".encode())
    if added:
        kept = {key: value for key, value in known.items() if int(key.rsplit(":", 4)[1]) > 1 << 20}
        with contextlib.suppress(OSError):  # a read-only cache only costs time
            write_text(known_file, json.dumps(kept))
    return digest.hexdigest()[:16]


def load_answerer(
    model: str,
    device: str = "auto",
    dtype: str = "auto",
    batch_size: int = 16,
    share_prefix: bool = True,
    seed: int = 0,
    resolution: Mapping[str, Any] | None = None,
) -> LocalAnswerer:
    """Load a Florence-VL, or any image-text-to-text model that transformers loads without remote code.

    Args:
        model: Folder, hub id, or `mini` for the packaged model.
        device: See `florence_vl.model.loading.choose_device`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        batch_size: Questions per batch.
        share_prefix: See `LocalAnswerer`.
        seed: Seed for sampling.
        resolution: Keyword arguments of `florence_vl.model.router.set_view`, for a Florence-VL.

    Raises:
        FileNotFoundError: The model does not exist.
        ValueError: The folder contains no such model, it has no chat template, or it does not support the resolution.
    """
    from florence_vl.model.contract import load_whole
    from florence_vl.model.loading import (
        ORIGINAL_TYPES,
        check_folder,
        choose_device,
        choose_dtype,
        load_model,
        saved_type,
    )

    folder, routing = Path(model).expanduser(), None
    kind = saved_type(folder)
    if kind in (None, "florence_vl", *ORIGINAL_TYPES):
        where = check_folder(model)
        loaded, processor = load_model(model, device, dtype)
        folder = Path(where)
        if resolution:
            routing = set_view(loaded, processor, folder, **resolution)
    else:
        if resolution:
            raise ValueError(
                f"{folder} contains a {kind!r}, but {', '.join(resolution)} is for a Florence-VL: remove it"
            )
        from transformers import AutoModelForImageTextToText, AutoProcessor

        place = choose_device(device)
        wanted = choose_dtype(dtype, place)
        try:
            loaded = load_whole(AutoModelForImageTextToText, folder, dtype=wanted).to(place).eval()
        except ValueError as error:
            reason = str(error).partition("\n")[0]  # transformers goes on with all types that it knows
            raise ValueError(f"the {kind!r} in {folder} is not a whole image-text-to-text model: {reason}") from None
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
    if folder.is_dir():
        fingerprint = folder_fingerprint(folder)
    else:
        fingerprint = str(getattr(loaded.config, "_commit_hash", None) or state_fingerprint(loaded, processor))
    identity = {"model": str(model), "fingerprint": fingerprint, "dtype": str(loaded.dtype).removeprefix("torch.")}
    return LocalAnswerer(loaded, processor, batch_size, identity, share_prefix, seed=seed, routing=routing)
