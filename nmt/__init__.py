"""Machine translation with stacked LSTMs, attention and sparsely-gated mixtures of experts."""

__version__ = "0.1.0"
