"""Inputs of fuzz cases: images, runs, target stores, sweeps; and valid commands over them."""

import io
import random
import shutil
import tarfile
from pathlib import Path

from tests.helpers.command_server import CommandServer

_DATA = "--data.root pics --data.image_size 8"
_TINY = (
    f"{_DATA} --student.image_size 8 --optim.epochs 1 --optim.warmup_epochs 0 "
    "--optim.batch_size 8 --run.linear_backend torch"
)
_STUDENT = (
    "--student.name deit_micro --student.patch_size 4 --student.embed_dim 16 --student.depth 1 "
    "--student.num_heads 2 --student.drop_path 0 --teacher.source teacher "
    "--teacher.allow_near_chance"
)
_RUN = f"folder {_TINY} {_STUDENT}"
_FILES = {
    "classes.txt": "ant\nbee\n",
    "exclude.txt": "train/ant/0.png\ntrain/bee/1.png\n",
    "recipe.py": "from deit.config.recipes import find_recipe\n\n\n"
    "def mine():\n    return find_recipe('digits')\n",
    "sweep.yaml": "recipe: folder\nset:\n  data: {root: pics, image_size: 8}\n  student: "
    "{image_size: 8, name: deit_micro, patch_size: 4, embed_dim: 16, num_heads: 2, depth: 1, "
    "drop_path: 0}\n"
    "  optim: {epochs: 1, warmup_epochs: 0, batch_size: 8}\n  run.linear_backend: torch\n"
    "  teacher: {source: teacher, allow_near_chance: true}\n"
    "grid:\n  optim.lr: [0.001, 0.002]\nseeds: [0]\n",
    "search.yaml": "recipe: folder\nset:\n  data: {root: pics, image_size: 8}\n  student: "
    "{image_size: 8, name: small_convnet, drop_path: 0}\n  loss: none\n  optim: {epochs: 1, "
    "warmup_epochs: 0, batch_size: 8}\nsearch:\n  fields:\n    optim.lr: {low: 0.001, high: 0.01, "
    "log: true}\n    optim.epochs: [1, 2]\n  trials: 2\n",
    "empty.txt": "",
    "notes.txt": "one line\nand another\n",
}
_FOLDER_COMMANDS = {
    "teacher": f"train folder-teacher {_TINY} --student.name small_convnet --student.drop_path 0",
    "run": f"train {_RUN}",
    "begun": f"train {_RUN} --optim.epochs 3 --run.save_every_steps 1",
    "store": f"targets write {_RUN}",
    "swept": "sweep sweep.yaml --parallel 2",
    "ticketed": f"lottery {_RUN} --loss none --student.name vit_micro --teacher.source none "
    "--rounds 1 --controls none --rewind-epoch 0 --parallel 2",
}
"""Folders and the commands that make them, each from the folders before it."""
_FAULTS = {"begun": "step:5:term"}


def make_inputs(command_server: CommandServer, folder: Path) -> None:
    """Fill a folder with all inputs: images, runs, a target store, a sweep, files."""
    import torch  # only for its tensors
    from PIL import Image

    draw = random.Random(0)
    for split, images_per_class in (("train", 8), ("val", 2), ("test", 3)):
        for label, level in (("ant", 200), ("bee", 110), ("cat", 20)):
            class_folder = folder / "pics" / split / label
            class_folder.mkdir(parents=True)
            for index in range(images_per_class):
                gray = level + draw.randint(-19, 19)
                Image.new("RGB", (10, 10), (gray, 255 - gray, 9 * index)).save(
                    class_folder / f"{index}.png"
                )
        _write_shard(folder / "pics" / split, folder / "shards" / split / "0.tar")
    for name, text in _FILES.items():
        (folder / name).write_text(text)
    for name, arguments in _FOLDER_COMMANDS.items():
        fault = {"DEIT_FAULT": _FAULTS[name]} if name in _FAULTS else {}
        done = command_server.run(*arguments.split(), "--out", name, cwd=folder, **fault)
        assert done.code == (143 if fault else 0), f"{name}: {done.err}"
    shutil.copy(folder / "run" / "best" / "model.safetensors", folder / "weights.safetensors")
    shutil.copy(folder / "run" / "config.json", folder / "config.json")
    torch.save({"model": {"head.weight": torch.zeros(3, 16)}, "epoch": 3}, folder / "weights.pth")


def _write_shard(image_folder: Path, shard: Path) -> None:
    """Write class folders as a tar file of images and class names."""
    shard.parent.mkdir(parents=True)
    with tarfile.open(shard, "w") as tar:
        for path in sorted(image_folder.glob("*/*.png")):
            key = f"{path.parent.name}-{path.stem}"
            label = path.parent.name.encode()
            tar.add(path, f"{key}.png")
            member = tarfile.TarInfo(f"{key}.cls")
            member.size = len(label)
            tar.addfile(member, io.BytesIO(label))


def input_names() -> list[str]:
    """Return the names of the files and folders that `make_inputs` makes."""
    more = ["pics", "shards", "weights.safetensors", "weights.pth", "config.json"]
    return sorted([*_FILES, *_FOLDER_COMMANDS, *more])


BASES = {
    "train": (
        f"{_RUN} --out new",
        f"{_RUN} --dry-run",
        f"{_RUN} --optim.epochs 3 --run.save_every_steps 1 --out begun --resume",
        "config.json --out new",
        "run/config.json --print-config",
        "recipe.py:mine --print-config",
        f"{_RUN} --out new --data.exclude_list exclude.txt --data.classes @classes.txt",
        f"{_RUN} --out new --teacher.target_stores store",
        f"{_RUN} --out new --data.source shards --data.root shards",
        f"{_RUN} --out new --data.source reader --data.reader folder --data.storage files",
    ),
    "finetune": (
        f"--from run {_DATA} --optim.batch_size 8 --out new",
        f"folder {_TINY} --from weights.safetensors --loss none --teacher.source none --out new",
        f"folder {_TINY} --from weights.pth --dry-run",
        f"--from run {_DATA} --resolution 12 --dry-run",
        f"folder --schedule bit {_TINY} --from run --dry-run",
    ),
    "evaluate": (
        "run",
        "run --json out.json --teacher none",
        "run teacher --resolution 8,12 --plot out.png",
        "run --merge-tokens 0,1 --json out.json",
        "run --split validation --checkpoint last --teacher teacher",
    ),
    "predict": (
        "run pics/test/ant/0.png",
        "run pics/test --attention out.png --json out.json --teacher run",
        "teacher pics/test/bee pics/test/cat/1.png --top-k 2",
    ),
    "export": (
        "run --format timm --images 4",
        "run --format pt2 --images 4 --out new",
        "run --format onnx --images 4",
        "run --format transformers --images 4 --out new",
    ),
    "compare": (f"{_RUN} --out new --print-config", f"{_RUN} --arms undistilled --out new"),
    "sweep": ("sweep.yaml --dry-run", "search.yaml --dry-run", "sweep.yaml --out swept"),
    "quantize": ("run --calibration-images 4", "run --method dynamic --out new --json out.json"),
    "prune": ("run --ratio 0.5 --images 8 --dry-run", "run --ratio 0.5 --images 8 --out new"),
    "lottery": (
        f"{_FOLDER_COMMANDS['ticketed'].removeprefix('lottery ')} --out ticketed",
        f"{_RUN} --rounds 1 --dry-run",
    ),
    "loss-landscape": (
        "run --measure lines --images 4 --points 3 --out new",
        "run teacher --images 4 --points 3 --grid 3 --num-eigenvalues 1 --steps 2 --probes 1 "
        "--rays 1 "
        "--out new",
        "ticketed --measure lines --images 4 --points 3 --out new",
    ),
    "variants": ("run", "run teacher --merge-tokens 1 --json out.json"),
    "report": ("run --out new", "run --out new --force", "swept --out new"),
    "check-data": (
        "pics",
        "pics --write-exclude-list out.txt --json out.json --exclude-list exclude.txt",
        "shards --source shards --json out.json",
    ),
    "show-views": (
        f"{_RUN} --num-views 2 --out out.png",
        f"{_RUN} --epoch 3 --num-views 2 --out out.png",
    ),
    "targets write": (
        f"{_RUN} --out new",
        f"{_RUN} --out new --epochs 1 --content top-2 --part 0/2",
        f"{_RUN} --out store",
    ),
    "targets verify": ("store", "store --data.root pics --teacher teacher --num-queries 4"),
    "profile": (f"{_RUN} --steps 1", f"{_RUN} --steps 2 --trace out.json --json out2.json"),
    "recipes": ("",),
    "": ("", "--help", "--version"),
}
"""Valid arguments of every command, over the inputs."""
