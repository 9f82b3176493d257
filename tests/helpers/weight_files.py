"""Weights, and small networks that load them."""

import torch

from deit.config.sections.init import InitConfig
from deit.config.sections.student import StudentConfig
from deit.models.adapt_weights import LoadedWeights, adapt_weights
from deit.models.registry import create_network
from deit.models.weight_files import load_weights

KEEP = InitConfig(weights="here")
NAMES = tuple("abcde")


def section(name="deit_micro", **fields):
    return StudentConfig(name=name, **{"depth": 1, "image_size": 16, **fields})


def network(name="deit_micro", classes=5, seed=0, **fields):
    torch.manual_seed(seed)
    built = create_network(section(name, **fields), classes)
    for parameter in built.parameters():  # some, such as the biases of the heads, are zero at first
        torch.nn.init.normal_(parameter, std=0.1)
    return built.eval()


def loaded_weights(built, names=NAMES):
    return LoadedWeights(built.state_dict(), "a network", None, names, None, None)


def load_adapted(weights, built, start=KEEP, names=NAMES):
    """Adapt weights to a network and load them; return the notes on what was changed."""
    adapted = adapt_weights(weights, built, names, start)
    load_weights(built, adapted.weights, origin="here")
    return adapted.notes
