"""Decoding process that reads `remote:///folder/file` through tests/support/data/remote_folder.py."""

from __future__ import annotations

from amd.data.decoding import worker
from amd.data.decoding.isolation import DecodingChild
from amd.data.decoding.reader import SampleReader
from tests.support.data import remote_folder


class RemoteChild(DecodingChild):
    module = "tests.support.data.remote_decoder"


class RemoteReader(SampleReader):
    child = RemoteChild


if __name__ == "__main__":
    remote_folder.register()
    worker.main()
