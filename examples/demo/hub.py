"""Whether the Hugging Face Hub answers, found out within seconds (its own client takes some twenty to give up)."""

from __future__ import annotations

import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass

PROBE_SECONDS = 5.0  # issue 2: decide within 5 seconds


@dataclass(frozen=True)
class HubAnswer:
    """Whether the Hub can be used, and what it said if not."""

    ok: bool
    reason: str = ""


Probe = Callable[[], HubAnswer]


def probe_hub(repo: str = "HuggingFaceTB/SmolLM2-135M-Instruct", seconds: float = PROBE_SECONDS) -> HubAnswer:
    """Ask the Hub for one model's public record; never takes longer than ``seconds``, name resolution included."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return HubAnswer(False, "offline mode is set in the environment")
    answers: list[HubAnswer] = []
    url = f"{constants.ENDPOINT}/api/models/{repo}"
    # A thread, since a socket timeout does not bound name resolution; a daemon, so that a hanging one holds nobody up.
    worker = threading.Thread(target=lambda: answers.append(_ask(url, seconds)), daemon=True)
    worker.start()
    worker.join(seconds)
    return answers[0] if answers else HubAnswer(False, f"no answer within {seconds:g} seconds")


def _ask(url: str, seconds: float) -> HubAnswer:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "layerprune"})
        with urllib.request.urlopen(request, timeout=seconds) as response:
            response.read()
    except urllib.error.HTTPError as error:
        return HubAnswer(False, f"it answered {error.code} {error.reason}")
    except urllib.error.URLError as error:
        return HubAnswer(False, str(error.reason))
    except (OSError, ValueError) as error:  # a reset in the middle of the body; an endpoint that is no URL
        return HubAnswer(False, str(error) or type(error).__name__)
    return HubAnswer(True)
