"""Florence-VL as a model of lmms-eval (see `lmms_eval_manifest`): chat interface, batched, images encoded once.

    lmms-eval --model florence_vl --model_args pretrained=FOLDER,batch_size=16 --tasks pope

Install lmms-eval without its 54 requirements, some of which replace a CPU build of torch; see docs/evaluation.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from florence_vl.evaluate.benchmark import Generation
from florence_vl.evaluate.local import LocalAnswerer, load_answerer
from florence_vl.evaluate.metrics import METRICS
from florence_vl.evaluate.question import IMAGE, ImagePicture, Question

DEFAULT_NEW_TOKENS = 1024  # default of lmms-eval's adapters for tasks without a limit


class FlorenceVLAdapter(lmms):
    """Adapter of lmms-eval's chat interface to `LocalAnswerer`.

    Args:
        pretrained: Folder, hub id, or `mini`.
        batch_size: Questions per batch.
        device: See `florence_vl.model.loading.choose_device`.
        dtype: `auto`, `float32`, `bfloat16` or `float16`.
        answerer: A loaded answerer instead of `pretrained`.

    Raises:
        ValueError: Options are unknown, or neither `pretrained` nor `answerer` is given.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str | None = None,
        batch_size: int | str = 16,
        device: str = "auto",
        dtype: str = "auto",
        answerer: LocalAnswerer | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        unknown = {key: value for key, value in unknown.items() if value is not None and key != "max_batch_size"}
        if unknown:
            raise ValueError(
                f"florence_vl has no option {', '.join(unknown)}; it has pretrained, batch_size, device, dtype"
            )
        if answerer is None:
            if pretrained is None:
                raise ValueError("florence_vl needs --model_args pretrained=FOLDER")
            answerer = load_answerer(pretrained, device or "auto", dtype, int(batch_size))
        self.answerer = answerer
        self.task_dict: dict[str, Any] = {}

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers in the order of the requests."""
        groups: dict[tuple[int, float, tuple[str, ...]], list[Question]] = {}
        for position, request in enumerate(requests):
            _, doc_to_messages, settings, doc_id, task, split = request.args
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
            key = (
                int(settings.get("max_new_tokens", DEFAULT_NEW_TOKENS)),
                float(settings.get("temperature") or 0) if settings.get("do_sample") else 0.0,
                _stops(settings.get("until")),
            )
            groups.setdefault(key, []).append(question_of(messages, str(position), task))
        found: dict[str, GenerationResult] = {}
        errors: list[str] = []
        for (tokens, temperature, stops), questions in groups.items():
            answers = self.answerer.answer_all(questions, Generation(tokens, temperature))
            for question, answer in zip(questions, answers, strict=True):
                if answer.error is not None:
                    errors.append(f"{question.benchmark}: {answer.error}")
                text = answer.text
                for stop in stops:
                    text = text.split(stop)[0]
                found[question.id] = GenerationResult(text, TokenCounts(output_tokens=answer.tokens))
        if errors:
            warnings.warn(
                f"{len(errors)} of {len(requests)} questions have no answer and count as empty ones; the first is of "
                f"{errors[0]}",
                stacklevel=2,
            )
        return [found[str(position)] for position in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported: the benchmarks here generate.

        Raises:
            ValueError: Always.
        """
        raise ValueError("florence_vl answers generate_until tasks; choose the generation variant of this task")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported: every question here has one turn.

        Raises:
            ValueError: Always.
        """
        raise ValueError("florence_vl answers single-turn tasks; this task asks over several rounds")


def _stops(until: str | Sequence[str] | None) -> tuple[str, ...]:
    if not until:
        return ()
    # lmms-eval adds a blank line as a default stop, which truncates reasoning; only the stops of a task itself are
    # used.
    return tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop.strip())


def question_of(messages: ChatMessages, name: str, task: str) -> Question:
    """A single-turn conversation of lmms-eval as a question.

    Raises:
        ValueError: There is more than one turn, or audio or video.
    """
    if len(messages.messages) != 1:
        raise ValueError(f"{task}: florence_vl answers single-turn tasks, found {len(messages.messages)} messages")
    parts: list[Any] = []
    images = []
    for part in messages.messages[0].content:
        if part.type == "text":
            parts.append(part.text)
        elif part.type == "image":
            parts.append(IMAGE)
            images.append(ImagePicture(part.url.convert("RGB")))
        else:
            raise ValueError(f"{task}: florence_vl accepts only images, found {part.type}")
    return Question(name, task, tuple(parts), tuple(images))


def short_answer_results(doc: dict[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`process_results` of the mini suite's tasks: the same verdict as in this package's runner."""
    found = METRICS["short_answer"].judge(results[0], {"answer": doc["answer"], "choices": doc["choices"]})
    return {"accuracy": found.score}


def mini_visual(doc: dict[str, Any]) -> list[Any]:
    """`doc_to_visual` of the mini suite's tasks."""
    return [doc["image"].convert("RGB")]


def mini_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """`doc_to_text` of the mini suite's tasks."""
    return doc["prompt"]
