"""A model's answers on a whole split, in its order, whatever the number of processes."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from deit.config import Config
from deit.console import progress
from deit.datasets.sources import Images
from deit.datasets.views import evaluation_views
from deit.engine import predict
from deit.records import Outputs


def answers_of(
    accelerator: Accelerator, model: nn.Module, images: Images, config: Config, title: str
) -> Outputs:
    """A model's answers on the evaluation views of a split, on the CPU, float32.

    title: what the progress bar says.
    """
    number = len(images.labels)
    mine = torch.arange(accelerator.process_index, number, accelerator.num_processes)
    chunks = mine.split(config.run.evaluation_batch)

    def batches() -> Iterator[Tensor]:
        for chunk in progress(chunks, total=len(chunks), title=title):
            yield evaluation_views(
                images.pixels[chunk].to(accelerator.device),
                size=config.student.image_size,
                crop=config.views.evaluation_crop,
            )

    return predict(accelerator, model, batches(), number)
