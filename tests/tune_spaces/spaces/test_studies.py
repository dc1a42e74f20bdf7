"""Tests for studies, which express the paper's ablations as named variants."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest

from amd.config import ConfigError
from tests.support.runs.space_bases import BASES, NO_GENERATION, space_of
from tune_spaces.config import StudyName
from tune_spaces.spaces.space import baseline, config_of, grid, overrides_of
from tune_spaces.spaces.studies import STUDIES, VARIANT

POINTLESS = {
    *((name, "generator_depth") for name in NO_GENERATION),
    ("symmetric", "serial"),  # only direct alignment exists
}


def test_the_config_accepts_exactly_the_implemented_studies() -> None:
    assert set(STUDIES) == set(get_args(StudyName))


@pytest.mark.parametrize("study", STUDIES)
@pytest.mark.parametrize("name", BASES)
def test_variants_are_valid_distinct_runs_and_include_the_base(name: str, study: StudyName) -> None:
    if (name, study) in POINTLESS:
        with pytest.raises(ConfigError, match=f"space.study={study}: its variants all produce the same run"):
            space_of(name, study=study)
        return
    space = space_of(name, study=study)
    assert list(space.dimensions) == [VARIANT]
    digests = [config_of(space, point).digest() for point in grid(space)]
    assert len(digests) >= 2
    assert len(set(digests)) == len(digests)
    point = baseline(space)
    assert point is not None
    assert overrides_of(space, point) == {}


@pytest.mark.parametrize("name", BASES)
def test_variant_names_are_unique_across_studies(name: str) -> None:
    names = Counter(variant for study in STUDIES.values() for variant in study(BASES[name]))
    assert max(names.values()) == 1


def test_studies_cover_the_ablations_in_the_paper() -> None:
    answers = {study: space_of("k400-vit-b", study=study).dimensions[VARIANT].choices for study in get_args(StudyName)}
    assert answers == {
        "asymmetry": ("asymmetric", "symmetric", "full view"),
        "serial": ("direct only", "generation only", "in series"),
        "layers": ("middle+last", "last", "middle", "thirds", "quarters"),
        "distance": ("l2", "l1", "smooth_l1"),
        "generator_depth": ("depth 1", "depth 2", "depth 4"),
        "reduction": ("sum", "mean"),
    }


@pytest.mark.parametrize("name", ["symmetric", "full view", "k400-vit-b"])
def test_the_asymmetry_study_compares_three_teacher_ratios_regardless_of_the_base(name: str) -> None:
    space = space_of(name, study="asymmetry")
    asymmetric, symmetric, full = (
        config_of(space, {VARIANT: variant}) for variant in ("asymmetric", "symmetric", "full view")
    )
    assert 0 == full.teacher_hidden_cells < asymmetric.teacher_hidden_cells < symmetric.teacher_hidden_cells
    assert symmetric.teacher_hidden_cells == symmetric.student_hidden_cells == asymmetric.student_hidden_cells


def test_an_unknown_variant_is_rejected() -> None:
    space = space_of("k400-vit-b", study="serial")
    with pytest.raises(ConfigError, match="variant='parallel': unknown; must be one of asymmetric"):
        config_of(space, {VARIANT: "parallel"})
