"""The teachers of a run: networks and stores, brought together, checked, and heard as one panel."""

import dataclasses
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from torch import Tensor

from deit.config.schema import Config, TeacherConfig
from deit.config.teachers import TeacherSlot, teacher_slots
from deit.core.accelerator import in_main_process
from deit.core.console import count_noun, format_percent, info, warn
from deit.core.errors import NotFoundError
from deit.datasets.listing import check_root
from deit.datasets.loader import TeacherInput, TrainLoader
from deit.datasets.splits import Splits
from deit.distill.build import (
    build_online_ensemble,
    build_teacher,
    build_teacher_ensemble,
    build_train_loader,
    teacher_input_size,
)
from deit.distill.target_checks import (
    StoreCheck,
    open_stores,
    stored_epochs,
    teacher_query,
    verify_store,
)
from deit.distill.target_store import TargetStore
from deit.distill.teacher_check import check_teachers
from deit.distill.teacher_ensemble import OnlineTeacher, TeacherEnsemble, TeacherFn
from deit.models.teacher_sources import resolve_source
from deit.models.teachers import Teacher
from deit.models.weight_files import digest_of


def check_inputs(teachers: Iterable[str], config: Config) -> None:
    """Refuse teachers and images that are not there, all in one message. Raises NotFoundError."""
    checks = [partial(resolve_source, source) for source in teachers]
    if (layout := _LAYOUTS.get(config.data.source)) is not None:
        checks.append(partial(check_root, Path(config.data.root), layout))
    problems = []
    for check in checks:
        try:
            check()
        except NotFoundError as error:
            problems.append(str(error))
    if problems:
        raise NotFoundError("\n  ".join(problems))


_LAYOUTS = {"folder": "CLASS/IMAGE", "shards": "*.tar"}


class RunTeachers:
    """The teachers of a configuration; empty where its objective has none.

    seats, stores and teachers go side by side: a store is None for a teacher that answers itself;
    teachers are empty where only the store is here.
    """

    def __init__(self, config: Config) -> None:
        """Open the stores and find the teachers, before any image is read. Raises DataError,
        CheckpointError and ConfigError where one of them is not what it should be."""
        self.config = config
        self.stores: list[TargetStore | None] = open_stores(config)
        self.seats: tuple[TeacherSlot, ...] = teacher_slots(config.teacher) if self.stores else ()
        self.teachers: list[list[Teacher]] = []
        pairs = zip(self.seats, self.stores)
        check_inputs([seat.members[0].source for seat, store in pairs if store is None], config)

    @property
    def num_stored_epochs(self) -> int | None:
        """How many epochs of views have answers; None where that sets no limit."""
        return stored_epochs(self.config, self.stores)

    @property
    def digests(self) -> list[str]:
        """Of the stores: a resumed run goes on with the same."""
        return [store.digest for store in self.stores if store is not None]

    @property
    def weight_digests(self) -> list[str]:
        """Digests of the teachers of each seat, "" where none of them is here."""
        return [digest_of_teachers(teachers) if teachers else "" for teachers in self.teachers]

    @property
    def answering(self) -> list[Teacher]:
        """The networks that answer in training: those without a store."""
        some = zip(self.stores, self.teachers)
        return [one for store, teachers in some if store is None for one in teachers]

    @property
    def class_orders(self) -> list[str]:
        """How the answers of each teacher that is here were matched to the data's classes."""
        return [f"{one.description}: {one.class_order}" for some in self.teachers for one in some]

    def load(
        self, splits: Splits, accelerator: Accelerator
    ) -> tuple[TrainLoader, TeacherEnsemble | None]:
        """Load the networks; the views they and the student see, and what they say of them."""
        self.teachers = [
            self._load_slot(seat, store, splits, accelerator)
            for seat, store in zip(self.seats, self.stores)
        ]
        sizes: list[int | None] = []
        voices: list[TeacherFn] = []
        for teachers, store in zip(self.teachers, self.stores):
            sizes += store.input_sizes if store is not None else [teachers[0].image_size]
            voices.append(store if store is not None else OnlineTeacher(teachers[0], accelerator))
        loader = build_train_loader(
            self.config,
            splits,
            accelerator,
            teacher_size=teacher_input_size(sizes),
            for_teacher=None in self.stores,
        )
        weights = tuple(seat.weight for seat in self.seats)
        return loader, build_teacher_ensemble(self.config, splits, voices, weights=weights)

    def _load_slot(
        self, seat: TeacherSlot, store: TargetStore | None, splits: Splits, accelerator: Accelerator
    ) -> list[Teacher]:
        """The networks of a seat. Beside a store they need not be here: its answers speak."""
        try:
            if store is not None and None in (one.source for one in seat.members):
                return []
            teachers = [
                build_teacher(one, self.config, splits, accelerator) for one in seat.members
            ]
        except NotFoundError as error:
            if store is None:
                raise
            warn(f"beside its stored targets, the teacher is left out: {error}")
            return []
        return teachers

    def check(self, splits: Splits, accelerator: Accelerator, loader: TrainLoader) -> Tensor | None:
        """Hold every store against data, views and teacher, and measure the teachers; afterwards
        those with a store are let go, to free their memory.

        Returns what they answer on the validation split together, int64 [number]; None unless all
        of them are here. Raises DataError and CheckpointError.
        """
        for seat, teachers, store in zip(self.seats, self.teachers, self.stores):
            if store is not None:
                _check_sums(store, accelerator)
                self._check_store(seat, teachers, store, splits, accelerator, loader)
        here = [
            (teacher, one.weight)
            for seat, teachers in zip(self.seats, self.teachers)
            for teacher, one in zip(teachers, seat.members)
        ]
        answers = None
        if here:
            networks, weights = zip(*here)
            size = loader.sizes.teacher
            answers = check_teachers(
                self.config, splits, accelerator, list(networks), weights=weights, size=size
            )
        stores = [store for store in self.stores if store is not None]

        def watch(shown: TeacherInput) -> None:
            for store in stores:
                store.check_batch(shown)

        loader.on_teacher_input = watch if stores else None
        everyone = all(self.teachers)
        self.teachers = [
            teachers if store is None else [] for teachers, store in zip(self.teachers, self.stores)
        ]
        loader.close()  # workers: those that read what only the teachers look at
        return answers if everyone else None

    def _check_store(
        self,
        seat: TeacherSlot,
        teachers: list[Teacher],
        store: TargetStore,
        splits: Splits,
        accelerator: Accelerator,
        loader: TrainLoader,
    ) -> None:
        config = self.config
        if len(seat.members) < len(config.teacher.source):
            # One of several: what its store holds is what it says by itself.
            source = tuple(one.source for one in seat.members if one.source is not None)
            config = dataclasses.replace(config, teacher=TeacherConfig(source=source))
        answer = None
        if teachers:
            answer = teacher_query(
                config, loader, build_online_ensemble(config, splits, teachers, accelerator)
            )
        checked = verify_store(
            store, config, splits, loader, teachers=teachers or None, answer=answer
        )
        self._announce(store, checked, accelerator)

    def _announce(self, store: TargetStore, checked: StoreCheck, accelerator: Accelerator) -> None:
        layout = store.layout
        epochs = count_noun(layout.epochs, "epoch")
        said = [f"{layout.content} answers of {epochs}", *store.provenance["teachers"]]
        if checked.num_queried:
            share = format_percent(checked.num_agreed / checked.num_queried)
            said.append(f"{share} % of {checked.num_queried} asked anew are as stored")
        else:
            said.append("taken on trust, for the teacher itself is not here")
        precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
        if store.query["precision"] != precision:
            said.append(f"asked in {store.query['precision']}, this run is in {precision}")
        info(f"targets   {store.path}: {'; '.join(said)}")
        trained, limit = self.config.optim.epochs, self.num_stored_epochs
        if limit is not None and layout.epochs == limit < trained:
            info(
                f"targets   {trained} epochs are trained on the views of {limit}, over and over: "
                "an approximation, for each view comes back"
            )


def digest_of_teachers(teachers: list[Teacher]) -> str:
    """SHA-256 over all their weights, by place and name."""
    return digest_of(
        {
            f"{place}.{name}": value
            for place, teacher in enumerate(teachers)
            for name, value in teacher.state_dict().items()
        }
    )


def _check_sums(store: TargetStore, accelerator: Accelerator) -> None:
    """Read the store whole, in one process; all go on together, or none. Raises CheckpointError."""

    def check() -> int:
        store.verify_checksums()
        return 0

    in_main_process(accelerator, check, f"teacher.target_stores {store.path}")
