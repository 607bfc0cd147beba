"""Tiny random vision-language models of every family, saved to folders like real ones."""

import json

import torch
from safetensors.torch import save_file
from tiny_models import spread
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Siglip2Config,
    Siglip2ImageProcessor,
    Siglip2Model,
    Siglip2Processor,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def clip(folder, seed=0):
    torch.manual_seed(seed)
    pieces = ["!", "<|startoftext|>", *LETTERS, *(c + "</w>" for c in LETTERS), "<|endoftext|>"]  # the end has the highest id
    tokenizer = CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], pad_token="!", model_max_length=77)
    ids = {"eos_token_id": len(pieces) - 1, "bos_token_id": 1, "pad_token_id": 0}
    text = {**SMALL, "vocab_size": len(pieces), "max_position_embeddings": 77, **ids}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**SMALL, "image_size": 64, "patch_size": 16}, projection_dim=24)
    )
    spread(model)
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def _characters():
    """A tokenizer with one token per character, as SigLIP's are loaded from a tokenizer.json."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {p: i for i, p in enumerate(["<pad>", "<eos>", "<unk>", " ", *LETTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **special), len(vocabulary)


def siglip(folder, seed=0):
    torch.manual_seed(seed)
    tokenizer, count = _characters()
    text = {**SMALL, "vocab_size": count, "max_position_embeddings": 64, "projection_size": 32}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**SMALL, "image_size": 64, "patch_size": 16}))
    _siglip_logits(model)
    model.save_pretrained(folder)
    SiglipProcessor(SiglipImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return folder


def siglip2(folder, seed=0):
    torch.manual_seed(seed)
    tokenizer, count = _characters()
    text = {**SMALL, "vocab_size": count, "max_position_embeddings": 64, "projection_size": 32}
    model = Siglip2Model(Siglip2Config(text_config=text, vision_config={**SMALL, "num_patches": 16, "patch_size": 16}))
    _siglip_logits(model)
    model.save_pretrained(folder)
    Siglip2Processor(Siglip2ImageProcessor(max_num_patches=16, patch_size=16), tokenizer).save_pretrained(folder)
    return folder


def _siglip_logits(model):
    spread(model)
    with torch.no_grad():
        model.logit_scale.fill_(2.3)
        model.logit_bias.fill_(-1.5)


VIT = {"image_size": 64, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
TRUNK = {"image_size": 64, "timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear"}
RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}  # open_clip's own


def open_clip(folder, seed=0, bias=False, vision=VIT):
    from open_clip import CLIP

    torch.manual_seed(seed)
    towers = {
        "embed_dim": 24,
        "vision_cfg": vision,
        "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    }
    if bias:
        towers |= {"init_logit_bias": -1.5}
    model = CLIP(**towers)
    spread(model)
    folder.mkdir(parents=True, exist_ok=True)
    preprocessing = {"mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25], "interpolation": "bicubic", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": towers, "preprocess_cfg": preprocessing}))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


MAKERS = {
    "clip": clip,
    "siglip": siglip,
    "siglip2": siglip2,
    "open_clip": open_clip,
    "open_clip_bias": lambda folder: open_clip(folder, bias=True),
    "open_clip_timm": lambda folder: open_clip(folder, vision=TRUNK),
}
