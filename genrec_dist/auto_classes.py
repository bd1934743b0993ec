"""GenRec in transformers' auto classes, without importing transformers for it."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

MODULES = {"genrec": "genrec_dist.model.genrec", "genrec-t5": "genrec_dist.model.seq2seq.t5"}
"""Module of the model by model type."""
AUTO = "transformers.models.auto.configuration_auto"


def register() -> None:
    """Make AutoConfig and AutoModelForSeq2SeqLM know GenRec.

    The module of the model registers its classes when it is imported. What is added here is the
    moment: whoever asks AutoConfig for one of these model types imports its module. If transformers
    is not loaded yet, an import hook waits for AutoConfig's module; it finds nothing by itself.
    """
    if AUTO in sys.modules:
        _await(sys.modules[AUTO])
    elif not any(isinstance(finder, _AfterAuto) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterAuto())


def _await(module: ModuleType) -> None:
    # transformers keeps what users register in this dictionary, by model type. The model cannot be
    # imported here: transformers' own base classes may be in the middle of their import.
    mapping = module.CONFIG_MAPPING
    mapping._extra_content = _ImportsOnDemand(mapping._extra_content)


class _ImportsOnDemand(dict[str, Any]):
    def __contains__(self, key: object) -> bool:
        return key in MODULES or super().__contains__(key)

    def __missing__(self, key: str) -> Any:
        if key not in MODULES:
            raise KeyError(key)
        import_module(MODULES[key])  # which registers itself
        return self[key]


class _AfterAuto(importlib.abc.MetaPathFinder):
    """Finds AutoConfig's module as Python would, and adds a step after its loading."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != AUTO:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenAwait(spec.loader)
        return spec


class _ThenAwait(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _await(module)
