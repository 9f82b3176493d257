"""What is printed when a training starts."""

import pytest

import deit
from deit.config.recipes import RECIPES, find_recipe
from deit.training.progress_log import _warn_of_enlarged_images


def test_crop_of_the_evaluation_is_printed(capsys):
    config = deit.recipe("digits", loss="none", data={"train_fraction": 0.2})
    deit.dry_run(config)
    assert "evaluation resizes" not in "".join(capsys.readouterr())
    deit.dry_run(config.replace(views={"eval_crop_pct": 0.8}))
    printed = capsys.readouterr()
    assert "; evaluation resizes to 10 px and crops the center\n" in printed.out
    assert "images of 8 px (data.image_size) to 10 px and crops 8 px" in printed.err


@pytest.mark.parametrize("name", RECIPES)
def test_no_recipe_enlarges_stored_images_to_crop_them(name, capsys):
    _warn_of_enlarged_images(find_recipe(name))
    assert capsys.readouterr().err == ""
