"""A tiny random Florence-2, which writes boxes as text, and a tiny random SAM 3; see tests/tiny_models.py."""

import torch
from tiny_models import spread
from transformers import (
    BartConfig,
    BartTokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTokenizer,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    Florence2VisionConfig,
    Sam3Config,
    Sam3DETRDecoderConfig,
    Sam3DETREncoderConfig,
    Sam3GeometryEncoderConfig,
    Sam3ImageProcessor,
    Sam3MaskDecoderConfig,
    Sam3Model,
    Sam3Processor,
    Sam3VisionConfig,
    Sam3ViTConfig,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def florence2(folder, seed=0):
    torch.manual_seed(seed)
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "Ġ", *LETTERS, *("Ġ" + c for c in LETTERS), "L", "."]
    tokenizer = BartTokenizer(
        vocab={p: i for i, p in enumerate(pieces)}, merges=[], extra_special_tokens={"image_token": "<image>"}
    )
    tokenizer.add_tokens([*(f"<loc_{i}>" for i in range(1000)), "<poly>", "</poly>"], special_tokens=True)
    vision = Florence2VisionConfig(
        depths=[1, 1],
        patch_size=[7, 3],
        patch_stride=[8, 4],
        patch_padding=[3, 1],
        patch_prenorm=[False, True],
        embed_dim=[8, 16],
        num_heads=[1, 2],
        num_groups=[1, 2],
        window_size=4,
        projection_dim=32,
    )
    text = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=96,
    )
    image_token = tokenizer.image_token_id
    model = Florence2ForConditionalGeneration(Florence2Config(vision_config=vision, text_config=text, image_token_id=image_token))
    spread(model)
    model.generation_config.no_repeat_ngram_size = 3  # as the published ones; random weights write one token otherwise
    model.save_pretrained(folder)
    images = CLIPImageProcessor(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5  # 2 x 2 patches and their mean
    rules = {name: {} for name in ("phrase_grounding", "pure_text", "description_with_bboxes_or_polygons")}
    Florence2Processor(images, tokenizer, post_processor_config=rules).save_pretrained(folder)
    return folder


def sam3(folder, seed=1):
    torch.manual_seed(seed)
    pieces = ["!", "<|startoftext|>", *LETTERS, *(c + "</w>" for c in LETTERS), "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], pad_token="!", model_max_length=32)
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = Sam3ViTConfig(
        **small, num_hidden_layers=2, image_size=56, pretrain_image_size=28, patch_size=14, window_size=2, global_attn_indexes=[1]
    )
    sizes = [[16, 16], [8, 8], [4, 4]]
    text = CLIPTextConfig(
        **small,
        vocab_size=len(pieces),
        num_hidden_layers=1,
        max_position_embeddings=32,
        projection_dim=32,
        eos_token_id=len(pieces) - 1,
        bos_token_id=1,
        pad_token_id=0,
    )
    model = Sam3Model(
        Sam3Config(
            vision_config=Sam3VisionConfig(backbone_config=backbone, fpn_hidden_size=32, backbone_feature_sizes=sizes),
            text_config=text,
            geometry_encoder_config=Sam3GeometryEncoderConfig(**small, num_layers=1),
            detr_encoder_config=Sam3DETREncoderConfig(**small, num_layers=1),
            detr_decoder_config=Sam3DETRDecoderConfig(**small, num_layers=2, num_queries=12),
            mask_decoder_config=Sam3MaskDecoderConfig(hidden_size=32, num_attention_heads=2),
        )
    )
    spread(model)
    with torch.no_grad():
        model.detr_decoder.query_embed.weight.normal_(0, 3)  # with this seed, scores that differ
    model.save_pretrained(folder)
    images = Sam3ImageProcessor(size={"height": 56, "width": 56}, mask_size={"height": 16, "width": 16})
    Sam3Processor(images, tokenizer).save_pretrained(folder)
    return folder


MAKERS = {"florence2": florence2, "sam3": sam3}
