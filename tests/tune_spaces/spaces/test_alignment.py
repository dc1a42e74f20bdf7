"""Tests for the alignment space: layer pairs, weights and branches."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amd.config import ConfigError, TrainConfig, with_overrides
from tests.support.runs.space_bases import BASES, space_of
from tune_spaces.spaces.alignment import LAYERS, layer_sets
from tune_spaces.spaces.space import Space, config_of, overrides_of

fractions = st.floats(0.01, 1)


def _pairs(config: TrainConfig) -> list[tuple[int, int]]:
    return [(pair.student, pair.teacher) for pair in config.objective.layers]


def _varied(name: str, point: dict[str, Any]) -> TrainConfig:
    return config_of(Space({}, BASES[name]), point)


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("last", [(12, 24)]),
        ("middle", [(6, 12)]),
        ("middle+last", [(6, 12), (12, 24)]),
        ("thirds", [(4, 8), (8, 16), (12, 24)]),
        ("quarters", [(3, 6), (6, 12), (9, 18), (12, 24)]),
        ("last to 3/4", [(12, 18)]),
        ("middle+last to 1/3+1/2", [(6, 8), (12, 12)]),
        ([[0.5, 0.5], [1, 1]], [(6, 12), (12, 24)]),
        ([[1, 0.75], [0.75, 0.75]], [(9, 18), (12, 18)]),
    ],
)
def test_fractions_of_depth_map_to_blocks(layers: Any, expected: list[tuple[int, int]]) -> None:
    assert _pairs(_varied("k400-vit-b", {"alignment.layers": layers})) == expected


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("layers", LAYERS)
def test_every_layer_set_is_valid_at_every_depth(name: str, layers: str) -> None:
    pairs = _pairs(_varied(name, {"alignment.layers": layers}))
    assert len({student for student, _ in pairs}) == len(pairs)


@given(
    name=st.sampled_from(sorted(BASES)),
    layers=st.lists(st.tuples(fractions, fractions).map(list), min_size=1, max_size=6),
)
def test_any_layer_fractions_are_valid_at_any_depth(name: str, layers: list[list[float]]) -> None:
    pairs = _pairs(_varied(name, {"alignment.layers": layers}))
    assert 1 <= len(pairs) <= len(layers) + 1


def test_fractions_that_map_to_the_same_student_block_produce_one_pair() -> None:
    assert _pairs(_varied("shallow", {"alignment.layers": "quarters"})) == [(1, 2)]


def test_without_reconstruction_the_last_block_is_also_aligned() -> None:
    assert _pairs(_varied("no reconstruction", {"alignment.layers": "middle"})) == [(2, 2), (4, 4)]


def test_aligned_blocks_adapt_to_the_depths_of_varied_encoders() -> None:
    point = {"teacher.encoder.depth": 8, "alignment.layers": "last"}
    assert _pairs(_varied("tiny video", point)) == [(4, 8)]


def test_layer_pairs_of_the_base_that_match_no_named_set_are_called_base() -> None:
    assert "base" in layer_sets(BASES["odd layers"])
    assert "base" not in layer_sets(BASES["k400-vit-b"])
    assert overrides_of(Space({}, BASES["odd layers"]), {"alignment.layers": "base"}) == {}


@pytest.mark.parametrize("name", BASES)
def test_layer_sets_are_distinct(name: str) -> None:
    found = [tuple(_pairs(_varied(name, {"alignment.layers": layers}))) for layers in layer_sets(BASES[name])]
    assert len(set(found)) == len(found)


@pytest.mark.parametrize(
    ("point", "direct", "generation"),
    [
        ({"alignment.branches": "direct"}, 10, 0),
        ({"alignment.branches": "generation"}, 0, 1),
        ({"alignment.branches": "both", "alignment.generation_weight": 3.0}, 10, 3),
        ({"alignment.branches": "direct", "alignment.generation_weight": 3.0}, 10, 0),
        ({"alignment.direct_weight": 2.0}, 2, 1),
        ({"alignment.branches": "generation", "alignment.direct_weight": 2.0}, 0, 1),
    ],
)
def test_the_weight_of_an_unused_branch_is_zero(point: dict[str, Any], direct: float, generation: float) -> None:
    weights = _varied("demo-video-amd", point).objective.weights
    assert (weights.direct, weights.generation) == (direct, generation)


def test_a_branch_disabled_in_the_base_is_enabled_with_the_other_branchs_weight() -> None:
    base = with_overrides(BASES["direct alone"], {"objective.weights.direct": 3})
    weights = config_of(Space({}, base), {"alignment.branches": "both"}).objective.weights
    assert (weights.direct, weights.generation) == (3, 3)


def test_symmetric_masking_always_uses_direct_alignment() -> None:
    def varied(**point: Any) -> TrainConfig:
        point = {f"alignment.{parameter}": value for parameter, value in point.items()}
        return _varied("demo-video-amd", {"masking.teacher_ratio": 0.95, **point})

    runs = [
        varied(branches="direct"),
        varied(branches="generation"),
        varied(branches="both"),
        varied(generation_weight=5.0),
        varied(),
    ]
    assert len({run.digest() for run in runs}) == 1
    assert runs[0].objective.weights.direct == 10
    assert varied(direct_weight=2.0).objective.weights.direct == 2


def test_direct_alignment_is_enabled_if_the_varied_masks_leave_no_other_alignment() -> None:
    weights = _varied("generation alone", {"masking.teacher_ratio": 0.75}).objective.weights
    assert weights.direct == 1


@pytest.mark.parametrize(
    ("dimensions", "expected"),
    [
        ({"alignment.layers": ["middle+lst", "last"]}, r"did you mean 'middle\+last'\?"),
        ({"alignment.layers": [[[0.5, 0.5], [0, 1]], "last"]}, "0 must be a fraction of depth"),
        ({"alignment.layers": [[0.5, 1], "last"]}, r"pairs \[student, teacher\]"),
        ({"alignment.layers": [[], "last"]}, "must be a name"),
        ({"alignment.layers": {"low": 0.5, "high": 1}}, "must be a name"),
        ({"alignment.branches": ["serial", "both"]}, "must be one of direct, generation, both"),
        ({"alignment.direct_weight": [-1, 1]}, "greater than or equal to 0"),
    ],
)
def test_the_error_for_an_invalid_value_starts_with_its_parameter(dimensions: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as error:
        space_of("tiny video", dimensions=dimensions)
    assert str(error.value).startswith("space.dimensions.alignment.")
