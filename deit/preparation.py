"""From a configuration and its images to the teacher and the loader of training views."""

from accelerate import Accelerator

from deit.config import Config
from deit.datasets.images import Encoded, Images
from deit.datasets.loader import Sizes, TrainLoader, view_sizes
from deit.datasets.reading import worker_count
from deit.datasets.splits import Splits
from deit.datasets.views import Colours
from deit.models.saved import Facts
from deit.models.teachers import Teacher, load_teacher


def facts_of(config: Config, splits: Splits) -> Facts:
    """What a trained network must remember of its data."""
    return Facts(
        student=config.student,
        class_names=splits.class_names,
        mean=config.views.mean or splits.mean,
        std=config.views.std or splits.std,
        evaluation_crop=config.views.evaluation_crop,
    )


def teacher_of(config: Config, splits: Splits, accelerator: Accelerator) -> Teacher | None:
    """The teacher on its device, None if the objective has none. Raises as load_teacher does."""
    if config.loss.kind == "none":
        return None
    size = config.student.image_size
    return load_teacher(config.teacher, splits.class_names, image_size=size).to(accelerator.device)


def sizes_of(config: Config, images: Images | Encoded, teacher: Teacher | None) -> Sizes:
    """What the networks are shown of these images, in training as in evaluation."""
    on_disk = isinstance(images, Encoded) and config.views.crop == "random_resized"
    return view_sizes(
        config.student.image_size,
        None if teacher is None else teacher.image_size,
        None if on_disk else config.data.image_size,
    )


def loader_of(
    config: Config, splits: Splits, teacher: Teacher | None, accelerator: Accelerator
) -> TrainLoader:
    """This process's training views. Raises ConfigError and DataError as TrainLoader does."""
    facts, images = facts_of(config, splits), splits.train
    return TrainLoader(
        images,
        len(splits.class_names),
        views=config.views,
        optim=config.optim,
        sizes=sizes_of(config, images, teacher),
        colours=Colours(facts.mean, facts.std),
        seed=config.run.seed,
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
        device=accelerator.device,
        workers=worker_count(config.data),
        square=config.data.image_size,
    )
