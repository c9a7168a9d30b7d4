"""layerprune removes decoder layers from Hugging Face language models and proves what that cost."""

__version__ = "0.1.0"
