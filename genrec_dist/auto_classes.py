"""GenRec in transformers' auto classes, registered when transformers itself loads them."""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

MODEL = "genrec_dist.model.genrec"
AUTO = "transformers.models.auto.modeling_auto"
"""Nothing inside transformers needs this module while its base classes are being imported, unlike
`configuration_auto`, so that the model can be imported right after it."""


def register() -> None:
    """Make AutoConfig and AutoModelForSeq2SeqLM know GenRec, without importing transformers now.

    The module of the model registers itself. If the auto classes are loaded already, it is
    imported at once. Otherwise an import hook waits for them; it finds nothing by itself, it only
    imports the model's module after the real loader of an auto class has run.
    """
    if AUTO in sys.modules:
        import_module(MODEL)
    elif not any(isinstance(finder, _AfterAuto) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterAuto())


class _AfterAuto(importlib.abc.MetaPathFinder):
    """Finds the auto classes as Python would, and adds a step after their loading."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != AUTO:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader):
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        # A model's module that is being imported just now registers itself at its end.
        if MODEL not in sys.modules:
            import_module(MODEL)
