"""What only a GPU can show: the same keys, half precision, a run like the CPU's."""

import pytest
import torch

from deit.config import derive
from deit.keys import Keys, beta, words
from deit.recipes import digits_teacher
from deit.run import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_keys_give_the_same_words_on_the_gpu():
    samples = torch.arange(100_000)
    here, there = Keys(3, 1, samples), Keys(3, 1, samples.cuda())
    assert torch.equal(words(here, "crop", 9), words(there, "crop", 9).cpu())
    assert torch.allclose(beta(here, "mix", 0.8), beta(there, "mix", 0.8).cpu(), atol=1e-12)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_learns_in_every_precision(tmp_path, precision):
    config = derive(digits_teacher(), run={"device": "cuda", "precision": precision})
    state = train(config, tmp_path / precision)
    assert state["best"]["top1"] > 0.97
