"""A plan for a person: layers that are made alike are one row."""

from typing import Any

from solera.plan_rows import by_layers


def layer(i: int, **more: Any) -> dict[str, Any]:
    return {"tensor": f"model.layers.{i}.mlp.up_proj.weight", "shape": "4x8", **more}


def test_equal_layers_are_one_row() -> None:
    rows = [{"tensor": "model.embed_tokens.weight", "shape": "9x4"}, *(layer(i) for i in range(3))]
    rows.append({"tensor": "model.norm.weight", "shape": "4"})
    assert [row["tensor"] for row in by_layers(rows)] == [
        "model.embed_tokens.weight",
        "model.layers.0-2.mlp.up_proj.weight",
        "model.norm.weight",
    ]


def test_kinds_take_turns() -> None:
    rows = [{**layer(i), "tensor": f"h.{i}.{kind}"} for i in range(4) for kind in ("a.weight", "a.bias", "b.weight")]
    assert [row["tensor"] for row in by_layers(rows)] == ["h.0-3.a.weight", "h.0-3.a.bias", "h.0-3.b.weight"]


def test_figures_are_given_from_the_first_to_the_last() -> None:
    rows = [layer(i, t=i / 3, weight=f"{i}, 1", flag=True) for i in range(4)]
    (row,) = by_layers(rows)
    assert (row["t"], row["weight"], row["flag"]) == ("0 ... 1", "0, 1 ... 3, 1", True)
    assert [row["flag"] for row in by_layers([layer(0, flag=True), layer(1, flag=False)])] == [True, False]


def test_sources_of_other_layers() -> None:
    name = "model.layers.{}.mlp.up_proj.weight"
    rows = [layer(i, models=f"a, b:{name.format(i + 8)}") for i in range(2)]
    rows += [layer(i, models=f"a, b:{name.format(i + 20)}") for i in range(2, 4)]
    rows.append(layer(4, models="a"))
    assert [row["models"] for row in by_layers(rows)] == [
        f"a, b:{name.format('8-9')}",
        f"a, b:{name.format('22-23')}",
        "a",
    ]


def test_a_gap_or_a_repetition_begins_a_new_row() -> None:
    rows = [layer(0), layer(2), layer(3), layer(3)]
    assert [row["tensor"].split(".")[2] for row in by_layers(rows)] == ["0", "2-3", "3"]


def test_no_tensor_is_lost() -> None:
    rows = [layer(i, method="ties" if i % 3 else "copy", t=i) for i in range(50)]
    found = by_layers(rows)
    spans = [row["tensor"].split(".")[2].split("-") for row in found]
    assert sum(int(span[-1]) - int(span[0]) + 1 for span in spans) == 50
