"""The demonstration: a real model and real questions, fetched once, and the main job done on them."""
