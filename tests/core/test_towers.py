"""Towers from names alone."""

import pytest

from solera_core.architecture import fused_experts, has_tokens_beyond_vocabulary
from solera_core.towers import WHOLE, Tower, count_keys, find_tower, layer_count, stacks_of, tower_config, towers_of

LAYER = ("0.self_attn.q_proj.weight", "1.self_attn.q_proj.weight")
CASES: dict[str, tuple[list[str], dict[str, tuple[str, str, list[str]]]]] = {
    # names -> tower: (role, prefix, tensors that are worth a look)
    "llava": (
        [
            *(f"language_model.model.layers.{n}" for n in LAYER),
            "language_model.model.embed_tokens.weight",
            "language_model.lm_head.weight",
            *(f"vision_tower.vision_model.encoder.layers.{n}" for n in LAYER),
            "vision_tower.vision_model.embeddings.class_embedding",
            "multi_modal_projector.linear_1.weight",
            "image_newline",
        ],
        {
            "language_model": ("language", "language_model.model", ["language_model.lm_head.weight"]),
            "vision_tower": ("vision", "vision_tower.vision_model", []),
            "multi_modal_projector": ("projector", "multi_modal_projector.linear_1", []),
            "image_newline": ("vision", "", ["image_newline"]),
        },
    ),
    "llava, newer": (
        [
            *(f"model.language_model.layers.{n}" for n in LAYER),
            "model.language_model.embed_tokens.weight",
            "lm_head.weight",
            *(f"model.vision_tower.encoder.layers.{n}" for n in LAYER),
            "model.multi_modal_projector.linear_1.weight",
        ],
        {
            "language_model": ("language", "model.language_model", ["lm_head.weight"]),
            "vision_tower": ("vision", "model.vision_tower.encoder", []),
            "multi_modal_projector": ("projector", "model.multi_modal_projector.linear_1", []),
        },
    ),
    "qwen2_5_vl": (
        [
            *(f"model.layers.{n}" for n in LAYER),
            "model.embed_tokens.weight",
            "lm_head.weight",
            *(f"visual.blocks.{n}" for n in LAYER),
            "visual.patch_embed.proj.weight",
            "visual.merger.mlp.0.weight",
            "visual.merger.mlp.2.weight",
        ],
        {
            "model": ("language", "model", ["lm_head.weight", "model.embed_tokens.weight"]),
            "visual": ("vision", "visual", ["visual.patch_embed.proj.weight"]),
            "multi_modal_projector": ("projector", "visual.merger.mlp", ["visual.merger.mlp.0.weight"]),
        },
    ),
    "t5": (
        [
            "shared.weight",
            "lm_head.weight",
            *(f"encoder.block.{n}" for n in LAYER),
            *(f"decoder.block.{n}" for n in LAYER),
            "decoder.final_layer_norm.weight",
        ],
        {
            "shared": ("shared", "shared", ["lm_head.weight", "shared.weight"]),
            "encoder": ("encoder", "encoder", []),
            "decoder": ("decoder", "decoder", ["decoder.final_layer_norm.weight"]),
        },
    ),
    "multi-token prediction": (
        [
            *(f"model.layers.{n}" for n in LAYER),
            "model.embed_tokens.weight",
            "lm_head.weight",
            *(f"mtp.layers.{n}" for n in LAYER),
            "mtp.fc.weight",
        ],
        {"model": ("language", "model", ["lm_head.weight"]), "mtp": ("mtp", "mtp", ["mtp.fc.weight"])},
    ),
    "two models in one": (
        [
            *(f"thinker.model.layers.{n}" for n in LAYER),
            "thinker.model.embed_tokens.weight",
            *(f"thinker.visual.blocks.{n}" for n in LAYER),
            *(f"talker.model.layers.{n}" for n in LAYER),
        ],
        {
            "thinker.model": ("language", "thinker.model", []),
            "thinker.visual": ("vision", "thinker.visual", []),
            "talker": ("talker", "talker.model", []),
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_towers(case: str) -> None:
    names, expected = CASES[case]
    towers = {tower.name: tower for tower in towers_of(names)}
    assert {name: (tower.role, ".".join(tower.prefix)) for name, tower in towers.items()} == {
        name: (role, prefix) for name, (role, prefix, _) in expected.items()
    }
    for name, (_, _, tensors) in expected.items():
        assert set(tensors) <= set(towers[name].tensors)
    assert sorted(n for tower in towers.values() for n in tower.tensors) == sorted(names)


def test_one_stack_is_one_tower() -> None:
    names = ["transformer.h.0.attn.c_attn.weight", "transformer.wte.weight", "score.weight", "proj.0.weight"]
    assert towers_of(names) == (Tower(WHOLE, "language", tuple(names), {"transformer.h": 1}),)
    assert stacks_of(["a.0.weight", "a.1.weight", "0.weight", "bias"]) == {}
    assert stacks_of(["a.0.b.0.c.weight", "a.2.b.0.c.weight"]) == {"a": 3}  # the outermost


def test_canonical_names_are_those_of_every_layout() -> None:
    old, new = ({t.role: t for t in towers_of(CASES[c][0])} for c in ("llava", "llava, newer"))
    text = towers_of(["model.embed_tokens.weight", "lm_head.weight", *(f"model.layers.{n}" for n in LAYER)])[0]
    for tower in (old["language"], new["language"]):
        assert {tower.canonical(n) for n in tower.tensors} == {text.canonical(n) for n in text.tensors}
        assert {tower.named(text.canonical(n)) for n in text.tensors} == set(tower.tensors)


def test_finding_a_tower() -> None:
    towers = towers_of(CASES["qwen2_5_vl"][0])
    found = {name: find_tower(towers, name) for name in ("language", "text_decoder", "vision_tower", "visual", "audio")}
    assert {name: tower and tower.name for name, tower in found.items()} == {
        "language": "model",
        "text_decoder": "model",
        "vision_tower": "visual",
        "visual": "visual",
        "audio": None,
    }
    llava = towers_of(CASES["llava"][0])
    vision = find_tower(llava, "vision")
    assert vision is not None
    assert vision.name == "vision_tower"  # not image_newline, which has no layers
    assert find_tower(towers_of(CASES["t5"][0]), "text_decoder") is None


@pytest.mark.parametrize(
    ("case", "name", "config", "keys", "count"),
    [
        ("t5", "encoder", {"num_layers": 2, "num_decoder_layers": 3}, ["num_layers"], 2),
        ("t5", "decoder", {"num_layers": 2, "num_decoder_layers": 3}, ["num_decoder_layers"], 3),
        ("t5", "encoder", {"encoder_layers": 2, "num_hidden_layers": 2, "decoder_layers": 3}, None, 2),
        ("t5", "decoder", {"encoder_layers": 2, "decoder_layers": 3}, ["decoder_layers"], 3),
        ("llava", "vision", {"text_config": {"n_layer": 4}, "vision_config": {"depth": 5}}, ["depth"], 5),
        ("llava", "language", {"text_config": {"n_layer": 4}, "vision_config": {"depth": 5}}, ["n_layer"], 4),
        ("qwen2_5_vl", "language", {"num_hidden_layers": 4, "vision_config": {"depth": 5}}, None, 4),
        ("llava", "language", {"text_config": {"num_nextn_predict_layers": 4, "use_layers": True}}, [], None),
    ],
)
def test_counts_in_the_config(case: str, name: str, config: dict[str, object], keys: list[str], count: int) -> None:
    tower = find_tower(towers_of(CASES[case][0]), name)
    assert tower is not None
    found = count_keys(tower_config(config, tower), tower)
    assert keys is None or found == keys
    assert layer_count(config, tower) == count


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj", (4, 8, 6), 4),
        ("model.layers.0.mlp.experts.gate_up_proj_bias", (4, 6), 4),
        ("model.layers.0.block_sparse_moe.input_linear.weight", (4, 8, 6), 4),
        ("model.layers.0.mlp.experts.3.down_proj.weight", (4, 6), 1),
        ("model.layers.0.mlp.router.weight", (4, 6), 1),
        ("model.layers.0.mlp.gate.weight", (4, 6), 1),
        ("model.layers.0.mlp.experts.e_score_correction_bias", (4,), 1),
        ("model.layers.0.mlp.experts.gate_up_proj", (5, 8, 6), 1),
    ],
)
def test_fused_experts(name: str, shape: tuple[int, ...], count: int) -> None:
    assert fused_experts(name, shape, {"num_local_experts": 4}) == count
    assert fused_experts(name, shape, {}) == 1


def test_tokens_beyond_the_vocabulary() -> None:
    text = {"vocab_size": 96}
    assert has_tokens_beyond_vocabulary({"text_config": text, "image_token_index": 96})
    assert not has_tokens_beyond_vocabulary({"text_config": text, "image_token_index": 95, "image_token_id": None})
