"""The released Florence-VL written from its description, apart from this package and from transformers' Florence-2.

`Upstream` computes on a flat dict of tensors under the authors' names: DaViT, projection, BART encoder asked three
prompts, MLP, and the splice of image tokens into the LLM's embeddings. `make_*` write checkpoint folders in the
released layouts with random weights. The LLM itself is transformers' Llama or Phi-3.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM, PreTrainedTokenizerFast

# 0 = <s>, 2 = </s>, 1 = <pad>; the rows that the authors wrote into their code
PROMPT_ROWS = [
    [0, 47066, 21700, 11, 4617, 99, 16, 2343, 11, 5, 2274, 4, 2, 1],
    [0, 2264, 16, 5, 2788, 11, 5, 2274, 116, 2, 1, 1, 1, 1],
    [0, 574, 22486, 5, 8720, 11, 5, 2274, 6, 19, 49, 24173, 4, 2],
]
IMAGE = -200
TOWER = "model.vision_tower.vision_tower."
DEPTHS = (1, 1, 2, 1)
WIDTHS = (32, 32, 64, 64)
HEADS = (1, 1, 2, 2)
WIDTH = 64
FLORENCE_VOCAB = 51289
WINDOW = 12
MICROSOFT_CONFIG: dict[str, Any] = {
    "model_type": "florence2",
    "architectures": ["Florence2ForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_florence2.Florence2Config"},
    "vocab_size": FLORENCE_VOCAB,
    "projection_dim": WIDTH,
    "is_encoder_decoder": True,
    "text_config": {
        "model_type": "florence2_language",
        "vocab_size": FLORENCE_VOCAB,
        "d_model": WIDTH,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_attention_heads": 1,
        "decoder_attention_heads": 1,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 80,
        "max_position_embeddings": 64,
        "activation_function": "gelu",
        "scale_embedding": False,
        "num_beams": 3,
        "no_repeat_ngram_size": 3,
        "early_stopping": True,
        "forced_bos_token_id": 0,
    },
    "vision_config": {
        "model_type": "davit",
        "drop_path_rate": 0.1,
        "patch_size": [7, 3, 3, 3],
        "patch_stride": [4, 2, 2, 2],
        "patch_padding": [3, 1, 1, 1],
        "patch_prenorm": [False, True, True, True],
        "enable_checkpoint": False,
        "dim_embed": list(WIDTHS),
        "num_heads": list(HEADS),
        "num_groups": list(HEADS),
        "depths": list(DEPTHS),
        "window_size": WINDOW,
        "projection_dim": WIDTH,
        "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 10},
        "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": 12},
        "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
    },
}


def florence2_state(seed: int = 0, copies: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A random Florence-2 under Microsoft's names, with 1 to 4 copies of the word embedding."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float | None = None) -> Tensor:
        scale = scale or 1 / math.sqrt(math.prod(shape[1:]) or 1)
        return (torch.randn(*shape, generator=generator) * scale).to(dtype)

    state: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        state[f"{name}.weight"], state[f"{name}.bias"] = random(rows, columns), random(rows, scale=0.1)

    def norm(name: str, width: int) -> None:
        state[f"{name}.weight"] = 1 + random(width, scale=0.1)
        state[f"{name}.bias"] = random(width, scale=0.1)

    before = 3
    for s, width in enumerate(WIDTHS):
        kernel = 7 if s == 0 else 3
        conv = f"vision_tower.convs.{s}"
        state[f"{conv}.proj.weight"] = random(width, before, kernel, kernel)
        state[f"{conv}.proj.bias"] = random(width, scale=0.1)
        norm(f"{conv}.norm", width if s == 0 else before)
        before = width
        for b in range(DEPTHS[s]):
            for kind, attention in (("spatial", "window_attn"), ("channel", "channel_attn")):
                block = f"vision_tower.blocks.{s}.{b}.{kind}_block"
                for conv_name in ("conv1", "conv2"):
                    state[f"{block}.{conv_name}.fn.dw.weight"] = random(width, 1, 3, 3)
                    state[f"{block}.{conv_name}.fn.dw.bias"] = random(width, scale=0.1)
                norm(f"{block}.{attention}.norm", width)
                linear(f"{block}.{attention}.fn.qkv", 3 * width, width)
                linear(f"{block}.{attention}.fn.proj", width, width)
                norm(f"{block}.ffn.norm", width)
                linear(f"{block}.ffn.fn.net.fc1", 4 * width, width)
                linear(f"{block}.ffn.fn.net.fc2", width, 4 * width)
    state["image_projection"] = random(WIDTHS[-1], WIDTH)
    norm("image_proj_norm", WIDTH)
    for axis in ("row", "column"):
        state[f"image_pos_embed.{axis}_embeddings.weight"] = random(12, WIDTHS[-1] // 2, scale=0.3)
    table = torch.zeros(10, WIDTHS[-1])
    angles = torch.arange(10.0)[:, None] * torch.exp(-math.log(10000.0) * torch.arange(0, WIDTHS[-1], 2) / WIDTHS[-1])
    table[:, 0::2], table[:, 1::2] = angles.sin(), angles.cos()
    state["visual_temporal_embed.pos_idx_to_embed"] = table.to(dtype)
    state["language_model.final_logits_bias"] = torch.zeros(1, FLORENCE_VOCAB, dtype=dtype)
    table = random(FLORENCE_VOCAB, WIDTH, scale=1.0)
    names = ("model.shared", "model.encoder.embed_tokens", "model.decoder.embed_tokens", "lm_head")
    for name in names[:copies]:
        state[f"language_model.{name}.weight"] = table.clone()
    text = MICROSOFT_CONFIG["text_config"]
    for side, attentions in (("encoder", ["self_attn"]), ("decoder", ["self_attn", "encoder_attn"])):
        root = f"language_model.model.{side}"
        state[f"{root}.embed_positions.weight"] = random(text["max_position_embeddings"] + 2, WIDTH, scale=0.3)
        norm(f"{root}.layernorm_embedding", WIDTH)
        for i in range(text[f"{side}_layers"]):
            for attention in attentions:
                for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
                    linear(f"{root}.layers.{i}.{attention}.{projection}", WIDTH, WIDTH)
                norm(f"{root}.layers.{i}.{attention}_layer_norm", WIDTH)
            linear(f"{root}.layers.{i}.fc1", text[f"{side}_ffn_dim"], WIDTH)
            linear(f"{root}.layers.{i}.fc2", WIDTH, text[f"{side}_ffn_dim"])
            norm(f"{root}.layers.{i}.final_layer_norm", WIDTH)
    return state


class Upstream:
    """The released computation on tensors under the authors' names.

    Args:
        state: The whole checkpoint, names as released.
        llm: transformers' LLM that already has the same weights.
    """

    def __init__(self, state: dict[str, Tensor], llm: Any = None) -> None:
        self.tower = {name[len(TOWER) :]: value for name, value in state.items() if name.startswith(TOWER)}
        self.state = state
        self.llm = llm

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.tower[f"{name}.weight"].T + self.tower[f"{name}.bias"]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.tower[f"{name}.weight"] + self.tower[f"{name}.bias"]

    def _depthwise(self, x: Tensor, size: tuple[int, int], name: str) -> Tensor:
        maps = x.transpose(1, 2).unflatten(2, size)
        weight, bias = self.tower[f"{name}.weight"], self.tower[f"{name}.bias"]
        return x + F.conv2d(maps, weight, bias, padding=1, groups=maps.shape[1]).flatten(2).transpose(1, 2)

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        inner = self._linear(self._norm(x, f"{name}.norm"), f"{name}.fn.net.fc1")
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        return x + self._linear(inner, f"{name}.fn.net.fc2")

    def _window_attention(self, x: Tensor, size: tuple[int, int], heads: int, name: str) -> Tensor:
        batch, _, width = x.shape
        rows, columns = size
        grid = self._norm(x, f"{name}.norm").view(batch, rows, columns, width)
        tall, wide = -(-rows // WINDOW) * WINDOW, -(-columns // WINDOW) * WINDOW
        padded = torch.zeros(batch, tall, wide, width)
        padded[:, :rows, :columns] = grid
        out = torch.zeros_like(padded)
        for top in range(0, tall, WINDOW):
            for left in range(0, wide, WINDOW):
                window = padded[:, top : top + WINDOW, left : left + WINDOW].reshape(batch, -1, width)
                q, k, v = self._linear(window, f"{name}.fn.qkv").chunk(3, -1)
                q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
                weights = (q * (width // heads) ** -0.5 @ k.transpose(-1, -2)).softmax(-1)
                mixed = self._linear((weights @ v).transpose(1, 2).flatten(2), f"{name}.fn.proj")
                out[:, top : top + WINDOW, left : left + WINDOW] = mixed.view(batch, WINDOW, WINDOW, width)
        return x + out[:, :rows, :columns].reshape(batch, -1, width)

    def _channel_attention(self, x: Tensor, groups: int, name: str) -> Tensor:
        tokens = x.shape[1]
        q, k, v = self._linear(self._norm(x, f"{name}.norm"), f"{name}.fn.qkv").chunk(3, -1)
        q, k, v = (t.unflatten(-1, (groups, -1)).permute(0, 2, 3, 1) for t in (q, k, v))  # batch, group, channel, token
        weights = (q * tokens**-0.5 @ k.transpose(-1, -2)).softmax(-1)
        return x + self._linear((weights @ v).permute(0, 3, 1, 2).flatten(2), f"{name}.fn.proj")

    def davit(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x, size = pixels.flatten(2).transpose(1, 2), tuple(pixels.shape[-2:])
        for s in range(len(WIDTHS)):
            conv = f"vision_tower.convs.{s}"
            if s:
                x = self._norm(x, f"{conv}.norm")
            maps = F.conv2d(
                x.transpose(1, 2).unflatten(2, size),
                self.tower[f"{conv}.proj.weight"],
                self.tower[f"{conv}.proj.bias"],
                stride=4 if s == 0 else 2,
                padding=3 if s == 0 else 1,
            )
            size, x = tuple(maps.shape[-2:]), maps.flatten(2).transpose(1, 2)
            if s == 0:
                x = self._norm(x, f"{conv}.norm")
            for b in range(DEPTHS[s]):
                block = f"vision_tower.blocks.{s}.{b}.spatial_block"
                x = self._depthwise(x, size, f"{block}.conv1.fn.dw")
                x = self._window_attention(x, size, HEADS[s], f"{block}.window_attn")
                x = self._depthwise(x, size, f"{block}.conv2.fn.dw")
                x = self._mlp(x, f"{block}.ffn")
                block = f"vision_tower.blocks.{s}.{b}.channel_block"
                x = self._depthwise(x, size, f"{block}.conv1.fn.dw")
                x = self._channel_attention(x, HEADS[s], f"{block}.channel_attn")
                x = self._depthwise(x, size, f"{block}.conv2.fn.dw")
                x = self._mlp(x, f"{block}.ffn")
        return x, size

    def image_tokens(self, pixels: Tensor) -> Tensor:
        """V: [mean token ; grid tokens], projected and normalized, (B, 1 + N, D)."""
        x, (rows, columns) = self.davit(pixels)
        column = self.tower["image_pos_embed.column_embeddings.weight"][:columns]
        row = self.tower["image_pos_embed.row_embeddings.weight"][:rows]
        place = torch.cat([column.repeat(rows, 1), row.repeat_interleave(columns, 0)], -1)
        x = x + place + self.tower["visual_temporal_embed.pos_idx_to_embed"][0]
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        return self._norm(x @ self.tower["image_projection"], "image_proj_norm")

    def encode(self, image: Tensor, ids: list[int], attend_padding: bool) -> Tensor:
        """BART's encoder over [V ; prompt]; outputs at all positions."""
        root = "language_model.model.encoder"
        batch = image.shape[0]
        words = self.tower["language_model.model.shared.weight"][torch.tensor(ids)].expand(batch, -1, -1)
        x = torch.cat([image, words], 1)
        length = x.shape[1]
        x = self._norm(x + self.tower[f"{root}.embed_positions.weight"][2 : 2 + length], f"{root}.layernorm_embedding")
        hidden = torch.zeros(length, dtype=torch.bool)
        if not attend_padding:
            hidden[image.shape[1] :] = torch.tensor(ids) == 1
        text = MICROSOFT_CONFIG["text_config"]
        heads = text["encoder_attention_heads"]
        for i in range(text["encoder_layers"]):
            layer = f"{root}.layers.{i}"
            q, k, v = (
                self._linear(x, f"{layer}.self_attn.{p}_proj").unflatten(-1, (heads, -1)).transpose(1, 2) for p in "qkv"
            )
            scores = q * (WIDTH // heads) ** -0.5 @ k.transpose(-1, -2)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            mixed = self._linear((weights @ v).transpose(1, 2).flatten(2), f"{layer}.self_attn.out_proj")
            x = self._norm(x + mixed, f"{layer}.self_attn_layer_norm")
            inner = self._linear(x, f"{layer}.fc1")
            inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
            x = self._norm(x + self._linear(inner, f"{layer}.fc2"), f"{layer}.final_layer_norm")
        return x

    def features(self, pixels: Tensor, mean_token: str, attend_padding: bool) -> list[Tensor]:
        """V and the three prompted features. Readings of "576": drop after, before the encoder, or keep 577."""
        image = self.image_tokens(pixels)
        if mean_token == "grid_before_encoder":
            image = image[:, 1:]
        found = [image] + [self.encode(image, ids, attend_padding)[:, : image.shape[1]] for ids in PROMPT_ROWS]
        return [f[:, 1:] for f in found] if mean_token == "grid" else found

    def projected(self, pixels: Tensor, mean_token: str, attend_padding: bool) -> Tensor:
        """The tokens that the LLM sees, (B, N, H)."""
        x = torch.cat(self.features(pixels, mean_token, attend_padding), -1)
        depth = 0
        while f"model.mm_projector.encoder_mlp.{depth}{'.1' if depth else ''}.weight" in self.state:
            name = f"model.mm_projector.encoder_mlp.{depth}{'.1' if depth else ''}"
            if depth:
                x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
            x = x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]
            depth += 1
        return x

    def logits(self, ids: list[int], pixels: Tensor, mean_token: str, attend_padding: bool) -> Tensor:
        """Logits of one sample whose ids hold one `IMAGE`."""
        image = self.projected(pixels, mean_token, attend_padding)[0]
        at = ids.index(IMAGE)
        table = self.llm.get_input_embeddings().weight
        embeds = torch.cat([table[torch.tensor(ids[:at])], image, table[torch.tensor(ids[at + 1 :])]])
        return self.llm(inputs_embeds=embeds[None]).logits[0]


def tokenizer_image_token(prompt: str, tokenizer: Any) -> list[int]:
    """The released way to ids: pieces apart, and the first token of later pieces dropped after a leading BOS."""
    chunks = [tokenizer(chunk).input_ids for chunk in prompt.split("<image>")]
    drop = 1 if chunks and chunks[0] and chunks[0][0] == tokenizer.bos_token_id else 0
    ids = list(chunks[0])
    for chunk in chunks[1:]:
        ids += [IMAGE, *chunk[drop:]]
    return ids


def llama3_prompt(question: str) -> str:
    """The released `llama3` conversation with one question about one image."""
    system = (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    head = "<|start_header_id|>{}<|end_header_id|>\n\n"
    return (
        f"<|begin_of_text|>{head.format('system')}{system}<|eot_id|>"
        f"{head.format('user')}<image>\n{question}<|eot_id|>{head.format('assistant')}"
    )


def phi3_prompt(question: str) -> str:
    """The released `phi3` conversation with one question about one image."""
    return f"<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n<image>\n{question}<|end|>\n<|assistant|>\n"


def make_tokenizer(kind: str, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Small tokenizers with the special tokens and the whitespace habits of the real ones."""
    if kind == "llama3":
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>"]
        special += ["<|end_header_id|>", "<|eot_id|>", "<pad>"]
        tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
        bos, eos, pad = "<|begin_of_text|>", "<|eot_id|>", "<pad>"
    else:  # SentencePiece-like: a leading space on every piece, byte fallback; controls that swallow what follows
        letters = [chr(c) for c in range(33, 127)] + ["▁"]
        vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": i + 3 for i in range(256)}}
        vocab |= {c: len(vocab) + i for i, c in enumerate(letters)}
        tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        special = ["<s>", "</s>", "<|endoftext|>"]
        if kind == "phi3":
            special += ["<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>"]
        tokenizer.add_special_tokens(
            [AddedToken(t, special=True, normalized=False, rstrip=t.startswith("<|")) for t in special]
        )
        bos, eos, pad = "<s>", "</s>" if kind == "vicuna" else "<|endoftext|>", "<unk>" if kind == "vicuna" else None
        pad = pad or eos
    if adds_bos:
        index = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, index)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def make_released(
    folder: Path,
    llm: str = "llama",
    adds_bos: bool = False,
    copies: int = 4,
    shards: int = 3,
    pickled: bool = False,
    with_tower: bool = True,
    tokenizer_kind: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[dict[str, Tensor], Upstream]:
    """Write a released Florence-VL with random weights; returns its tensors and its computation."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(tokenizer_kind or {"llama": "llama3", "phi3": "phi3"}[llm], adds_bos)
    hidden = 48
    size = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2 if llm == "llama" else 4,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    if llm == "llama":
        rope: dict[str, Any] = {
            "rope_theta": 500000.0,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1024,
                "rope_type": "llama3",
            },
        }
        config_class, model_class = LlamaConfig, LlamaForCausalLM
    else:
        factors = {"long_factor": [1.0 + 0.1 * i for i in range(6)], "short_factor": [1.0 + 0.01 * i for i in range(6)]}
        rope = {"rope_theta": 10000.0, "rope_scaling": {"type": "longrope", **factors}}
        rope["original_max_position_embeddings"] = 2048
        config_class, model_class = Phi3Config, Phi3ForCausalLM
    torch.manual_seed(seed + 1)
    model = model_class(config_class(**size, **copy.deepcopy(rope))).to(dtype).eval()
    with torch.no_grad():  # so that logits differ visibly
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    state = {name: value.detach().clone() for name, value in model.state_dict().items()}
    generator = torch.Generator().manual_seed(seed + 2)
    widths = [4 * WIDTH, hidden, hidden, hidden]
    for i in range(3):
        name = f"model.mm_projector.encoder_mlp.{i}{'.1' if i else ''}"
        weight = torch.randn(widths[i + 1], widths[i], generator=generator) / math.sqrt(widths[i])
        state[f"{name}.weight"] = weight.to(dtype)
        state[f"{name}.bias"] = (torch.randn(widths[i + 1], generator=generator) * 0.1).to(dtype)
    tower = florence2_state(seed, copies, dtype)
    state.update({TOWER + name: value for name, value in tower.items()})
    written = state if with_tower else {n: v for n, v in state.items() if not n.startswith(TOWER)}
    write_weights(folder, written, shards, pickled)
    config = {
        **size,
        **rope,
        "architectures": ["LlavaLlamaForCausalLM" if llm == "llama" else "LlavaPhiForCausalLM"],
        "model_type": "llava_llama" if llm == "llama" else "llava_phi",
        "freeze_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 1024,
        "mm_patch_merge_type": "flat",
        "mm_projector_lr": None,
        "mm_projector_type": "mlp3x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "jiuhai/florence-llama-vision-tower",
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.43.1",
        "tune_entire_model": False,
        "tune_mm_mlp_adapter": False,
        "use_mm_proj": True,
        "vision_tower_lr": None,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": [tokenizer.eos_token_id], "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps({**generation, "do_sample": True, "top_p": 0.9}))
    tokenizer.save_pretrained(folder)
    return state, Upstream(state, model)


def make_microsoft(
    folder: Path, pickled: bool = True, copies: int = 2, seed: int = 0, **config: Any
) -> dict[str, Tensor]:
    """Write a Florence-2 in Microsoft's layout; the published files have two copies of the embedding."""
    folder.mkdir(parents=True, exist_ok=True)
    state = florence2_state(seed, copies)
    write_weights(folder, state, 1, pickled)
    (folder / "config.json").write_text(json.dumps({**MICROSOFT_CONFIG, **config}))
    return state


def write_weights(folder: Path, state: dict[str, Tensor], shards: int, pickled: bool) -> None:
    """Spread tensors over shards with their index, as safetensors or pickles."""
    suffix = "bin" if pickled else "safetensors"
    stem = "pytorch_model" if pickled else "model"

    def save(part: dict[str, Tensor], path: Path) -> None:
        if pickled:
            torch.save(part, path)
        else:
            save_file(part, path, metadata={"format": "pt"})

    if shards == 1:
        save(state, folder / f"{stem}.{suffix}")
        return
    names = list(state)
    step = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}.{suffix}"
        part = {name: state[name] for name in names[i * step : (i + 1) * step]}
        save(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    total = sum(t.nbytes for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))
