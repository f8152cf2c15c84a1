"""Tiny models of many families, as transformers makes and saves them (that is, in the layout of the hub)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from solera_core.context import Context

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

VOCABULARY = 96
IMAGE = VOCABULARY - 1  # the token that stands for an image

_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
_CLIP_TEXT = {key: value for key, value in _TEXT.items() if key not in ("num_key_value_heads", "head_dim")}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
_DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
_ENCODER_DECODER = {
    "d_model": 32,
    "num_hidden_layers": 3,  # the same as encoder_layers
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "decoder_start_token_id": 0,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
_QWEN_TOKENS = {"image_token_id": 95, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}}
_SOUND = {"num_mel_bins": 16, "max_source_positions": 32}


def context(models: Mapping[str, Path]) -> Context:
    """Surroundings in which the names are models; the reload check is the tests' own."""
    return Context(models=dict(models), threads=1, reload_check=False, flush=False)


def _text(model_type: str, **settings: Any) -> dict[str, Any]:
    return {**_TEXT, "model_type": model_type, **settings}


@dataclass(frozen=True)
class Family:
    """One family.

    Attributes:
        cls: class of transformers.
        model_type: of its config.
        settings: of its config, beyond the common ones.
        inputs: `text`, `seq2seq`, `image`, `clip`, `sound`, `image+text`, `patches` (of an image, and text).
        deeper: tower whose layers are stacked (None: the model has one), and the layer ranges that make it deeper.
    """

    cls: str
    model_type: str
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    inputs: str = "text"
    deeper: tuple[str | None, list[list[int]]] = (None, [[0, 2], [1, 2]])

    def build(self, path: Path, seed: int, *, dtype: str = "float32") -> Path:
        """Make and save one with random weights, norms and biases included."""
        import torch
        import transformers
        from transformers import AutoConfig

        nested = any(key.endswith("_config") for key in self.settings)
        config = AutoConfig.for_model(self.model_type, **{**({} if nested else _TEXT), **self.settings})
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = getattr(transformers, self.cls)(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        model.to(getattr(torch, dtype)).save_pretrained(path)
        return path

    def load(self, path: Path) -> "tuple[PreTrainedModel, dict[str, Any]]":
        """The model and what transformers says about missing, unexpected and mismatched tensors."""
        import transformers

        model, info = getattr(transformers, self.cls).from_pretrained(
            path, output_loading_info=True, local_files_only=True, dtype="float32"
        )
        return model.eval(), info

    def exact(self, path: Path) -> "PreTrainedModel":
        """The model, which transformers must have loaded without inventing or dropping a tensor."""
        model, info = self.load(path)
        assert {kind: list(found) for kind, found in info.items() if found} == {}
        return model

    def outputs(self, model: "PreTrainedModel") -> "torch.Tensor":
        """What the model computes for a fixed input, flat."""
        import torch

        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 90, (1, 12), generator=generator)
        pixels = torch.randn(1, 3, 16, 16, generator=generator)
        given: dict[str, Any] = {"input_ids": ids}
        match self.inputs:
            case "seq2seq":
                given["decoder_input_ids"] = ids[:, :5]
            case "image":
                given = {"pixel_values": pixels}
            case "clip":
                given["pixel_values"] = pixels
            case "sound":
                given = {"input_features": torch.randn(1, 16, 64, generator=generator), "decoder_input_ids": ids[:, :5]}
            case "image+text":
                given = {"input_ids": ids.clone(), "pixel_values": pixels}
                given["input_ids"][0, 2:6] = IMAGE
            case "patches":  # an image of 4 x 4 patches, each as long as two frames of 4 x 4 pixels; 4 go to a token
                given["pixel_values"] = torch.randn(16, 96, generator=generator)
                given["image_grid_thw"] = torch.tensor([[1, 4, 4]])
                given["input_ids"][0, 2] = _QWEN_TOKENS["vision_start_token_id"]
                given["input_ids"][0, 3:7] = IMAGE
                given["mm_token_type_ids"] = (given["input_ids"] == IMAGE).int()
        with torch.no_grad():
            result = model(**given)
        for name in ("logits", "logits_per_text", "last_hidden_state"):
            if (found := getattr(result, name, None)) is not None:
                flat: torch.Tensor = found.flatten()
                return flat
        raise AssertionError(f"{self.cls} returns none of the outputs that are compared")


def _causal(cls: str, model_type: str, **settings: Any) -> Family:
    return Family(cls, model_type, settings)


FAMILIES: dict[str, Family] = {
    "llama": _causal("LlamaForCausalLM", "llama"),
    "mistral": _causal("MistralForCausalLM", "mistral"),
    "qwen2": _causal("Qwen2ForCausalLM", "qwen2"),
    "qwen3": _causal("Qwen3ForCausalLM", "qwen3", tie_word_embeddings=True),
    "qwen3_moe": _causal("Qwen3MoeForCausalLM", "qwen3_moe", **_EXPERTS),
    "mixtral": _causal("MixtralForCausalLM", "mixtral", num_local_experts=4, num_experts_per_tok=2),
    "gemma2": _causal("Gemma2ForCausalLM", "gemma2"),
    "gemma3_text": _causal("Gemma3ForCausalLM", "gemma3_text"),
    "phi3": _causal("Phi3ForCausalLM", "phi3"),
    "olmo2": _causal("Olmo2ForCausalLM", "olmo2"),
    "olmo3": _causal("Olmo3ForCausalLM", "olmo3"),
    "granite": _causal("GraniteForCausalLM", "granite"),
    "cohere2": _causal("Cohere2ForCausalLM", "cohere2"),
    "deepseek_v3": _causal(
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        **_DEEPSEEK,
        q_lora_rank=16,
        kv_lora_rank=16,
        num_key_value_heads=4,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "gpt_oss": _causal(
        "GptOssForCausalLM",
        "gpt_oss",
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "glm4_moe": _causal("Glm4MoeForCausalLM", "glm4_moe", **_DEEPSEEK),
    "falcon_h1": _causal("FalconH1ForCausalLM", "falcon_h1", **_MAMBA | {"mamba_n_heads": 4}, mamba_d_ssm=32),
    "mamba2": _causal(
        "Mamba2ForCausalLM", "mamba2", num_heads=8, head_dim=8, state_size=8, expand=2, n_groups=1, chunk_size=8
    ),
    "qwen3_next": _causal(
        "Qwen3NextForCausalLM",
        "qwen3_next",
        **_EXPERTS,
        shared_expert_intermediate_size=24,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        layer_types=["linear_attention", "full_attention"],
    ),
    "nemotron_h": Family(
        "NemotronHForCausalLM",
        "nemotron_h",
        {
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "chunk_size": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "layers_block_type": ["mamba", "attention", "moe"],
        },
        deeper=(None, [[0, 3], [0, 2]]),
    ),
    "granitemoehybrid": _causal(
        "GraniteMoeHybridForCausalLM",
        "granitemoehybrid",
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["mamba", "attention"],
        shared_intermediate_size=24,
        **_MAMBA,
    ),
    "jamba": Family(
        "JambaForCausalLM",
        "jamba",
        {
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mamba_d_state": 8,
        },
        deeper=(None, [[0, 2], [0, 2]]),
    ),
    "bamba": _causal("BambaForCausalLM", "bamba", attn_layer_indices=[1], **_MAMBA),
    "lfm2": _causal("Lfm2ForCausalLM", "lfm2", layer_types=["conv", "full_attention"]),
    "llama4_text": _causal(
        "Llama4ForCausalLM",
        "llama4_text",
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=48,
        interleave_moe_layer_step=2,
    ),
    "ernie4_5_moe": _causal(
        "Ernie4_5_MoeForCausalLM",
        "ernie4_5_moe",
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=24,
        moe_layer_start_index=1,
    ),
    "smollm3": _causal("SmolLM3ForCausalLM", "smollm3"),
    "gpt2": _causal("GPT2LMHeadModel", "gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neox": _causal("GPTNeoXForCausalLM", "gpt_neox"),
    "starcoder2": _causal("Starcoder2ForCausalLM", "starcoder2"),
    "stablelm": _causal("StableLmForCausalLM", "stablelm"),
    "nemotron": _causal("NemotronForCausalLM", "nemotron"),
    "ernie4_5": _causal("Ernie4_5ForCausalLM", "ernie4_5"),
    "exaone4": _causal("Exaone4ForCausalLM", "exaone4", sliding_window=8, sliding_window_pattern=2),
    "modernbert": _causal("ModernBertForMaskedLM", "modernbert", cls_token_id=0, sep_token_id=1),
    "bert": _causal("BertForMaskedLM", "bert"),
    "roberta": _causal("RobertaForMaskedLM", "roberta"),
    "distilbert": _causal("DistilBertForMaskedLM", "distilbert", dim=32, n_layers=2, n_heads=4, hidden_dim=48),
    "t5": Family(
        "T5ForConditionalGeneration",
        "t5",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_decoder_layers": 3,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        "seq2seq",
        ("decoder", [[0, 3], [1, 3]]),
    ),
    "bart": Family("BartForConditionalGeneration", "bart", _ENCODER_DECODER, "seq2seq", ("encoder", [[0, 3], [1, 3]])),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "whisper",
        {**_ENCODER_DECODER, **_SOUND, "max_target_positions": 32},
        "sound",
        ("decoder", [[0, 2], [1, 2]]),
    ),
    "vit": Family("ViTForImageClassification", "vit", {"image_size": 16, "patch_size": 8, "num_labels": 3}, "image"),
    "dinov2": Family("Dinov2Model", "dinov2", {"image_size": 16, "patch_size": 8}, "image"),
    "clip": Family(
        "CLIPModel",
        "clip",
        {"text_config": _CLIP_TEXT, "vision_config": {**_VISION, "num_hidden_layers": 3}, "projection_dim": 16},
        "clip",
        ("vision_model", [[0, 3], [1, 3]]),
    ),
    "siglip": Family(
        "SiglipModel",
        "siglip",
        {"text_config": _CLIP_TEXT | {"max_position_embeddings": 12}, "vision_config": _VISION},
        "clip",
        ("text", [[0, 2], [1, 2]]),
    ),
    "llava": Family(
        "LlavaForConditionalGeneration",
        "llava",
        {
            "text_config": _text("llama"),
            "vision_config": {**_VISION, "model_type": "clip_vision_model", "num_hidden_layers": 3},
            "image_token_index": IMAGE,
        },
        "image+text",
        ("language_model", [[0, 2], [1, 2]]),
    ),
    "gemma3": Family(
        "Gemma3ForConditionalGeneration",
        "gemma3",
        {
            "text_config": _text("gemma3_text"),
            "vision_config": {**_VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": 94,
            "eoi_token_index": 93,
        },
        "image+text",
        ("text_decoder", [[0, 2], [1, 2]]),
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_5_vl",
        {
            "text_config": _text("qwen2_5_vl_text", **_MROPE),
            "vision_config": {
                "depth": 3,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "patch_size": 4,
                "out_hidden_size": 32,
                "fullatt_block_indexes": [1],
                "window_size": 16,
            },
            **_QWEN_TOKENS,
        },
        inputs="patches",
        deeper=("vision_tower", [[0, 3], [1, 3]]),
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        "qwen3_vl",
        {
            "text_config": _text("qwen3_vl_text", **_MROPE),
            "vision_config": {
                "depth": 3,
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_heads": 4,
                "patch_size": 4,
                "out_hidden_size": 32,
                "deepstack_visual_indexes": [0, 1],
                "num_position_embeddings": 16,
            },
            **_QWEN_TOKENS,
        },
        inputs="patches",
        deeper=("language", [[0, 2], [1, 2]]),
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration",
        "mistral3",
        {
            "text_config": _text("mistral"),
            "vision_config": {**_VISION, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": IMAGE,
            "spatial_merge_size": 1,
            "tie_word_embeddings": False,
        },
        deeper=("text_decoder", [[0, 2], [1, 2]]),
    ),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration",
        "smolvlm",
        {"text_config": _text("llama"), "vision_config": _VISION, "image_token_id": IMAGE, "scale_factor": 1},
        deeper=("text_model", [[0, 2], [1, 2]]),
    ),
    "mllama": Family(
        "MllamaForConditionalGeneration",
        "mllama",
        {
            "text_config": _text("mllama_text_model", cross_attention_layers=[1]),
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 4,
                "image_size": 16,
                "patch_size": 8,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 64,
                "max_num_tiles": 1,
                "supported_aspect_ratios": [[1, 1]],
            },
            "image_token_index": VOCABULARY,
        },
        deeper=("language_model", [[0, 2], [0, 2]]),
    ),
    "qwen2_audio": Family(
        "Qwen2AudioForConditionalGeneration",
        "qwen2_audio",
        {
            "text_config": _text("qwen2"),
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                **_SOUND,
            },
            "audio_token_index": IMAGE,
        },
        deeper=("audio_tower", [[0, 2], [1, 2]]),
    ),
}
"""By the name that the tests give them."""
