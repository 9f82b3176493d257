"""deit: train vision transformers from little data by distillation."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# In a checkout `models/` and `datasets/` lie beside this package. Appending the root
# to the search path makes them `deit.models` and `deit.datasets` there, as they are in a
# wheel. They carry no __init__.py, so they can never shadow another package named `datasets`.
_ROOT = _Path(__file__).resolve().parent.parent
if (_ROOT / "setup.cfg").is_file() and (_ROOT / "datasets").is_dir():
    __path__.append(str(_ROOT))
