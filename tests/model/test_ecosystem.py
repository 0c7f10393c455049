"""Unmodified tools of transformers, TRL, PEFT and torchao on a Florence-VL."""

import pytest
import torch
from PIL import Image

from florence_vl import FlorenceVLForConditionalGeneration
from florence_vl.data.collate import FlorenceVLCollator
from florence_vl.data.encode import RecordEncoder
from florence_vl.model.tiny import TINY_IMAGE_TOKEN_ID as IMG
from florence_vl.model.tiny import tiny_model

IDS = torch.tensor([[1, IMG, IMG, IMG, IMG, 20, 21, 22]])


def pixels(count=1):
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, pixel_values=pixels()).logits


def rows(count=8):
    colours = {"red": (200, 0, 0), "blue": (0, 0, 200)}
    for index in range(count):
        name = list(colours)[index % 2]
        image = Image.new("RGB", (64, 64), colours[name])
        question = [{"type": "image"}, {"type": "text", "text": "Which colour?"}]
        yield {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": [{"type": "text", "text": name}]},
            ],
            "images": [image],
        }


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = list(rows())

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


TRAINING = {
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "remove_unused_columns": False,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    model, processor = tiny_model()
    model.set_trainable(tower=False, projector=True, llm=True)
    before = model.model.multi_modal_projector.layers[0].weight.clone()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(tmp_path), gradient_checkpointing=True, **TRAINING),
        train_dataset=Rows(),
        eval_dataset=Rows(),
        data_collator=FlorenceVLCollator(RecordEncoder(processor)),
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]
    assert not torch.equal(model.model.multi_modal_projector.layers[0].weight, before)
    assert trainer.evaluate()["eval_loss"] < 0.7 * losses(trainer)[0]
    trainer.save_model(str(tmp_path / "out"))
    assert torch.equal(
        logits(FlorenceVLForConditionalGeneration.from_pretrained(tmp_path / "out")), logits(model.eval())
    )


def test_trl_sft_trainer(tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    model, processor = tiny_model()
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, bf16=False, **TRAINING
        ),
        train_dataset=datasets.Dataset.from_list(list(rows())),
        data_collator=FlorenceVLCollator(RecordEncoder(processor)),
        processing_class=processor,
    )
    trainer.train()
    assert losses(trainer)[-1] < 0.7 * losses(trainer)[0]


def test_lora_trains_saves_loads_and_merges(tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = tiny_model()
    config = peft.LoraConfig(
        r=4,
        target_modules=r"model\.language_model\..*\.(q|v)_proj",
        modules_to_save=["multi_modal_projector"],
        init_lora_weights=False,
    )
    adapted = peft.get_peft_model(model, config)
    adapted.train()
    assert not adapted.base_model.model.model.vision_tower.training, "the tower is frozen, so it stays in eval"
    adapted(input_ids=IDS, pixel_values=pixels(), labels=IDS).loss.backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained
    assert all("lora_" in name or "multi_modal_projector" in name for name in trained)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.01)
    adapted.eval()
    expected = logits(adapted)
    assert (expected - logits(tiny_model()[0])).abs().max() > 1e-3
    adapted.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model()[0], tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is FlorenceVLForConditionalGeneration
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=0)


def test_int8_weight_only(tmp_path):
    torchao = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    model, _ = tiny_model()
    model.save_pretrained(tmp_path)
    keep = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    config = TorchAoConfig(torchao.Int8WeightOnlyConfig(version=2), modules_to_not_convert=keep)
    quantised = FlorenceVLForConditionalGeneration.from_pretrained(tmp_path, quantization_config=config)
    layer = quantised.model.language_model.layers[0]
    assert "Int8" in type(layer.mlp.up_proj.weight.data).__name__ or "Quantized" in repr(layer.mlp.up_proj.weight)
    assert type(quantised.lm_head.weight.data) is torch.Tensor
    assert type(quantised.model.vision_tower.davit.blocks[0][0].channel_block.ffn.fc1.weight.data) is torch.Tensor
    difference = (logits(quantised) - logits(model)).abs().max()
    assert 0 < difference < 0.05
    out = quantised.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), pixel_values=pixels(), max_new_tokens=3, min_new_tokens=3
    )
    assert out.shape == (1, 11)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_whole_compiles(backend):
    model, _ = tiny_model()
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(logits(compiled), expected, atol=1e-5, rtol=1e-4)
