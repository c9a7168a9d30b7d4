"""``python -m layerprune``."""

from layerprune.cli import main

main()
