"""Publishing a checkpoint: what the documents say in public, and the way to the Hub."""

from layerprune.hub.pushing import REPLACED, Pushed, PushError, push

__all__ = ["REPLACED", "PushError", "Pushed", "push"]
