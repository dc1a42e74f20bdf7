from __future__ import annotations

from pathlib import Path

import pytest

from amd.config import ConfigError, ProbeConfig, validate, with_overrides
from amd.data.faults import DataFault
from amd.downstream.embedding import cache
from amd.downstream.probing.run import run_probe
from tests.amd.downstream.embedding.test_features import write_images
from tests.amd.downstream.probing.test_run import publish
from tests.support.processes import run_in_subprocess
from tests.support.ray_cluster import RayCluster
from tests.support.runs.configs import tiny_image_config

pytestmark = pytest.mark.ray


def test_scores_do_not_depend_on_the_number_of_workers(ray_cluster: RayCluster, tmp_path: Path) -> None:
    run_in_subprocess(compare, tmp_path)


def compare(tmp_path: Path) -> None:
    cache.ROWS = 8
    publish(tmp_path, tiny_image_config())
    write_images(tmp_path / "train", 44)
    written = sorted(write_images(tmp_path / "test", 20, seed=1))
    Path(written[11]).write_bytes(b"not an image")
    config = validate(
        ProbeConfig,
        {
            "encoder": "tiny",
            "data": {
                "train": str(tmp_path / "train"),
                "test": str(tmp_path / "test"),
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
    distributed = run_probe(with_overrides(config, {"scaling.workers": 2, "cache": True}))
    assert [score.values for score in distributed.scores] == [score.values for score in alone.scores]
    assert distributed.left_out == alone.left_out
    assert distributed.left_out[0]["location"] == written[11]
    assert (
        run_probe(with_overrides(config, {"cache": True})).scores[0].values == alone.scores[0].values
    )  # read from the cache

    with pytest.raises(DataFault, match="1 of 20 samples cannot be read"):
        run_probe(with_overrides(config, {"scaling.workers": 2, "data.max_bad_fraction": 0.01}))
    with pytest.raises(ConfigError, match=r"scaling\.workers=64: each worker needs 1 CPUs, but .* capacity for only 4"):
        run_probe(with_overrides(config, {"scaling.workers": 64}))
