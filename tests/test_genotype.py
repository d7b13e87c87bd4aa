"""Genotypes: both texts both ways, and refusals of what is none."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rnas import genotype
from rnas.genotype import PRIMITIVES, Genotype

NORMAL = [[["sep_conv_3x3", 0], ["skip_connect", 1]], [["dil_conv_5x5", 2], ["max_pool_3x3", 0]]]


def make(**changes) -> dict:
    return {"cells": {"normal": NORMAL, "reduction": NORMAL}, "concat": [2, 3]} | changes


@st.composite
def genotypes(draw):
    nodes = draw(st.integers(1, 5))
    pair = lambda j: st.tuples(st.sampled_from(PRIMITIVES), st.integers(0, 1 + j))  # noqa: E731
    cell = st.tuples(*(st.tuples(pair(j), pair(j)) for j in range(nodes)))
    concat = draw(st.lists(st.integers(0, 1 + nodes), min_size=1, unique=True))
    types = draw(st.sampled_from([("normal", "reduction"), ("accurate", "reduction", "robust")]))
    return Genotype({cell_type: draw(cell) for cell_type in types}, tuple(concat))


@given(genotypes())
@settings(max_examples=50, deadline=None)
def test_json_and_classic_text_hold_the_whole_genotype(found):
    assert genotype.from_json(genotype.to_json(found)) == found
    assert genotype.from_text(genotype.to_text(found)) == found


def test_the_text_of_public_repositories_is_read():
    text = """DARTS_V2 = Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1),
        ('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5],
        reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0),
        ('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=range(2, 6))"""
    assert genotype.from_text(text) == genotype.published()["DARTS_V2"]


def test_the_text_is_never_executed(tmp_path):
    victim = tmp_path / "victim"
    with pytest.raises(ValueError):
        genotype.from_text(f"Genotype(normal=open({str(victim)!r}, 'w'), normal_concat=[2])")
    assert not victim.exists()


def test_published_genotypes_have_the_cells_of_a_space():
    known = genotype.published()
    assert {"DARTS_V1", "DARTS_V2", "PC_DARTS_CIFAR", "P_DARTS", "ADVRUSH", "RACL", "ARNAS"} <= set(known)
    assert list(known["ARNAS"].cells) == ["accurate", "reduction", "robust"]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ([["sep_conv_3x4", 0], ["skip_connect", 1]], "did you mean 'sep_conv_3x3'"),
        ([["none", 0], ["skip_connect", 1]], "unknown operation 'none'"),
        ([["skip_connect", 2], ["skip_connect", 1]], "earlier state, 0 to 1; got 2"),
        ([["skip_connect", -1], ["skip_connect", 1]], "earlier state"),
        ([["skip_connect", True], ["skip_connect", 1]], "earlier state"),
        ([["skip_connect", "1"], ["skip_connect", 1]], "earlier state"),
        ([["skip_connect"], ["skip_connect", 1]], "expected a pair"),
        ([], "expected a list of"),
    ],
)
def test_a_bad_node_is_named(node, message):
    with pytest.raises(ValueError, match=r"cell 'normal', node 0") as error:
        genotype.from_dict(make(cells={"normal": [node, NORMAL[1]], "reduction": NORMAL}))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "values",
    [{}, [], {"cells": {}}, {"cells": []}, {"cells": {"normal": []}}, make(concat=[]), make(concat=[4]), make(concat=["2"]), make(concat=4), make(concat=[2, 2]),
     make(cells={"normal": NORMAL, "reduction": NORMAL[:1]})],
)  # fmt: skip
def test_what_is_no_genotype_is_refused(values):
    with pytest.raises(ValueError):
        genotype.from_dict(values)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Genotype(",
        "print(1)",
        "Genotype(normal=[('skip_connect', 0)], normal_concat=[2])",
        "Genotype()",
        "Genotype(normal=[('skip_connect', 0), ('skip_connect', 1)], normal_concat=3)",
    ],
)
def test_what_is_no_classic_text_is_refused(text):
    with pytest.raises(ValueError):
        genotype.from_text(text)


def test_the_classic_text_cannot_hold_three_inputs():
    three = Genotype({"normal": ((("skip_connect", 0), ("skip_connect", 1), ("sep_conv_3x3", 0)),)}, (2,))
    with pytest.raises(ValueError, match="exactly two inputs"):
        genotype.to_text(three)


def test_load_takes_folder_json_text_and_published_name(tmp_path):
    found = genotype.published()["RACL"]
    found.save(tmp_path / "genotype.json")
    (tmp_path / "classic.txt").write_text(genotype.to_text(found))
    for source in (tmp_path, tmp_path / "genotype.json", tmp_path / "classic.txt", "RACL"):
        assert genotype.load(source) == found


def test_load_names_what_is_missing_or_broken(tmp_path):
    with pytest.raises(FileNotFoundError, match="did you mean RACL"):
        genotype.load("RCAL")
    (tmp_path / "genotype.json").write_text(json.dumps(make())[:-9])
    with pytest.raises(ValueError, match="genotype.json: not valid JSON"):
        genotype.load(tmp_path)
