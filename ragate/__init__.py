"""ragate: evaluate a RAG system and gate its changes, judged by a model that runs on your own machine."""

__version__ = "0.1.0"
