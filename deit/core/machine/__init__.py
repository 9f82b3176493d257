"""Checks of the machine and the installation, for `deit doctor`; they do not import torch."""
