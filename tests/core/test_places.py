"""Stack, layer and kind of tensors of many families, by name."""

import pytest

from solera_core.places import Place, place_of


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj.weight", Place("model.layers", 3, "self_attn.q_proj")),
        ("model.layers.3.self_attn.q_proj.bias", Place("model.layers", 3, "self_attn.q_proj.bias")),
        ("model.layers.0.mlp.experts.17.up_proj.weight", Place("model.layers", 0, "mlp.experts.*.up_proj")),
        ("encoder.block.2.layer.0.SelfAttention.q.weight", Place("encoder.block", 2, "layer.*.SelfAttention.q")),
        ("h.11.attn.c_attn.weight", Place("h", 11, "attn.c_attn")),
        ("vision_model.encoder.layers.5.mlp.fc1.weight", Place("vision_model.encoder.layers", 5, "mlp.fc1")),
        ("model.embed_tokens.weight", Place("", None, "model.embed_tokens")),
        ("lm_head.weight", Place("", None, "lm_head")),
        ("weight", Place("", None, "weight")),
        ("w.0", Place("", None, "w.0")),
    ],
)
def test_places(name: str, place: Place) -> None:
    assert place_of(name) == place
