"""Image files shared by several test files."""

import pytest

from deit.datasets.images import EncodedImages
from tests.helpers.images import images_at, write_image_folder


@pytest.fixture(scope="module")
def files_root(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def file_images(files_root):
    result = images_at(files_root)
    assert isinstance(result, EncodedImages)
    assert len(result.labels) == 39
    return result
