"""Bulk embedding: all of a data set through a published encoder."""

from __future__ import annotations

from pydantic import Field

from amd.config.sections import DataConfig, ScalingConfig, Section


class EmbedConfig(Section):
    """A data set to embed as the encoder's card says, into Parquet files."""

    encoder: str = Field(min_length=1)
    """A published encoder: id, folder or URL."""
    data: DataConfig
    output: str | None = None
    """A folder or URL for the files; none: `<storage>/embeddings/<encoder>/<digest of the data>`. A job's is its own,
    `<storage>/jobs/<job>/output`."""
    normalize: bool = False
    """Vectors of length 1."""
    rows_per_file: int = Field(4096, ge=1, le=2**17)
    """Samples a file, which are also what a worker takes at once, and what an interruption may cost it."""
    scaling: ScalingConfig = ScalingConfig()
    """workers: Ray actors that embed; micro_batch: clips at once, none: 128."""
    storage: str | None = None
    """Root of encoder ids, any fsspec URL; none: AMD_STORAGE, else the user's data folder."""
