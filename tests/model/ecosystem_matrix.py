"""Compatibility checks: unmodified third-party libraries on a tiny Florence-VL.

python tests/model/ecosystem_matrix.py                           run all checks in this process, print JSON lines
python tests/model/ecosystem_matrix.py --order transformers      ... with transformers imported first
python tests/model/ecosystem_matrix.py --write docs/ecosystem.md run both orders in fresh processes, write the page
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ORDERS = ("florence_vl", "transformers")
CHECKS: dict[tuple[str, str], Callable[[Path], str | None]] = {}
LOSS_AT_START = math.log(2)


def check(package: str, name: str) -> Callable:
    def keep(function: Callable[[Path], str | None]) -> Callable:
        CHECKS[package, name] = function
        return function

    return keep


# ------------------------------------------------------------ what the checks share


def load(folder: Path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    return AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)


def rows(count: int = 4) -> list[dict]:
    from PIL import Image

    names = ("red", "blue")
    question = [{"type": "image"}, {"type": "text", "text": "Which color?"}]
    return [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": [{"type": "text", "text": names[index % 2]}]},
            ],
            "images": [Image.new("RGB", (64, 64), names[index % 2])],
        }
        for index in range(count)
    ]


def inputs(processor):
    picture = rows(1)[0]["images"][0]
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Which color?"}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def arguments(folder: Path) -> dict:
    return {
        "output_dir": str(folder / "out"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }


def generates(folder: Path, **options) -> None:
    model, processor = load(folder)
    batch = inputs(processor)
    tokens = model.generate(**batch, max_new_tokens=4, **options)
    assert tokens.shape[1] > batch["input_ids"].shape[1]


# ------------------------------------------------------------ transformers


@check("transformers", "AutoConfig, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor")
def _(folder):
    import transformers

    for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoProcessor"):
        assert getattr(transformers, name).from_pretrained(folder) is not None
    assert transformers.FlorenceVLForConditionalGeneration.__module__ == "florence_vl.model.modeling"


@check("transformers", 'pipeline("image-text-to-text")')
def _(folder):
    from transformers import pipeline

    chat = [{"role": "user", "content": [{"type": "image", "image": rows(1)[0]["images"][0]}]}]
    chat[0]["content"].append({"type": "text", "text": "Which color?"})
    pipe = pipeline("image-text-to-text", model=str(folder), device="cpu")
    assert isinstance(pipe(text=chat, max_new_tokens=3, return_full_text=False)[0]["generated_text"], str)


@check("transformers", 'pipeline("any-to-any") recognizes the model (running it needs torchvision)')
def _(folder):
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    assert type(load(folder)[0]).__name__ in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.values()


@check("transformers", "`transformers serve` recognizes the modality")
def _(folder):
    from transformers.cli.serving.model_manager import ModelManager

    assert ModelManager.get_model_modality(load(folder)[0]).name == "MULTIMODAL"


@check("transformers", "generate: greedy, beams, sampling")
def _(folder):
    generates(folder, do_sample=False)
    generates(folder, num_beams=3)
    generates(folder, do_sample=True, num_return_sequences=2)


@check("transformers", "generate: prompt lookup")
def _(folder):
    generates(folder, do_sample=False, prompt_lookup_num_tokens=3)


@check("transformers", "generate: static cache")
def _(folder):
    generates(folder, do_sample=False, cache_implementation="static", disable_compile=True)


@check("transformers", "saving and loading in bfloat16 and float16")
def _(folder):
    import torch
    from transformers import AutoModelForImageTextToText

    for dtype in (torch.bfloat16, torch.float16):
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
        model.save_pretrained(folder / "half")
        again = AutoModelForImageTextToText.from_pretrained(folder / "half", dtype="auto")
        assert {parameter.dtype for parameter in again.parameters()} == {dtype}
        again.generate(**inputs(load(folder)[1]), max_new_tokens=2)


def hf_trainer(folder, model, processor, cls=None, **options):
    from transformers import Trainer, TrainingArguments

    from florence_vl.data.collate import FlorenceVLCollator
    from florence_vl.data.encode import RecordEncoder

    (cls or Trainer)(
        model=model,
        args=TrainingArguments(remove_unused_columns=False, **options, **arguments(folder)),
        train_dataset=rows(),
        data_collator=FlorenceVLCollator(RecordEncoder(processor)),
    ).train()


@check("transformers", "Trainer")
def _(folder):
    hf_trainer(folder, *load(folder))


@check("transformers", "Trainer with a compute_loss on the logits")
def _(folder):
    import torch
    from transformers import Trainer

    class OwnLoss(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **options):
            out = model(**inputs)
            logits, labels = out.logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits, labels)
            return (loss, out) if return_outputs else loss

    hf_trainer(folder, *load(folder), cls=OwnLoss)


def adapters_that_moved(folder: Path, reentrant: bool) -> tuple[int, int]:
    import peft
    import torch

    model, processor = load(folder)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear"))
    before = {
        name: value.detach().clone()
        for name, value in adapted.named_parameters()
        if "lora_B" in name and "vision_tower" in name
    }
    kwargs = {"use_reentrant": reentrant}
    hf_trainer(folder, adapted, processor, gradient_checkpointing=True, gradient_checkpointing_kwargs=kwargs)
    moved = sum(not torch.equal(value, before[n]) for n, value in adapted.named_parameters() if n in before)
    return moved, len(before)


for _reentrant in (False, True):

    @check("peft", f"LoRA on all layers including the tower, gradient checkpointing, use_reentrant={_reentrant}")
    def _(folder, reentrant=_reentrant):
        moved, adapters = adapters_that_moved(folder, reentrant)
        assert moved == adapters > 0, f"{moved} of {adapters} adapters of the tower learned"


@check("peft", "LoRA, DoRA: save, load, merge")
def _(folder):
    import peft
    import torch

    batch = inputs(load(folder)[1])
    for options in ({}, {"use_dora": True}):
        adapted = peft.get_peft_model(load(folder)[0], peft.LoraConfig(r=2, target_modules="all-linear", **options))
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.1)
        adapted.eval().save_pretrained(folder / "adapter")
        again = peft.PeftModel.from_pretrained(load(folder)[0], folder / "adapter").eval()
        with torch.no_grad():
            expected = adapted(**batch).logits
            torch.testing.assert_close(again(**batch).logits, expected)
            torch.testing.assert_close(again.merge_and_unload()(**batch).logits, expected, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------ TRL


def dataset(records: list[dict]):
    import datasets

    return datasets.Dataset.from_list(records)


def preferences() -> list[dict]:
    other = [{"role": "assistant", "content": [{"type": "text", "text": "green"}]}]
    return [
        {"prompt": r["messages"][:1], "chosen": r["messages"][1:], "rejected": other, "images": r["images"]}
        for r in rows()
    ]


@check("trl", "SFTTrainer, from objects and from a path")
def _(folder):
    import trl

    model, processor = load(folder)
    for source in ({"model": model, "processing_class": processor}, {"model": str(folder)}):
        args = trl.SFTConfig(max_length=None, **arguments(folder))
        trl.SFTTrainer(args=args, train_dataset=dataset(rows()), **source).train()


def dpo(folder: Path, **options) -> None:
    import trl

    model, processor = load(folder)
    model.train()
    args = trl.DPOConfig(max_length=None, **arguments(folder))
    trainer = trl.DPOTrainer(
        model=model, args=args, train_dataset=dataset(preferences()), processing_class=processor, **options
    )
    trainer.train()
    first = trainer.state.log_history[0]["loss"]
    assert abs(first - LOSS_AT_START) < 1e-5, f"the first loss is {first}, not ln 2"


@check("trl", "DPOTrainer, first loss is ln 2")
def _(folder):
    dpo(folder)


@check("trl", "DPOTrainer with a reference model")
def _(folder):
    dpo(folder, ref_model=load(folder)[0])


@check("trl", "DPOTrainer with LoRA")
def _(folder):
    import peft

    dpo(folder, peft_config=peft.LoraConfig(r=2, target_modules="all-linear"))


@check("trl", "KTOTrainer")
def _(folder):
    import trl

    model, processor = load(folder)
    records = [
        {"prompt": r["prompt"], "completion": r["chosen" if good else "rejected"], "label": good, "images": r["images"]}
        for r in preferences()
        for good in (True, False)
    ]
    args = trl.KTOConfig(max_length=None, **arguments(folder))
    trl.KTOTrainer(model=model, args=args, train_dataset=dataset(records), processing_class=processor).train()


def online(folder: Path, trainer: str, config: str, **options) -> None:
    import trl

    model, processor = load(folder)
    values = {**arguments(folder), "per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 4}
    getattr(trl, trainer)(
        model=model,
        args=getattr(trl, config)(**values, **options),
        reward_funcs=lambda completions, **_: [float(len(str(text))) for text in completions],
        train_dataset=dataset([{"prompt": r["messages"][:1], "images": r["images"]} for r in rows()]),
        processing_class=processor,
    ).train()


@check("trl", "GRPOTrainer, without and with a reference model")
def _(folder):
    online(folder, "GRPOTrainer", "GRPOConfig", beta=0.0)
    online(folder, "GRPOTrainer", "GRPOConfig", beta=0.1)


@check("trl", "RLOOTrainer")
def _(folder):
    online(folder, "RLOOTrainer", "RLOOConfig")


# ------------------------------------------------------------ others


@check("torchao", "int8 weights of the LLM")
def _(folder):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model, processor = load(folder)
    quantize_(model.model.language_model, Int8WeightOnlyConfig())
    model.generate(**inputs(processor), max_new_tokens=2)


@check("datasets", "map reuses its cache after the processor was used")
def _(folder):
    from datasets.fingerprint import Hasher

    processor = load(folder)[1]
    before = Hasher.hash(processor)
    inputs(processor)
    assert Hasher.hash(processor) == before


@check("accelerate", 'device_map="auto"')
def _(folder):
    from transformers import AutoModelForImageTextToText

    model = AutoModelForImageTextToText.from_pretrained(folder, device_map="auto")
    classes = {type(module).__name__ for module in model.modules()}
    assert set(type(model)._no_split_modules) <= classes, "blocks that device maps keep together"
    batch = inputs(load(folder)[1])
    model.generate(**batch.to(model.device), max_new_tokens=2)


@check("torch", "torch.compile of a forward pass without graph breaks")
def _(folder):
    import torch

    model, processor = load(folder)
    batch = inputs(processor)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------ running them


def run(order: str) -> list[dict]:
    """All checks in this process, after the imports of `order`."""
    __import__(order)
    __import__("florence_vl")
    from florence_vl.model.tiny import tiny_model

    results = []
    with tempfile.TemporaryDirectory() as name:
        model, processor = tiny_model()
        for number, ((package, what), function) in enumerate(CHECKS.items()):
            folder = Path(name) / str(number)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    function(folder)
                error = None
            except Exception as failure:
                error = f"{type(failure).__name__}: {' '.join(str(failure).split())[:200]}"
            results.append({"package": package, "check": what, "order": order, "error": error})
    return results


def run_fresh(order: str) -> list[dict]:
    """All checks in a fresh process."""
    command = [sys.executable, __file__, "--order", order]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"package"')]


def page(results: list[dict]) -> str:
    """docs/ecosystem.md."""
    lines = [
        "# Compatibility with other libraries",
        "",
        "Florence-VL works with the unmodified libraries in this table. Each check runs on a tiny model in two fresh",
        "processes, one for each import order. A test runs the checks. This command writes the page:",
        "",
        "```",
        "python tests/model/ecosystem_matrix.py --write docs/ecosystem.md",
        "```",
        "",
        "| package | version | check | result |",
        "|---|---|---|---|",
    ]
    for package, what in CHECKS:
        found = [r for r in results if (r["package"], r["check"]) == (package, what)]
        errors = [f"{r['order']} first: {r['error']}" for r in found if r["error"]]
        try:
            number = version(package).partition("+")[0]
        except PackageNotFoundError:
            number = "-"
        result = "works" if not errors else "; ".join(errors)
        lines.append("| " + " | ".join(text.replace("|", "/") for text in (package, number, what, result)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--order", choices=ORDERS, default=ORDERS[0])
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if options.write is None:
        for result in run(options.order):
            print(json.dumps(result), flush=True)
        return
    options.write.write_text(page([r for order in ORDERS for r in run_fresh(order)]), encoding="utf-8")


if __name__ == "__main__":
    main()
