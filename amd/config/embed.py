"""Config for bulk embedding: a data set and the published encoder that embeds it."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from amd.config.locations import EncoderLocation, OutputLocation, StorageLocation
from amd.config.sections import Section
from amd.config.training_sections import DataConfig, ScalingConfig

MapLayout = Literal["none", "pca", "umap"]


class EmbedConfig(Section):
    """Config for embedding a data set into Parquet files. Samples are preprocessed as the card specifies."""

    encoder: EncoderLocation = Field(min_length=1)
    """Published encoder: its ID, folder or URL."""
    data: DataConfig
    """Data set to embed."""
    output: OutputLocation | None = None
    """Folder or URL for the Parquet files. Default: `<storage>/embeddings/<encoder>/<digest of the data>`; for jobs
    `<storage>/jobs/<job>/output`."""
    normalize: bool = False
    """Whether to scale the embeddings to unit length."""
    rows_per_file: int = Field(4096, ge=1, le=2**17)
    """Samples per Parquet file; each file is a unit of work that is redone if interrupted."""
    thumbnails: bool = True
    """Whether to write a thumbnail of each sample, as the encoder sees it, for the console's map."""
    layout: MapLayout = "pca"
    """Two-dimensional layout of the samples for the console's map. pca: the first two principal components. umap:
    neighbouring samples stay close; requires the umap extra, and takes minutes for 50,000 samples. none: no map."""
    clusters: int = Field(10, ge=2, le=64)
    """Number of clusters (k-means) into which the map divides the samples."""
    scaling: ScalingConfig = ScalingConfig()
    """Workers (Ray actors) and their resources; micro_batch is the number of clips per forward pass (default 128)."""
    storage: StorageLocation | None = None
    """Storage root for published encoders: a path or fsspec URL. Default: AMD_STORAGE, else the user's data folder."""
