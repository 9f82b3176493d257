"""The teachers of a run, live or stored: open, load, combine and check them."""

from collections.abc import Iterable
from functools import partial

from accelerate import Accelerator
from torch import Tensor

from deit.config.input_paths import check_all, check_image_root
from deit.config.schema import EvalSettings
from deit.config.sections.data import DataConfig
from deit.config.sections.loss import LossConfig
from deit.config.sections.teacher import TeacherConfig
from deit.config.teachers import TeacherSlot, teacher_slots
from deit.core.accelerator import in_main_process
from deit.core.console import count_noun, format_percent, info, warn
from deit.core.errors import NotFoundError
from deit.datasets.loader import TrainLoader
from deit.datasets.splits import Splits
from deit.datasets.view_batches import UnmixedViews
from deit.distill.build import build_online_ensemble, build_teacher, teacher_input_size
from deit.distill.losses import needs_logits
from deit.distill.target_content import open_stores
from deit.distill.target_store import TargetStore
from deit.distill.teacher_check import check_teachers
from deit.distill.teacher_ensemble import OnlineTeacher, TeacherEnsemble, TeacherFn, teacher_query
from deit.distill.verify_targets import StoreCheck, verify_store
from deit.models.teacher_sources import resolve_source
from deit.models.teachers import Teacher
from deit.models.weight_files import digest_of


def check_inputs(sources: Iterable[str | None], data: DataConfig) -> None:
    """Check that teachers and images exist. Raises NotFoundError with all that are missing.

    sources: teacher.source of each teacher to check.
    """
    checks = [partial(resolve_source, source) for source in sources if source is not None]
    checks.append(partial(check_image_root, data))
    check_all(checks)


class RunTeachers:
    """The teachers of a configuration; none if its loss has no teacher term.

    `slots`, `stores` and `teachers` have one entry for each slot. A store is None for a live
    teacher; the list of teachers is empty if only their store is available.
    """

    def __init__(self, config: TeacherConfig, loss: LossConfig) -> None:
        """Open the stores. Raises DataError, CheckpointError and ConfigError as `open_stores`."""
        self.config = config
        self.loss = loss
        self.stores: list[TargetStore | None] = open_stores(config, loss)
        self.slots: tuple[TeacherSlot, ...] = teacher_slots(config) if self.stores else ()
        self.teachers: list[list[Teacher]] = []

    @property
    def live_sources(self) -> list[str | None]:
        """The sources of the teachers without a store."""
        return [
            slot.members[0].source for slot, store in zip(self.slots, self.stores) if store is None
        ]

    @property
    def num_stored_epochs(self) -> int | None:
        """The smallest number of epochs in a store; None without stores."""
        return min((store.record_format.epochs for store in self._open), default=None)

    @property
    def digests(self) -> list[str]:
        """Digests of the stores."""
        return [store.digest for store in self._open]

    @property
    def weight_digests(self) -> list[str]:
        """Digests of the teachers' weights for each slot, "" if they are not available."""
        return [digest_of_teachers(teachers) if teachers else "" for teachers in self.teachers]

    @property
    def live(self) -> list[Teacher]:
        """The networks that run in training: those without a store."""
        pairs = zip(self.stores, self.teachers)
        return [teacher for store, teachers in pairs if store is None for teacher in teachers]

    @property
    def class_orders(self) -> list[str]:
        """How the outputs of each loaded teacher were matched to the data's classes."""
        loaded = [teacher for teachers in self.teachers for teacher in teachers]
        return [f"{teacher.description}: {teacher.class_order}" for teacher in loaded]

    @property
    def input_size(self) -> int | None:
        """The side [px] at which the teachers see images; None if any will do."""
        sizes: list[int | None] = []
        for teachers, store in zip(self.teachers, self.stores):
            sizes += [teachers[0].image_size] if store is None else store.input_sizes
        return teacher_input_size(sizes)

    @property
    def _open(self) -> list[TargetStore]:
        return [store for store in self.stores if store is not None]

    def load(self, class_names: tuple[str, ...], image_size: int, accelerator: Accelerator) -> None:
        """Load the networks; one with a store can be missing. Raises as `teacher_from_spec`.

        image_size: side of the student's images [px].
        """
        self.teachers = [
            self._load_slot(slot, store, class_names, image_size, accelerator)
            for slot, store in zip(self.slots, self.stores)
        ]

    def _load_slot(
        self,
        slot: TeacherSlot,
        store: TargetStore | None,
        class_names: tuple[str, ...],
        image_size: int,
        accelerator: Accelerator,
    ) -> list[Teacher]:
        try:
            if store is not None and None in (spec.source for spec in slot.members):
                return []
            return [
                build_teacher(spec, class_names, image_size, accelerator) for spec in slot.members
            ]
        except NotFoundError as error:
            if store is None:
                raise
            warn(f"the teacher is not available, only its stored targets are used: {error}")
            return []

    def ensemble(self, splits: Splits, accelerator: Accelerator) -> TeacherEnsemble | None:
        """Return networks and stores as one call, None without any."""
        if not self.slots:
            return None
        members: list[TeacherFn] = [
            OnlineTeacher(teachers[0], accelerator) if store is None else store
            for teachers, store in zip(self.teachers, self.stores)
        ]
        return TeacherEnsemble(
            members,
            weights=tuple(slot.weight for slot in self.slots),
            mode=self.config.combine,
            temperature=self.loss.temperature,
            needs_logits=needs_logits(self.loss),
            name=splits.train.name,
        )

    def check(
        self,
        splits: Splits,
        accelerator: Accelerator,
        loader: TrainLoader,
        evaluation: EvalSettings,
    ) -> Tensor | None:
        """Verify every store and measure the teachers, then free those that have a store.

        Training checks one view of each epoch against the stores from then on.
        Returns the classes that the ensemble predicts on the validation split, int64 [N]; None if
        some teacher is not available. Raises DataError and CheckpointError.
        """
        for teachers, store in zip(self.teachers, self.stores):
            if store is not None:
                _verify_checksums(store, accelerator)
                checked = self._verify(store, teachers, splits, accelerator, loader)
                _log_store(store, checked, accelerator)
        loaded = [
            (teacher, spec.weight)
            for slot, teachers in zip(self.slots, self.teachers)
            for teacher, spec in zip(teachers, slot.members)
        ]
        predictions = None
        if loaded:
            networks, weights = zip(*loaded)
            predictions = check_teachers(
                list(networks),
                self.config,
                splits,
                accelerator,
                evaluation,
                weights=weights,
                size=loader.sizes.teacher,
            )
        stores = self._open

        def check_views(views: UnmixedViews) -> None:
            for store in stores:
                store.check_once_per_epoch(views)

        loader.on_views = check_views if stores else None
        all_loaded = all(self.teachers)
        self.teachers = [
            teachers if store is None else [] for teachers, store in zip(self.teachers, self.stores)
        ]
        loader.close()  # the workers that decoded the teachers' images only
        return predictions if all_loaded else None

    def _verify(
        self,
        store: TargetStore,
        teachers: list[Teacher],
        splits: Splits,
        accelerator: Accelerator,
        loader: TrainLoader,
    ) -> StoreCheck:
        query = None
        if teachers:
            ensemble = build_online_ensemble(teachers, self.config, splits, accelerator)
            query = teacher_query(loader, ensemble)
        return verify_store(
            store, splits, loader, self.config, teachers=teachers or None, query=query
        )


def _log_store(store: TargetStore, checked: StoreCheck, accelerator: Accelerator) -> None:
    """Log what a store holds and how far it was checked."""
    record_format = store.record_format
    epochs = count_noun(record_format.epochs, "epoch")
    parts = [f"{record_format.content} targets of {epochs}", *store.provenance["teachers"]]
    if checked.num_queried:
        share = format_percent(checked.num_agreed / checked.num_queried)
        parts.append(f"{share} % of {checked.num_queried} recomputed outputs agree")
    else:
        parts.append("outputs not spot-checked: the teacher is not available")
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    if store.inference["precision"] != precision:
        parts.append(f"written in {store.inference['precision']}, this run uses {precision}")
    info(f"targets   {store.path}: {'; '.join(parts)}")


def digest_of_teachers(teachers: list[Teacher]) -> str:
    """Return the SHA-256 over all weights of the teachers, by position and name."""
    return digest_of(
        {
            f"{index}.{name}": value
            for index, teacher in enumerate(teachers)
            for name, value in teacher.state_dict().items()
        }
    )


def _verify_checksums(store: TargetStore, accelerator: Accelerator) -> None:
    """Read the whole store in the main process. Raises CheckpointError in all processes."""

    def verify() -> int:
        store.verify_checksums()
        return 0

    in_main_process(accelerator, verify, f"teacher.target_stores {store.path}")
