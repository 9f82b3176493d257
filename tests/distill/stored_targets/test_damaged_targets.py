"""Target stores with damaged, foreign or missing shards are refused by name."""

import shutil

import numpy as np
import pytest

from deit.core.errors import CheckpointError, DataError
from deit.distill.target_content import open_stores
from deit.distill.target_shards import ShardedTargetWriter
from deit.distill.target_store import CHECKS, MANIFEST, SHARDS, TARGETS, open_store, read_manifest
from deit.distill.verify_targets import verify_targets
from deit.distill.write_targets import write_targets
from deit.training.train import train
from tests.helpers.errors import raises
from tests.helpers.process_setup import LEAST_ROWS
from tests.helpers.target_stores import (
    EPOCHS,
    ROWS_PER_EPOCH,
    assert_names_shard,
    check,
    configuration,
    copied,
    flip_bit,
    numbers_in,
    stores_with,
    with_targets,
)

pytest.importorskip("sklearn")


@pytest.mark.fault("D7")
def test_damaged_shard_is_refused_and_leaves_the_store_incomplete(teachers, tmp_path):
    out = tmp_path / "store"
    write_targets(configuration(teachers[0]), out, part=(0, 3))
    shard = next((out / SHARDS).glob("[0-9]*.bin"))
    damaged = bytearray(shard.read_bytes())
    damaged[500] ^= 1
    shard.write_bytes(damaged)
    for part in (1, 2):
        if part == 2:
            with raises(CheckpointError, shard):
                write_targets(configuration(teachers[0]), out, part=(part, 3))
        else:
            write_targets(configuration(teachers[0]), out, part=(part, 3))
    shard.unlink()
    write_targets(configuration(teachers[0]), out)
    assert open_store(out).record_format.num_shards == 3


def test_shard_of_another_store_is_refused(teachers, tmp_path):
    for index, seed in enumerate((0, 3)):
        config = configuration(teachers[0], views={"seed": seed})
        write_targets(config, tmp_path / str(index), part=(0, 3))
    first_shard, second_shard = (tmp_path / str(n) / SHARDS / "000000.bin" for n in (0, 1))
    shutil.copy(first_shard, second_shard)
    first_writer, second_writer = (
        ShardedTargetWriter(tmp_path / n, read_manifest(tmp_path / n)) for n in ("0", "1")
    )
    first_writer.read(0)  # its own shard
    with raises(
        CheckpointError,
        second_shard,
        first_writer.digest.hex()[:12],
        second_writer.digest.hex()[:12],
    ):
        second_writer.read(0)


# ---- verified by the command and before training


@pytest.mark.fault("D7")
@pytest.mark.parametrize("offset", [0, 1024, 2267])
def test_verify_targets_finds_one_flipped_bit(offset, store, tmp_path):
    copy = copied(store, tmp_path)
    flip_bit(copy / TARGETS, offset)
    with raises(CheckpointError, copy / TARGETS) as refused:
        verify_targets(copy, root=None, teacher="none", num_queries=16)
    assert_names_shard(refused, offset // LEAST_ROWS, copy)


@pytest.mark.fault("D7")
@pytest.mark.parametrize("name", [TARGETS, CHECKS])
def test_truncated_store_file_is_refused_on_opening(name, store, tmp_path):
    copy = copied(store, tmp_path)
    (copy / name).write_bytes((copy / name).read_bytes()[:-1])
    with raises(CheckpointError, name):
        open_store(copy)


@pytest.mark.fault("D7")
def test_incomplete_store_is_refused_with_its_progress(teachers, tmp_path):
    write_targets(configuration(teachers[0]), tmp_path / "part", part=(1, 3))
    config = with_targets(configuration(teachers[0]), tmp_path / "part")
    with raises(DataError, f"teacher.target_stores {tmp_path / 'part'}") as refused:
        open_stores(config.teacher, config.loss)
    assert numbers_in(str(refused.value), tmp_path) == ["1", "3"]
    with raises(DataError, f"teacher.target_stores {tmp_path / 'none'}", MANIFEST):
        stores_with(config, tmp_path / "none")


def test_verify_targets_of_a_valid_store_logs_every_check(store, capsys):
    verify_targets(store, root=None, teacher=None, num_queries=128)
    checksum_line, views_line, outputs_line = capsys.readouterr().out.splitlines()
    assert (numbers_in(checksum_line), "hard" in checksum_line) == (["3", "2268"], True)
    assert numbers_in(views_line) == ["4", str(EPOCHS)]
    # 32 outputs at 3 checksums; the last checked row is 4 rows before the end.
    assert numbers_in(outputs_line) == ["100.0", "100"]


@pytest.mark.fault("D7")
@pytest.mark.parametrize("offset", [3, 2250])
def test_training_verifies_checksums_before_the_first_step(offset, store, teachers, tmp_path):
    copy = copied(store, tmp_path)
    flip_bit(copy / TARGETS, offset)
    config = configuration(teachers[0]).replace(teacher={"source": ()})
    with raises(CheckpointError, copy / TARGETS) as refused:
        train(with_targets(config, copy), tmp_path / "run")
    assert_names_shard(refused, offset // LEAST_ROWS, copy)
    assert not (tmp_path / "run").exists()


def test_store_reader_maps_one_epoch_at_a_time(store, teachers):
    """Memory does not grow with the number of epochs."""
    _, ensemble, _ = check(with_targets(configuration(teachers[0]), store))
    (reader,) = ensemble.teachers
    content = (store / TARGETS).read_bytes()
    for epoch in (0, 6, 2):
        records = reader.records(epoch)
        assert isinstance(records, np.memmap)
        assert records.tobytes() == content[epoch * ROWS_PER_EPOCH : (epoch + 1) * ROWS_PER_EPOCH]
