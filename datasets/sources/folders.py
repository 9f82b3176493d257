"""List images in class folders."""

import os
from pathlib import Path

from deit.config.input_paths import check_root
from deit.config.sections.data import DataConfig
from deit.core.errors import DataError
from deit.datasets.sources.image_stores import FolderStore
from deit.datasets.sources.listing import (
    Folder,
    Listing,
    OnProblem,
    SkippedFiles,
    SplitListing,
    build_listing,
    check_classes,
    find_images,
    is_image,
    raise_problem,
    scan_folder,
    skipped_note,
    split_folders,
    suffix_of,
)


def list_folder(
    config: DataConfig, classes: tuple[str, ...], on_problem: OnProblem = raise_problem
) -> Listing:
    """List images in class folders: ROOT/train/CLASS/*, or ROOT/CLASS/* without splits.

    Validation and test splits are optional. Without a test split, the validation split is the test
    split, as is usual for ImageNet, and model selection uses a part of `train`. Classes are sorted
    by name in code point order. Hidden files and folders are ignored, links are followed, other
    files are counted.

    classes: names to use; empty for all. Calls `on_problem` for an empty class and for classes
    that differ between the splits. Raises NotFoundError if the root is missing, DataError if it
    has no class folders or a class is unknown.
    """
    root = Path(config.root)
    check_root(root)
    skipped = SkippedFiles()
    folders = {
        split: (folder.path, _class_folders(folder, root, skipped, on_problem))
        for split, folder in split_folders(root, skipped, on_problem).items()
    }
    names = tuple(folders["train"][1])
    check_classes(classes, names)
    selected = set(classes or names)
    class_names = tuple(name for name in names if name in selected)
    splits = {}
    for split, (folder, class_folders) in folders.items():
        for name in class_names:
            if name not in class_folders:
                on_problem(f"{folder}: no folder for class {name!r}, which other splits have")
        for name in class_folders:
            if name not in names and not classes:
                on_problem(f"{folder / name}: this class has no training images")
        images: list[str] = []
        for name, class_folder in class_folders.items():
            others = SkippedFiles(paths=skipped.paths)
            members = find_images(class_folder, others, on_problem)
            if not members and name in class_names:
                note = skipped_note(others)
                on_problem(f"{class_folder.path}: no images in this class folder{note}")
            images += [f"{name}/{path}" for path in members]
            skipped.files.update(others.files)
        splits[split] = SplitListing(folder, [path.split("/")[0] for path in images], images)
    paths = [
        os.path.relpath(folder / path, root)
        for (folder, _), split in zip(folders.values(), splits.values())
        for path in split.image_names
    ]
    return build_listing(FolderStore(root, paths), splits, class_names, skipped)


def _class_folders(
    folder: Folder, root: Path, skipped: SkippedFiles, on_problem: OnProblem
) -> dict[str, Folder]:
    """Return the folders of the classes by name, in a split or in the root without splits.

    Raises DataError if there are none.
    """
    classes, files = scan_folder(folder, skipped, on_problem)
    if not classes:
        is_root = folder.path == root
        advice = f", or {root}/train/CLASS/IMAGE with splits" if is_root else ""
        if any(suffix_of(name) == ".tar" for name in files):
            advice += "; for tar shards use --data.source shards"
        elif any(map(is_image, files)):
            advice += (
                "; use unlabeled images with `deit predict`; if "
                f"{folder.path.name!r} is a class, move all classes into a folder `train`"
            )
        raise DataError(
            f"{folder.path}: no class folders; expected {folder.path}/CLASS/IMAGE{advice}"
        )
    outside = [name for name in files if is_image(name)]
    if outside:
        skipped.paths.append(
            f"{len(outside)} images outside the class folders ({folder.path / outside[0]})"
        )
    for name in files:
        if not is_image(name):
            skipped.add(name)
    return classes
