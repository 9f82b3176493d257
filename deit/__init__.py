"""Train vision transformers on small datasets by distillation."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout, `models/` and `datasets/` are next to this package. Appending the root to the
# search path makes them `deit.models` and `deit.datasets`, as in a wheel. They have no __init__.py,
# so that they cannot shadow another package named `datasets`.
_ROOT = _Path(__file__).resolve().parent.parent
if (_ROOT / "setup.cfg").is_file() and (_ROOT / "datasets").is_dir():
    __path__.append(str(_ROOT))
