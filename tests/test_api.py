"""The verbs as functions: DESIGN's example on a tiny model, called twice, with a loaded pair, and what they refuse."""

import inspect
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cli_tiny
import layerprune as lp
from layerprune.artifacts import Plan, Scores
from layerprune.config import declared
from layerprune.errors import LayerpruneError, UsageError
from layerprune.models.bypass import bypassed
from layerprune.removal import Removal

TOY = {"tasks": ["toy"], "limit": 12}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return cli_tiny.make(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def toy(home):
    return {**TOY, "include_path": home / "tasks"}


@pytest.fixture(scope="module")
def pair(home):
    folder = home / "base"
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_importing_the_package_loads_nothing_heavy_and_knows_its_verbs():
    code = (
        "import sys, layerprune\n"
        "assert not {'torch', 'transformers', 'lm_eval', 'pydantic', 'numpy'} & set(sys.modules), sys.modules.keys()\n"
        "assert callable(layerprune.plan) and 'torch' not in sys.modules\n"
        "import layerprune.planner, layerprune.exporter, layerprune.auditor.verification, layerprune.cli.plan\n"
        "assert callable(layerprune.plan) and callable(layerprune.export) and callable(layerprune.audit)\n"
        "assert callable(layerprune.verify) and callable(layerprune.inspect) and callable(layerprune.study)\n"
        "from layerprune import heal, prune, push, score"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert {*lp.VERBS} <= {*dir(lp)}
    with pytest.raises(AttributeError, match="no attribute 'prunee'"):
        lp.prunee  # noqa: B018


def test_the_main_job_from_python(home, toy, tmp_path, pair):
    run, smaller, healed = tmp_path / "run", tmp_path / "smaller", tmp_path / "healed"
    scores = lp.score(home / "base", out=run, **toy)
    plan = lp.plan(scores=scores, drop="2", search="one-shot", out=run)
    assert Scores.load(run / "scores.json") == scores
    assert Plan.load(run / "plan.json") == plan
    model, _ = pair
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        whole = model(ids).logits
        with plan.applied(model) as view:
            without = view(ids).logits
            text = view.generate(ids, max_new_tokens=4, do_sample=False)
        with bypassed(model, model.model.layers, Removal.from_layers(plan.removal)):
            assert torch.equal(model(ids, use_cache=False).logits, without)
        assert torch.equal(model(ids).logits, whole)
    assert not torch.equal(whole, without)
    assert model.generation_config.use_cache
    receipt = lp.export(plan, smaller)
    assert receipt.result.layers == 4
    small = AutoModelForCausalLM.from_pretrained(smaller)
    assert torch.equal(small.generate(ids, max_new_tokens=4, do_sample=False), text)
    log = lp.heal(smaller, healed, method="linear", corpus="builtin", tasks=["toy"], include_path=home / "tasks")
    assert log.heldout.after < log.heldout.before
    audit = lp.audit(healed, include_path=home / "tasks", limit=10, generation=False)
    assert audit.verdict in repr(audit)
    found = lp.verify(healed, base=str(home / "base"))
    assert found.ok, found.problems
    sent = lp.push(healed, "me/tiny", dry_run=True)
    assert "model.safetensors" in sent.files


def test_every_verb_may_be_called_again(home, toy, tmp_path):
    first, again = (lp.score(home / "base", out=tmp_path, **toy) for _ in range(2))
    assert first == again
    plans = [lp.plan(home / "base", drop=1, out=tmp_path, **toy) for _ in range(2)]
    assert plans[0] == plans[1]
    assert lp.plan(home / "base", drop=1, **toy).removal == plans[0].removal  # and without a folder
    assert lp.plan(scores=tmp_path / "scores.json", drop=1, search="one-shot").removal == plans[0].removal
    front = lp.plan(home / "base", front=True, up_to=2, out=tmp_path, **toy)
    assert front.to_pandas()["removed"].tolist() == [1, 2]


def test_a_loaded_pair_is_scored_as_its_folder_is(home, toy, tmp_path, pair):
    pair[0].train()
    own, read = lp.score(pair, **toy), lp.score(home / "base", dtype="float32", **toy)
    assert pair[0].training  # as it was
    assert own == read
    assert lp.plan(pair, drop=1, **toy).removal == lp.plan(home / "base", drop=1, dtype="float32", **toy).removal
    assert lp.export(pair, tmp_path / "by-hand", remove=[1, 3]).removal == (1, 3)
    assert lp.inspect(pair).architecture.depth == 6
    done = lp.prune(pair, tmp_path / "smaller", drop=1, search="one-shot", audit_limit=10, **toy)
    assert done.plan.model.id == "base"
    with pytest.raises(UsageError, match="dict is no model; give a folder, a Hub id or a pair"):
        lp.prune({}, tmp_path / "none", drop=1, **toy)


def test_a_loaded_pair_that_was_changed_is_refused(home, toy):
    model = AutoModelForCausalLM.from_pretrained(home / "base")
    pair = model, AutoTokenizer.from_pretrained(home / "base")
    with pytest.raises(UsageError, match="dtype says how a model is loaded, and this one is loaded already"):
        lp.score(pair, dtype="float32", **toy)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight += 0.5
    with pytest.raises(UsageError, match=r"layers\.2\.mlp\.down_proj\.weight differs; save it with save_pretrained"):
        lp.score(pair, **toy)


def test_a_model_that_was_made_in_memory_is_refused(home, toy):
    config = AutoModelForCausalLM.from_pretrained(home / "base").config
    config._name_or_path = ""
    with pytest.raises(UsageError, match="comes from no folder and no Hub repo"):
        lp.score((AutoModelForCausalLM.from_config(config), None), **toy)
    with pytest.raises(UsageError, match="int is no model; give a folder, a Hub id or a pair"):
        lp.score(3, **toy)


def test_documents_show_themselves(home, toy, tmp_path):
    scores = lp.score(home / "base", **toy)
    table = scores.to_pandas()
    assert len(table) == 6
    assert list(table["score"]) == sorted(table["score"])
    assert {"layers", "score", "low", "high", "toy relevance", "toy accuracy"} <= {*table.columns}
    assert repr(scores) == str(scores)
    assert len(repr(scores)) < 300
    assert "\n" not in repr(scores)
    page = scores._repr_html_()
    assert page.count("<tr>") == 7
    assert "toy relevance" in page
    axes = scores.plot()
    assert len(axes.patches) == 6
    assert axes.get_xlabel() == "layer"
    plan = lp.plan(scores=scores, drop=1, search="one-shot")
    assert plan.to_pandas()["place"].tolist()[0] == 1
    assert "remove" in plan._repr_html_()
    receipt = lp.export(plan, tmp_path / "smaller")
    assert "config.json" in receipt.to_pandas()["file"].tolist()


def test_prune_does_everything_and_goes_on_where_it_was(home, toy, tmp_path):
    told = {**toy, "drop": 2, "search": "one-shot", "audit_limit": 10}
    done = lp.prune(home / "base", tmp_path / "smaller", **told)
    assert done.receipt.result.layers == 4
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "smaller").config.num_hidden_layers == 4
    assert lp.verify(tmp_path / "smaller").ok
    assert done.folder == tmp_path / "smaller.run"
    assert (tmp_path / "smaller" / "layerprune" / "audit.json").exists()
    assert lp.prune(home / "base", tmp_path / "smaller", **told).audit == done.audit
    with pytest.raises(UsageError, match="is a run of another recipe"):
        lp.prune(home / "base", tmp_path / "smaller", **{**told, "drop": 1})


def test_prune_heals_in_between(home, toy, tmp_path):
    out = tmp_path / "smaller"
    done = lp.prune(
        home / "base", out, drop=2, search="one-shot", heal="linear", corpus="builtin", audit_limit=10, **toy
    )
    assert done.heal.heldout.after < done.heal.heldout.before
    assert done.audit.heal_sha256 == done.heal.sha256()
    assert (out / "layerprune" / "heal.json").exists()
    assert (tmp_path / "smaller.run" / "checkpoint").is_dir()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: lp.score("m", limit=0), "limit: 0 is not in the range 1 to"),
        (lambda: lp.score("m", limit=10**400), "limit: a number of 1329 bits is not in the range"),
        (lambda: lp.score("m", seed=2**64), "seed: 18446744073709551616 is not in the range 0 to 4294967295"),
        (lambda: lp.score("m", memory=10**400), "memory: "),
        (lambda: lp.score("m", weights={"a": float("inf")}), "weights: a=inf is not a finite number"),
        (lambda: lp.score("m", lmit=3), "there is no option 'lmit'. Did you mean 'limit'?"),
        (lambda: lp.plan(), "name the MODEL to plan for"),
        (lambda: lp.plan(scores="s.json", front=True), "--scores plans without a model, and a front asks it"),
        (lambda: lp.plan("m", front=True), "a front is a folder of plans: say where it goes with out"),
        (lambda: lp.plan("m", scores="s.json", drop=1), "--scores plans without a model: a MODEL cannot be given"),
        (lambda: lp.plan(scores="s.json", drop=1, limit=3), "--limit cannot be given with it"),
        (lambda: lp.heal("a", "b"), "the option 'method' has to be given"),
        (lambda: lp.verify("nowhere"), "nowhere does not exist"),
        (lambda: lp.prune("m", "out", drop=1, front=True), "a front is many plans, and prune ends in one model"),
        (lambda: lp.prune("m", "out", drop=1, tasks="t", corpus="builtin"), "--corpus is what --heal reads"),
        (lambda: lp.prune("m", "out", tasks="t"), "nothing says how far to go"),
        (lambda: lp.prune("m", "out", drop=1), "prune audits what it makes: give tasks, such as --tasks arc_easy"),
        (lambda: lp.prune("m", "out", drop=1, tasks="t", heal="linaer"), "Did you mean 'linear'?"),
        (lambda: lp.prune("m", "out", drop=1, tasks="t", heal="linear"), "linear reads text: give a corpus"),
        (lambda: lp.prune("m", "out", drop=1, tasks="t", search="gredy"), "Did you mean 'greedy'?"),
        (lambda: lp.prune("m", "out", drop=1, tasks="t", no_adjacent=True, contiguous=True), "exclude each other"),
        (lambda: lp.prune("m", "out", drop=1, tasks="t", data_dir="nowhere"), "the folder nowhere does not exist"),
    ],
)
def test_bad_input_raises_one_line(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LayerpruneError) as caught:
        call()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", lp.VERBS)
def test_a_verbs_signature_and_docstring_hold_every_option(name):
    from layerprune import api, config

    verb = getattr(lp, name)
    kind = getattr(config, f"{name.capitalize()}Config")
    parameters = inspect.signature(verb).parameters
    assert verb is getattr(api, name)
    assert not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    for option, one in declared(kind).items():
        assert option in parameters, option
        assert one.help.split()[0] in verb.__doc__
