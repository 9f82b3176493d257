"""Images in files that several test files read."""

import pytest

from deit.datasets.images import EncodedImages
from tests.helpers.images import images_at, write_image_folder


@pytest.fixture(scope="module")
def files_root(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def file_images(files_root):
    found = images_at(files_root)
    assert isinstance(found, EncodedImages)
    assert len(found.labels) == 39
    return found
