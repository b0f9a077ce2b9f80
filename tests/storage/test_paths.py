from __future__ import annotations

from pathlib import Path

import pytest

from genlora_lightning.storage.paths import is_remote, local_path

REMOTE = ["s3://bucket/run", "memory://a", "gs://b/c.ckpt", Path("s3://bucket/run"), "simplecache::s3://bucket/x"]
LOCAL = ["runs/a", "/runs/a", "a:b", "C:/runs", "./s3:/x", Path("runs") / "a", ""]


@pytest.mark.parametrize("path", REMOTE)
def test_url_of_a_store_is_refused_with_what_was_given(path):
    assert is_remote(path)
    with pytest.raises(ValueError, match=r"The adapter folder '.*' is a URL, and must be a local path"):
        local_path(path, "adapter folder")


@pytest.mark.parametrize("path", LOCAL)
def test_local_path_stays_what_it_is(path):
    assert not is_remote(path)
    assert local_path(path, "adapter folder") == Path(path)


@pytest.mark.parametrize("url", ["file:///tmp/run", "file:/tmp/run", "local:///tmp/run", Path("file:///tmp/run")])
def test_url_of_a_local_file_is_the_path(url):
    assert local_path(url, "checkpoint") == Path("/tmp/run")
