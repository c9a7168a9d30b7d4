"""Text generation through lm-eval's wrapper: slow and correct, also while layers are bypassed."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

from lm_eval.models.huggingface import HFLM


class Wrapper(HFLM):
    """lm-eval's Hugging Face model around one that is already loaded.

    While layers are bypassed the key-value cache would have holes (a removed layer 0 makes it look empty), so
    generation recomputes the whole sequence for each token then.
    """

    use_cache = True

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **kwargs: Any) -> Any:
        generate = self.model.generate

        def chosen(**options: Any) -> Any:
            return generate(**{**options, "use_cache": self.use_cache})

        self.model.generate = chosen
        try:
            return super()._model_generate(context, max_length, stop, **kwargs)
        finally:
            del self.model.generate


def wrapped(model: Any, tokenizer: Any) -> Wrapper:
    """Wrap a loaded model; lm-eval's remarks on wrapping are not for our users."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return Wrapper(pretrained=model, tokenizer=tokenizer, batch_size=1)
    finally:
        logger.setLevel(before)
