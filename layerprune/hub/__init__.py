"""Publishing a checkpoint: what the documents say in public, and the way to the Hub."""

from layerprune.hub.pushing import Pushed, PushError, push

__all__ = ["PushError", "Pushed", "push"]
