from __future__ import annotations

from pathlib import Path

import pytest

from amd.config import ConfigError, ProbeConfig, validate, with_overrides
from amd.data.faults import DataFault
from amd.downstream.embedding import cache
from amd.downstream.probing.run import run_probe
from tests.amd.downstream.embedding.test_features import write_images
from tests.amd.downstream.probing.test_run import publish
from tests.support.ray_cluster import RayCluster
from tests.support.runs.configs import tiny_image_config
from tests.support.runs.tiny_runs import in_a_process

pytestmark = pytest.mark.ray


def test_several_workers_find_what_one_finds(ray_cluster: RayCluster, tmp_path: Path) -> None:
    in_a_process(compare, tmp_path)


def compare(tmp_path: Path) -> None:
    cache.ROWS = 8
    publish(tmp_path, tiny_image_config())
    write_images(tmp_path / "known", 44)
    written = sorted(write_images(tmp_path / "asked", 20, seed=1))
    Path(written[11]).write_bytes(b"not a picture")
    config = validate(
        ProbeConfig,
        {
            "encoder": "tiny",
            "data": {
                "train": str(tmp_path / "known"),
                "test": str(tmp_path / "asked"),
                "loader_workers": 0,
                "max_bad_fraction": 0.1,
            },
            "linear": {"epochs": 10, "warmup_epochs": 1},
            "scaling": {"device": "cpu"},
            "cache": False,
            "storage": str(tmp_path),
        },
    )
    alone = run_probe(config)
    team = run_probe(with_overrides(config, {"scaling.workers": 2, "cache": True}))
    assert [score.values for score in team.scores] == [score.values for score in alone.scores]
    assert team.left_out == alone.left_out
    assert team.left_out[0]["location"] == written[11]
    assert run_probe(with_overrides(config, {"cache": True})).scores[0].values == alone.scores[0].values  # as kept

    with pytest.raises(DataFault, match="1 of 20 samples cannot be read"):
        run_probe(with_overrides(config, {"scaling.workers": 2, "data.max_bad_fraction": 0.01}))
    with pytest.raises(ConfigError, match=r"scaling\.workers=64 need 1 CPUs each; the cluster has room for 4"):
        run_probe(with_overrides(config, {"scaling.workers": 64}))
