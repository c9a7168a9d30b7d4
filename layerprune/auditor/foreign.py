"""A checkpoint that layerprune did not export, beside a base that the user names, and where its audit goes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from layerprune.architecture import check_weights, load_config, read_architecture
from layerprune.artifacts import Audit, ModelRef
from layerprune.auditor.inputs import Loading, check_same_tokens
from layerprune.checkpoint import Checkpoint, Folder, locate
from layerprune.checkpoint.location import fetch_documents, reference
from layerprune.checkpoint.safetensors import ADAPTER, INDEX, WEIGHTS, read_header
from layerprune.data.items import EvalSet
from layerprune.errors import CheckpointError, ModelError, UsageError, one_line
from layerprune.files import check_places, check_plain, published_together
from layerprune.models.generation import wrapped
from layerprune.models.model import LoadedModel, load_tokenizer
from layerprune.parsing import read_json
from layerprune.report.card import FRAGMENT, OURS, write_fragment
from layerprune.report.page import REPORT, write_report

ADAPTER_WEIGHTS = "adapter_model.safetensors"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def is_foreign(model: str | Path) -> bool:
    """Whether ``model`` is no folder with documents of layerprune: another folder, or a Hub id."""
    return not any((Path(model).expanduser() / name).exists() for name in OURS if name.endswith(".json"))


@dataclass(frozen=True)
class ForeignCheckpoint:
    """Any causal language model beside its base, both found and looked at; an adapter is merged when it is loaded."""

    place: Folder
    base_place: Folder
    base: ModelRef
    result: ModelRef
    sizes: tuple[int, int]  # bytes of the weights, base and candidate; those of an adapter: once it is merged
    adapter: str | None = None  # its kind, as peft calls it
    trust_remote_code: bool = False
    plan = receipt = heal = None  # what an export would have left
    seen: frozenset[str] = frozenset()  # of its makers' items nothing is known

    @classmethod
    def read(
        cls,
        model: str | Path,
        base: str,
        *,
        revision: str | None = None,
        base_revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> ForeignCheckpoint:
        """Look at both models' configs, headers and tokenizers; no weight is loaded.

        Raises ``ModelError`` for a model that is not there, for one with another tokenizer than its base, and for an
        adapter that cannot be merged; ``CheckpointError`` and ``RefusedError`` as loading would; ``UsageError`` for a
        model on the Hub that layerprune exported.
        """
        place, base_place = locate(str(model), revision), locate(base, base_revision)
        fetch_documents(place)
        if place.revision is not None and not is_foreign(place.path):
            raise UsageError(
                f"{model} was exported by layerprune: download it into a folder and audit that; its documents say "
                "which items were seen"
            )
        reference, size = _described(base_place, trust_remote_code)
        if _is_adapter(place.path):
            kind = _adapter_kind(place.path)
            fingerprint = _adapter_fingerprint(place.path, reference)
            result = reference.model_copy(
                update={"id": place.id, "revision": place.revision, "fingerprint": fingerprint}
            )
            found = cls(place, base_place, reference, result, (size, size), kind, trust_remote_code)
        else:
            result, own_size = _described(place, trust_remote_code)
            found = cls(place, base_place, reference, result, (size, own_size), None, trust_remote_code)
        found.check_tokenizer()
        return found

    @property
    def folder(self) -> Path:
        """Where the candidate's files lie."""
        return self.place.path

    def load(self, loading: Loading) -> LoadedModel:
        """Load the candidate; an adapter goes into a base of its own, in memory."""
        if self.adapter is None:
            return loading.load_model(*_named(self.place))
        loaded = merged(loading.load_model(*_named(self.base_place)), self.folder, self.place.id)
        return replace(loaded, tokenizer=self._tokenizer(), ref=self.result)

    def base_source(self, given: str | None = None) -> tuple[str, str | None]:
        """Return (folder or Hub id, revision) of the base, which was given when this was read."""
        return _named(self.base_place)

    def _tokenizer(self) -> Any:
        """The candidate's tokenizer: an adapter that brings none reads as its base does."""
        brings = self.adapter is None or any((self.folder / name).exists() for name in TOKENIZERS)
        place = self.place if brings else self.base_place
        return load_tokenizer(place.path, place.id, trust_remote_code=self.trust_remote_code)

    def _base_tokenizer(self) -> Any:
        place = self.base_place
        return load_tokenizer(place.path, place.id, trust_remote_code=self.trust_remote_code)

    def check_tokenizer(self) -> None:
        """Raise ``ModelError`` unless both tokenizers cut text alike, by content; special tokens may differ.

        Items are put into tokens once for both models, and the base's own answers are read token by token.
        """
        own, other = self._tokenizer(), self._base_tokenizer()
        if _cutting(own) == _cutting(other):
            return
        words, others = (dict(one.get_vocab()) for one in (own, other))
        differ = len(words.items() ^ others.items())
        how = f"{differ} entries of the vocabularies differ" if differ else "they cut text differently"
        raise ModelError(
            f"{self.place.id} has another tokenizer than the base {self.base_place.id} ({len(words)} and {len(others)} "
            f"tokens; {how}): an audit asks both models in the same tokens; give the base that it was made from"
        )

    def check_items(self, eval_set: EvalSet, candidate: LoadedModel) -> None:
        """Raise ``DocumentError`` where the base's tokenizer puts an item into other tokens, before it is asked."""
        check_same_tokens(
            eval_set,
            wrapped(candidate.model, self._base_tokenizer()),
            "the candidate differ on an item of {task!r}, though not in their words: their special tokens do; an audit "
            "asks both models in the same tokens",
        )


def _named(place: Folder) -> tuple[str, str | None]:
    return (str(place.path), None) if place.revision is None else (place.id, place.revision)


def _described(place: Folder, trust_remote_code: bool) -> tuple[ModelRef, int]:
    """Return how documents name the model in a folder, and the bytes of its weights; refuses what cannot be loaded."""
    config = load_config(str(place.path), trust_remote_code=trust_remote_code)
    checkpoint = Checkpoint.open(place.path)
    architecture = read_architecture(config, trust_remote_code=trust_remote_code)
    check_weights(place.id, checkpoint.shapes, config, architecture, trust_remote_code=trust_remote_code)
    depth, parameters = architecture.depth, architecture.parameters()
    found = reference(place, checkpoint, model_type=config.model_type, layers=depth, parameters=parameters)
    return found, checkpoint.nbytes


def _cutting(tokenizer: Any) -> str:
    """Return what of a tokenizer decides how plain text is cut: words and merges, and what is done before them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return json.dumps(tokenizer.get_vocab(), sort_keys=True)
    whole = json.loads(backend.to_str())
    return json.dumps([whole.get(name) for name in ("model", "normalizer", "pre_tokenizer")], sort_keys=True)


# A peft adapter: merged into its base in memory, as merge_and_unload would for a user.


def _is_adapter(folder: Path) -> bool:
    whole = (folder / WEIGHTS).exists() or (folder / INDEX).exists()  # beside whole weights, opening them refuses
    return (folder / ADAPTER).exists() and not whole


def _adapter_kind(folder: Path) -> str:
    """Return the kind of an adapter; raises ``ModelError`` for one that changes which layers there are."""
    try:
        settings = read_json(folder / ADAPTER)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder / ADAPTER} cannot be read: {one_line(error)}") from error
    kind = settings.get("peft_type") if isinstance(settings, dict) else None
    if not isinstance(kind, str):
        raise ModelError(f"{folder / ADAPTER} names no peft_type; expected the config of a peft adapter, such as LORA")
    if settings.get("layer_replication"):
        raise ModelError(f"{folder} repeats layers of its base (layer_replication); merge it, save it, and audit that")
    return kind


def _adapter_fingerprint(folder: Path, base: ModelRef) -> str:
    """Return a hash of base, adapter and its config; raises ``CheckpointError`` for weights that cannot be read."""
    path = folder / ADAPTER_WEIGHTS
    if not path.exists():
        raise CheckpointError(f"{folder} holds {ADAPTER} and no {ADAPTER_WEIGHTS}; pickles are never read")
    check_plain(folder, [path.name])
    read_header(path)
    parts = [base.fingerprint.encode(), (folder / ADAPTER).read_bytes()]
    with path.open("rb") as file:
        parts.append(hashlib.file_digest(file, "sha256").digest())
    return f"sha256:{hashlib.sha256(b''.join(parts)).hexdigest()}"


def merged(loaded: LoadedModel, folder: Path, name: str) -> LoadedModel:
    """Return ``loaded`` with the peft adapter in ``folder`` merged into it, in place.

    Raises ``ModelError`` where peft cannot, or where the adapter's weights are not those of this model.
    """
    from peft import PeftModel, get_peft_model_state_dict, load_peft_weights
    from safetensors import SafetensorError

    if loaded.stream is not None:
        raise ModelError(
            f"the adapter {name} cannot be merged into a model whose layers are offloaded; merge it, save it, and "
            "audit that"
        )
    faults = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, OSError, ImportError, SafetensorError)
    try:
        given = set(load_peft_weights(str(folder), device="cpu"))
        adapted = PeftModel.from_pretrained(loaded.model, str(folder))
        if not hasattr(adapted.base_model, "merge_and_unload"):
            raise ModelError(f"the adapter {name} is of a kind that cannot be merged into weights")
        known = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        stray, missing = given - known - set(adapted.state_dict()), known - given
        whole = adapted.merge_and_unload(safe_merge=True)
    except faults as error:  # of peft, which does not say what it raises
        raise ModelError(f"the adapter {name} does not go into {loaded.ref.id}: {one_line(error)}") from error
    if stray or missing:  # peft leaves these out, or as they were drawn, and says so in a warning
        found = [f"{len(stray)} of its tensors have no place there, {min(stray)} for one"] if stray else []
        found += [f"{len(missing)} are missing, {min(missing)} for one"] if missing else []
        raise ModelError(f"the adapter {name} does not go into {loaded.ref.id}: {'; '.join(found)}")
    return replace(loaded, model=whole.eval())


# What an audit leaves: the candidate's folder stays as it is, and all goes into one of its own.


def check_output(out: Path) -> None:
    """Raise ``UsageError`` where the audit of a foreign checkpoint cannot go, before anything is measured."""
    for name in ("config.json", "layerprune"):
        if (out / name).exists():
            raise UsageError(f"{out} holds {name}: it is a model's folder; give another one with -o")
    check_places(out, files=(Audit.filename, REPORT, FRAGMENT))


def publish(out: Path, audit: Audit) -> None:
    """Write audit.json, report.html and card.md into ``out``, all of them or none."""
    with published_together(out) as new:
        write_fragment(out, audit, into=new)
        write_report(out, audit, into=new)
        audit.save(new / Audit.filename)
