"""Tiny random detectors and segmenters, built from a config and saved to folders like real ones."""

import torch
from transformers import (
    BertConfig,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTokenizer,
    DeformableDetrImageProcessor,
    Deimv2Config,
    Deimv2ForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessor,
    DFineConfig,
    DFineForObjectDetection,
    EdgeTamConfig,
    EdgeTamMaskDecoderConfig,
    EdgeTamModel,
    EdgeTamPromptEncoderConfig,
    EdgeTamVisionConfig,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoImageProcessor,
    GroundingDinoProcessor,
    LwDetrConfig,
    LwDetrForObjectDetection,
    LwDetrViTConfig,
    MMGroundingDinoConfig,
    MMGroundingDinoForObjectDetection,
    OmDetTurboConfig,
    OmDetTurboForObjectDetection,
    OmDetTurboProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessor,
    Owlv2Processor,
    ResNetConfig,
    RfDetrConfig,
    RfDetrDinov2Config,
    RfDetrForObjectDetection,
    RfDetrImageProcessor,
    RTDetrImageProcessor,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
    Sam2Config,
    Sam2HieraDetConfig,
    Sam2ImageProcessor,
    Sam2MaskDecoderConfig,
    Sam2Model,
    Sam2Processor,
    Sam2PromptEncoderConfig,
    Sam2VisionConfig,
    SamConfig,
    SamImageProcessor,
    SamMaskDecoderConfig,
    SamModel,
    SamProcessor,
    SamPromptEncoderConfig,
    SamVisionConfig,
    SwinConfig,
    TimmWrapperConfig,
)

WORDS = ["mushroom", "animal", "bird", "red", "square", "a", "photo", "of", ".", "insect", "reptile"]


def owlv2(folder, seed=0):
    torch.manual_seed(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["!", "<|startoftext|>", *letters, *(c + "</w>" for c in letters), "<|endoftext|>"]  # the end has the highest id
    tokenizer = CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], pad_token="!", model_max_length=16)
    text = {
        "vocab_size": len(pieces),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "eos_token_id": len(pieces) - 1,
        "bos_token_id": 1,
        "pad_token_id": 0,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 64,
        "patch_size": 16,
    }
    model = Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=32))
    spread(model)
    model.save_pretrained(folder)
    Owlv2Processor(Owlv2ImageProcessor(size={"height": 64, "width": 64}), tokenizer).save_pretrained(folder)
    return folder


def omdet_turbo(folder, seed=0):
    torch.manual_seed(seed)
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["!", "<|startoftext|>", *letters, *(c + "</w>" for c in (*letters, ".", ",")), "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], pad_token="!", model_max_length=77)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"eos_token_id": len(pieces) - 1, "bos_token_id": 1, "pad_token_id": 0}
    model = OmDetTurboForObjectDetection(
        OmDetTurboConfig(
            text_config=CLIPTextConfig(vocab_size=len(pieces), max_position_embeddings=77, projection_dim=32, **small, **ids),
            backbone_config=swin(),
            apply_layernorm_after_vision_backbone=False,  # it is for timm's Swin, whose maps are channels-last
            image_size=64,
            text_projection_in_dim=32,
            text_projection_out_dim=32,
            task_encoder_hidden_dim=32,
            class_embed_dim=32,
            num_queries=12,
            encoder_hidden_dim=16,
            encoder_in_channels=[16, 32, 64],
            encoder_attention_heads=2,
            encoder_dim_feedforward=32,
            vision_features_channels=[16, 16, 16],
            decoder_hidden_dim=16,
            decoder_num_heads=2,
            decoder_num_layers=2,
            decoder_dim_feedforward=32,
        )
    )
    spread(model)
    model.save_pretrained(folder)
    images = DetrImageProcessor(size={"height": 64, "width": 64}, do_pad=False)
    OmDetTurboProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def swin():
    """The backbone of several detectors."""
    return SwinConfig(
        image_size=64,
        patch_size=4,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 2, 2],
        window_size=4,
        out_features=["stage2", "stage3", "stage4"],
    )


def spread(model):
    """Random weights of a size at which boxes, scores and texts differ from one another."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)


def grounding_dino(folder, kind="grounding-dino", seed=0):
    torch.manual_seed(seed)
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "?", *WORDS])}
    # the model splits its prompts at BERT's ids of [CLS], [SEP], "." and "?"
    fixed = {"[CLS]": 101, "[SEP]": 102, ".": 1012, "?": 1029}
    filler = {i: f"filler{i}" for i in range(1030)} | {i: w for w, i in vocabulary.items() if w not in fixed}
    vocabulary = {w: i for i, w in (filler | {i: w for w, i in fixed.items()}).items()}
    tokenizer = BertTokenizer(vocab=vocabulary)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = BertConfig(vocab_size=len(vocabulary), **small)
    config, network = {
        "grounding-dino": (GroundingDinoConfig, GroundingDinoForObjectDetection),
        "mm-grounding-dino": (MMGroundingDinoConfig, MMGroundingDinoForObjectDetection),
    }[kind]
    model = network(
        config(
            text_config=text,
            backbone_config=swin(),
            d_model=32,
            encoder_layers=1,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            num_queries=12,
            max_text_len=32,
        )
    )
    model.save_pretrained(folder)
    processor = GroundingDinoProcessor(GroundingDinoImageProcessor(size={"shortest_edge": 128, "longest_edge": 256}), tokenizer)
    processor.save_pretrained(folder)
    return folder


def sam(folder, seed=0):
    torch.manual_seed(seed)
    vision = SamVisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        mlp_dim=32,
        window_size=4,
        global_attn_indexes=[0],
        num_pos_feats=8,
    )
    prompts = SamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4)
    decoder = SamMaskDecoderConfig(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2, iou_head_hidden_dim=16)
    SamModel(SamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)).save_pretrained(folder)
    images = SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    SamProcessor(images).save_pretrained(folder)
    return folder


def sam2(folder, seed=0):
    torch.manual_seed(seed)
    hiera = Sam2HieraDetConfig(
        hidden_size=8,
        num_attention_heads=1,
        image_size=[64, 64],
        blocks_per_stage=[1, 1, 1, 1],
        embed_dim_per_stage=[8, 16, 32, 64],
        num_attention_heads_per_stage=[1, 1, 2, 2],
        window_size_per_stage=[4, 4, 2, 2],
        global_attention_blocks=[],
        window_positional_embedding_background_size=[4, 4],
    )
    vision = Sam2VisionConfig(
        backbone_config=hiera,
        backbone_channel_list=[64, 32, 16, 8],
        fpn_hidden_size=16,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )
    prompts = Sam2PromptEncoderConfig(hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4)
    small = {"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    config = Sam2Config(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=Sam2MaskDecoderConfig(**small))
    Sam2Model(config).save_pretrained(folder)
    return _sam2_processor(folder)


def _sam2_processor(folder):
    images = Sam2ImageProcessor(size={"height": 64, "width": 64}, mask_size={"height": 16, "width": 16})
    Sam2Processor(images, target_size=64).save_pretrained(folder)
    return folder


def edgetam(folder, seed=0):
    torch.manual_seed(seed)
    backbone = TimmWrapperConfig(
        architecture="test_convnext", model_args={"in_chans": 3, "features_only": True, "out_indices": [0, 1, 2, 3]}
    )
    vision = EdgeTamVisionConfig(
        backbone_config=backbone,
        backbone_channel_list=[64, 48, 32, 24],
        fpn_hidden_size=16,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )
    prompts = EdgeTamPromptEncoderConfig(hidden_size=16, image_size=64, patch_size=16, mask_input_channels=4)
    small = {"hidden_size": 16, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    decoder = EdgeTamMaskDecoderConfig(**small)
    EdgeTamModel(EdgeTamConfig(vision_config=vision, prompt_encoder_config=prompts, mask_decoder_config=decoder)).save_pretrained(
        folder
    )
    return _sam2_processor(folder)


CLASSES = ["person", "Bird", "dog", "traffic light"]
LABELS = {"id2label": dict(enumerate(CLASSES)), "label2id": {name: i for i, name in enumerate(CLASSES)}}
STAGES = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 16], "depths": [1] * 4, "layer_type": "basic"}


def detr(folder, seed=0):
    torch.manual_seed(seed)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = DetrConfig(
        backbone_config=ResNetConfig(**STAGES, out_features=["stage4"]),
        d_model=16,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=12,
        **LABELS,
        **layers,
    )
    model = DetrForObjectDetection(config)
    spread(model)
    model.save_pretrained(folder)
    DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder


def rt_detr_like(config_class, model_class, folder, seed=0, **more):
    torch.manual_seed(seed)
    config = config_class(
        backbone_config=RTDetrResNetConfig(**STAGES, out_features=["stage2", "stage3", "stage4"]),
        encoder_hidden_dim=16,
        encoder_in_channels=[8, 8, 16],
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=16,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=2,
        decoder_attention_heads=2,
        num_queries=12,
        num_denoising=0,
        **LABELS,
        **more,
    )
    model = model_class(config)
    spread(model)
    model.save_pretrained(folder)
    RTDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
GROUPED = {
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 16,
    "decoder_self_attention_heads": 2,
    "decoder_cross_attention_heads": 2,
    "num_queries": 12,
    "group_detr": 2,
    "c2f_num_blocks": 1,
}


def lw_detr(folder, seed=0):
    torch.manual_seed(seed)
    backbone = LwDetrViTConfig(**VIT, pretrain_image_size=64, num_windows=4, out_indices=[1, 2], window_block_indices=[0])
    model = LwDetrForObjectDetection(LwDetrConfig(backbone_config=backbone, projector_scale_factors=[1.0], **GROUPED, **LABELS))
    spread(model)
    model.save_pretrained(folder)
    DeformableDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


def rf_detr(folder, seed=0):
    torch.manual_seed(seed)
    backbone = RfDetrDinov2Config(**VIT, num_windows=2, out_indices=[1, 2])
    model = RfDetrForObjectDetection(RfDetrConfig(backbone_config=backbone, intermediate_size=16, **GROUPED, **LABELS))
    spread(model)
    model.save_pretrained(folder)
    RfDetrImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return folder


MAKERS = {
    "detr": detr,
    "rt_detr_v2": lambda folder: rt_detr_like(RTDetrV2Config, RTDetrV2ForObjectDetection, folder),
    "rt_detr_v2, other loss": lambda folder: rt_detr_like(
        RTDetrV2Config, RTDetrV2ForObjectDetection, folder, use_focal_loss=False
    ),
    "d_fine": lambda folder: rt_detr_like(DFineConfig, DFineForObjectDetection, folder, eval_idx=-1),
    "deimv2": lambda folder: rt_detr_like(Deimv2Config, Deimv2ForObjectDetection, folder, eval_idx=-1),
    "lw_detr": lw_detr,
    "rf_detr": rf_detr,
    "owlv2": owlv2,
    "omdet-turbo": omdet_turbo,
    "grounding-dino": grounding_dino,
    "mm-grounding-dino": lambda folder: grounding_dino(folder, "mm-grounding-dino"),
    "sam": sam,
    "sam2": sam2,
    "edgetam": edgetam,
}
