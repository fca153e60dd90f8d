"""Machine translation with stacked LSTMs, attention and sparsely-gated mixtures of experts.

    import nmt

    model = nmt.load("runs/demo-en-de")              # a run, or an exported model
    model.translate("How much is it?").text          # a list gives a list
    model.translate(["One.", "Two."], beam_size=8)   # options apply to one call
    model.score("How much is it?", "Was kostet das?").log_prob
    print(model.explain("How much is it?"))

    config = nmt.configure("experiment=own_small", "corpus=mine", "run.name=mine")
    nmt.load(nmt.train(config))

Names are loaded on first use: `import nmt` itself imports neither PyTorch nor any other library.
"""

from importlib import import_module

TYPE_CHECKING = False  # type checkers assume True; importing it would take longer than the rest of this file
if TYPE_CHECKING:
    from nmt.api import Model, configure, load, prepare, train
    from nmt.config import Config
    from nmt.decoding.scoring import PairScore
    from nmt.decoding.translation import TextHypothesis, Translation
    from nmt.errors import (
        CheckpointError,
        DataError,
        MemoryLimitError,
        MissingExtraError,
        NonFiniteError,
        ProcessError,
        StorageError,
        UserError,
    )
    from nmt.experts.explain import Explanation
    from nmt.experts.report import LayerReport

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "Config",
    "DataError",
    "Explanation",
    "LayerReport",
    "MemoryLimitError",
    "MissingExtraError",
    "Model",
    "NonFiniteError",
    "PairScore",
    "ProcessError",
    "StorageError",
    "TextHypothesis",
    "Translation",
    "UserError",
    "__version__",
    "configure",
    "load",
    "prepare",
    "train",
]

_HOMES = {
    "nmt.api": ("Model", "configure", "load", "prepare", "train"),
    "nmt.config": ("Config",),
    "nmt.decoding.scoring": ("PairScore",),
    "nmt.decoding.translation": ("TextHypothesis", "Translation"),
    "nmt.errors": tuple(name for name in __all__ if name.endswith("Error")),
    "nmt.experts.explain": ("Explanation",),
    "nmt.experts.report": ("LayerReport",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}


if not TYPE_CHECKING:  # type checkers would accept any name

    def __getattr__(name: str) -> object:
        if name not in _HOME_OF:
            raise AttributeError(f"module 'nmt' has no attribute {name!r}")
        value = getattr(import_module(_HOME_OF[name]), name)
        globals()[name] = value  # later uses do not call this function
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
