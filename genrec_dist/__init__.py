"""GenRec: generative sequential recommendation, trained at any scale.

    from genrec_dist import Recommender, evaluate, load_recipe, prepare, train

    prepare("log.csv", "data/mine")
    run = train(load_recipe("tiny", ["data=data/mine", "run=runs/mine"]))
    metrics = evaluate(run, "test")
    Recommender.load(run).recommend([["b07", "c12"]], k=10)

The names below are imported when they are first used, so that `import genrec_dist` loads neither
torch nor transformers. After the import `AutoModelForSeq2SeqLM.from_pretrained("runs/mine/best")`
knows the model.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from genrec_dist import auto_classes

if TYPE_CHECKING:
    from genrec_dist.api import compare, evaluate, prepare, train
    from genrec_dist.config.load import load_recipe
    from genrec_dist.inference.recommend import Recommender
    from genrec_dist.model.genrec import GenRecConfig, GenRecForConditionalGeneration

__all__ = [
    "GenRecConfig",
    "GenRecForConditionalGeneration",
    "Recommender",
    "compare",
    "evaluate",
    "load_recipe",
    "prepare",
    "train",
]

_MODULES = {
    "GenRecConfig": "genrec_dist.model.genrec",
    "GenRecForConditionalGeneration": "genrec_dist.model.genrec",
    "Recommender": "genrec_dist.inference.recommend",
    "compare": "genrec_dist.api",
    "evaluate": "genrec_dist.api",
    "load_recipe": "genrec_dist.config.load",
    "prepare": "genrec_dist.api",
    "train": "genrec_dist.api",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


auto_classes.register()
