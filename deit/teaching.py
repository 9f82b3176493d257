"""The teachers of a run: networks and stores, brought together, checked, and heard as one panel."""

import dataclasses

from accelerate import Accelerator
from torch import Tensor

from deit.config import Config, Member, TeacherConfig, members
from deit.console import percent, say
from deit.datasets.loader import TrainLoader
from deit.datasets.splits import Splits
from deit.errors import DataError
from deit.models.teachers import Teacher, locate
from deit.panel import NetworkVoice, Panel, Voice
from deit.preflight import measure
from deit.preparation import loader_of, panel_of, teacher_input, teacher_of
from deit.stored import answer_to, check_store, open_stores, stored_epochs
from deit.targets import Store


class Faculty:
    """The teachers of a configuration; empty where its objective has none.

    members, stores and teachers go side by side: a store is None for a teacher that answers
    itself, a teacher None for one of which only the store is here.
    """

    def __init__(self, config: Config) -> None:
        """Open the stores and find the teachers, before any image is read. Raises DataError,
        CheckpointError and ConfigError where one of them is not what it should be."""
        self.config = config
        self.stores: list[Store | None] = open_stores(config)
        self.members: tuple[Member, ...] = members(config.teacher) if self.stores else ()
        self.teachers: list[Teacher | None] = []
        for member, store in zip(self.members, self.stores):
            if store is None:
                locate(member.source)

    @property
    def stored_epochs(self) -> int | None:
        """How many epochs of views have answers; None where that sets no limit."""
        return stored_epochs(self.config, self.stores)

    def load(self, splits: Splits, accelerator: Accelerator) -> tuple[TrainLoader, Panel | None]:
        """Load the networks; the views they and the student see, and what they say of them."""
        self.teachers = [
            teacher_of(member, self.config, splits, accelerator)
            if store is None or _is_there(member)
            else None
            for member, store in zip(self.members, self.stores)
        ]
        sizes: list[int | None] = []
        voices: list[Voice] = []
        for teacher, store in zip(self.teachers, self.stores):
            sizes += [teacher.image_size] if store is None else store.input_sizes
            voices.append(NetworkVoice(teacher, accelerator) if store is None else store)
        loader = loader_of(
            self.config,
            splits,
            accelerator,
            teacher_size=teacher_input(sizes),
            for_teacher=None in self.stores,
        )
        return loader, panel_of(self.config, splits, voices)

    def check(self, splits: Splits, accelerator: Accelerator, loader: TrainLoader) -> Tensor | None:
        """Hold every store against data, views and teacher, and measure the teachers; afterwards
        those with a store are let go, to free their memory.

        Returns what they answer on the validation split together, int64 [number]; None unless all
        of them are here. Raises DataError and CheckpointError.
        """
        for number, store in enumerate(self.stores):
            if store is not None:
                self._check_store(number, store, splits, accelerator, loader)
        here = [
            (teacher, member.weight)
            for teacher, member in zip(self.teachers, self.members)
            if teacher is not None
        ]
        answers = None
        if here:
            teachers, weights = zip(*here)
            size = loader.sizes.teacher
            answers = measure(
                self.config, splits, accelerator, list(teachers), weights=weights, size=size
            )
        watching = [store for store in self.stores if store is not None]
        if watching:
            loader.watch = watching[0].watch
        self.teachers = [
            teacher if store is None else None for teacher, store in zip(self.teachers, self.stores)
        ]
        loader.release_workers()  # those that read what only the teachers look at
        return answers if len(here) == len(self.members) else None

    def _check_store(
        self,
        number: int,
        store: Store,
        splits: Splits,
        accelerator: Accelerator,
        loader: TrainLoader,
    ) -> None:
        teacher, member = self.teachers[number], self.members[number]
        answer = None
        if teacher is not None:
            # Alone: what its store holds is what it says by itself.
            one = TeacherConfig(source=(member.source,))
            alone = dataclasses.replace(self.config, teacher=one)
            voices: list[Voice] = [NetworkVoice(teacher, accelerator)]
            answer = answer_to(self.config, loader, panel_of(alone, splits, voices, whole=True))
        agreed = check_store(
            store,
            self.config,
            splits,
            loader,
            teachers=None if teacher is None else [teacher],
            answer=answer,
        )
        self._announce(store, member, agreed)

    def _announce(self, store: Store, member: Member, agreed: float | None) -> None:
        layout = store.layout
        epochs = f"{layout.epochs} epoch{'s' * (layout.epochs > 1)}"
        said = [f"{layout.records} answers of {epochs}", *store.about["teachers"]]
        if agreed is None:
            found = f"{member.source} is not here" if member.source else "no teacher.source given"
            said.append(f"taken on trust ({found})")
        else:
            said.append(f"{percent(agreed)} % of those looked at are the teacher's now")
        say(f"targets   {store.path}: {'; '.join(said)}")
        trained = self.config.optim.epochs
        limit = self.stored_epochs
        if limit is not None and layout.epochs == limit < trained:
            say(
                f"targets   {trained} epochs are trained on the views of {limit}, over and over: "
                "an approximation, for each view comes back"
            )


def _is_there(member: Member) -> bool:
    """Whether the teacher itself is here, beside its store."""
    if member.source is None:
        return False
    try:
        locate(member.source)
    except DataError:
        return False
    return True
