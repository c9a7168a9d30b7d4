"""The audit of checkpoints that layerprune did not export: pruned by hand, tuned, deeper, adapters; refusals."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import audit_samples as samples
import audit_tiny as tiny
from cli_tiny import done, refused
from layerprune.artifacts import PRUNED, Audit, Plan, TaskData
from layerprune.auditor import audit
from layerprune.auditor.comparison import adjusted, compare_models, foreign_verdict, overall
from layerprune.auditor.foreign import is_foreign, publish
from layerprune.auditor.verification import verify
from layerprune.errors import CheckpointError, DocumentError, ModelError, UsageError
from layerprune.report.card import BEGIN, END


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.base_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def tasks(base, tmp_path_factory):
    return tiny.eval_set(base, tmp_path_factory.mktemp("tasks"), "toy", test=40)


@pytest.fixture(scope="module")
def by_hand(base, tmp_path_factory):
    return tiny.pruned_by_hand(base, tmp_path_factory.mktemp("hand") / "byhand", 3)


@pytest.fixture(scope="module")
def whole(base, by_hand, tasks, tmp_path_factory):
    """A full audit of the checkpoint pruned by hand, its folder, and hashes of the candidate before and after."""
    out, text = tmp_path_factory.mktemp("whole") / "audit", tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("the red fox and the old oak under a blue sky " * 20)
    before = hashes(by_hand)
    found = run(by_hand, base, tasks, out, generation=True, speed=True, text=text)
    return found, out, before, hashes(by_hand)


def run(model, base, tasks, out, generation=False, **options):
    return audit(model, ["toy"], out=out, base=str(base), include_path=[tasks], generation=generation, **options)


def hashes(folder):
    """Return the sha256 of every file below a folder, hidden ones too."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def changed(base, out, change, tokenizer=None):
    """Save the base after ``change`` was done to it, with a tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        model = change(model) or model
    model.save_pretrained(out)
    (tokenizer or PreTrainedTokenizerFast.from_pretrained(base)).save_pretrained(out)
    return out


def tuned(model):
    """What fine-tuning leaves: every weight moved a little."""
    generator = torch.Generator().manual_seed(1)
    for weight in model.parameters():
        weight += 0.02 * torch.randn(weight.shape, generator=generator)


def deeper(model):
    """The model with its third layer twice."""
    config = LlamaConfig.from_dict(model.config.to_dict() | {"num_hidden_layers": tiny.DEPTH + 1})
    made, state = LlamaForCausalLM(config), {}
    for layer, origin in enumerate([0, 1, 2, 2, 3, 4, 5]):
        own = model.model.layers[origin].state_dict()
        state |= {f"model.layers.{layer}.{name}": value for name, value in own.items()}
    state |= {name: value for name, value in model.state_dict().items() if ".layers." not in name}
    made.load_state_dict(state)
    return made


def wider(model):
    """The model with four more rows in its vocabulary, which it finds likely."""
    model.resize_token_embeddings(264, mean_resizing=False)
    model.lm_head.weight[260:] = 5.0


def adapter(base, out, seed=3, **changes):
    """A LoRA adapter of the base, saved by peft; its merged twin stands beside it as a whole checkpoint."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**(settings | changes)))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(out / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(out / "merged")
    PreTrainedTokenizerFast.from_pretrained(base).save_pretrained(out / "merged")
    return out / "adapter", out / "merged"


def test_a_checkpoint_pruned_by_hand_has_the_outcomes_of_our_own_export(base, by_hand, tasks, tmp_path, whole):
    ours = audit(tiny.exported(base, tmp_path / "ours"), ["toy"], include_path=[tasks])
    found = whole[0]
    assert found.tasks == ours.tasks
    assert found.overall == ours.overall
    assert found.generation == ours.generation
    assert found.own_answers == ours.own_answers
    assert found.cache_bytes_per_token == ours.cache_bytes_per_token
    assert (found.base, found.bytes_before, found.bytes_after) == (ours.base, ours.bytes_before, ours.bytes_after)
    assert found.pruned.fingerprint == ours.pruned.fingerprint
    assert (found.pruned.id, found.pruned.layers) == ("byhand", tiny.DEPTH - 1)
    assert found.foreign
    assert not ours.foreign
    assert found.removal is found.plan_sha256 is found.receipt_sha256 is found.layerwise is None


def test_the_candidates_folder_stays_untouched_and_the_audit_lies_elsewhere(whole):
    found, out, before, after = whole
    assert before == after
    assert sorted(hashes(out)) == ["audit.json", "card.md", "report.html"]
    assert Audit.load(out / "audit.json") == found


def test_the_verdict_says_sizes_and_that_the_items_may_have_been_seen(whole):
    found = whole[0]
    sizes = f"{found.pruned.parameters:,} of {found.base.parameters:,} parameters, 5 of 6 layers; accuracy "
    assert found.verdict.startswith(sizes)
    assert "on 40 items, which its makers may have seen" in found.verdict
    assert "unseen" not in found.verdict
    assert "removed" not in found.verdict


def test_card_and_report_read_without_a_removal(whole):
    found, out, *_ = whole
    card, report = ((out / name).read_text(encoding="utf-8") for name in ("card.md", "report.html"))
    report = report.partition("</style>")[2]
    for page in (card, report):
        assert found.verdict in page.replace("&#39;", "'")
        assert "layerprune did not export" in page
        assert found.pruned.fingerprint in page
        assert found.sha256() in page
        for word in ("emoved", "Layer by layer", "plan.json", "unseen", "None", "was gained", "chosen by"):
            assert word not in page, word
    assert card.startswith(f"{BEGIN}\n## Audit: byhand beside base\n")
    assert card.endswith(f".\n{END}\n")
    assert "| layers | 6 | 5 | −16.7 % |" in card
    assert "in the same tokens.\n\n| task | items |" in card
    assert f"byhand has {found.pruned.parameters:,} parameters and 5 layers, its base base " in report
    assert "Size and speed" in report
    words = " ".join(re.findall(r"<span>(.*?)</span>", report))
    assert "layerprune audit byhand/ --base base/ -o audit/ --tasks toy" in words
    assert "layerprune verify ." in words


def test_the_audit_is_repeatable_and_verify_works_it_out_again(base, by_hand, tasks, tmp_path, whole):
    out = whole[1]
    found = verify(out, base=str(base))
    assert found.problems == ()
    assert found.files == 3
    assert found.digests == {"audit": whole[0].sha256()}
    assert "is not the base model of this audit" in verify(out, base=str(by_hand)).problems[0]
    first, again = (run(by_hand, base, tasks, tmp_path / "audit") for _ in range(2))  # written over
    assert first == again


def test_verify_finds_what_was_changed_in_a_foreign_audit(tmp_path, whole):
    def tampered(name, old, new):
        out = shutil.copytree(whole[1], tmp_path / f"{name}{len(list(tmp_path.iterdir()))}")
        text = (out / name).read_text(encoding="utf-8")
        assert old in text
        (out / name).write_text(text.replace(old, new, 1), encoding="utf-8")
        return verify(out).problems

    assert any("card.md: not what" in one for one in tampered("card.md", "40", "400"))
    assert any("report.html: not what" in one for one in tampered("report.html", "Accuracy", "Precision"))
    assert any("do not follow" in one for one in tampered("audit.json", '"right_to_wrong": ', '"right_to_wrong": 1'))
    assert any("verdict does not follow" in one for one in tampered("audit.json", "5 of 6 layers", "6 of 6 layers"))
    stray = shutil.copytree(whole[1], tmp_path / "stray")
    (stray / "more.txt").write_text("x")
    assert verify(stray).problems == ("more.txt: not a file that the audit wrote",)
    (stray / "card.md").unlink()
    assert "card.md: missing" in verify(stray).problems


def test_items_of_a_foreign_audit_are_asked_again_in_its_folder_or_beside_its_model(base, by_hand, tasks, whole):
    out = whole[1]
    before = hashes(out)
    again = audit(by_hand, out=out, base=str(base), include_path=[tasks], recheck=6)
    assert (again.items, again.decisions, again.same_decisions, again.problems) == (6, 12, 12, ())
    assert audit(out, base=str(base), include_path=[tasks], recheck=40).decisions == 80
    assert hashes(out) == before
    with pytest.raises(DocumentError, match="base is not the byhand of this audit: its weights' fingerprint is"):
        audit(base, out=out, base=str(base), include_path=[tasks], recheck=1)
    with pytest.raises(DocumentError, match="byhand is not the base of this audit"):
        audit(by_hand, out=out, base=str(by_hand), include_path=[tasks], recheck=1)
    with pytest.raises(DocumentError, match="holds no audit to ask again"):
        audit(by_hand, out=out / "nowhere", base=str(base), include_path=[tasks], recheck=1)


def test_a_local_candidate_that_nothing_here_knows_has_to_be_given(whole):
    """Another process has not seen the folders that this one audited."""
    command = [sys.executable, "-m", "layerprune", "audit", str(whole[1]), "--recheck", "5"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    line = ended.stderr
    assert ended.returncode == 2
    assert "is of byhand, a local folder, and nothing here says where it lies: give layerprune audit MODEL" in line
    assert f"-o {whole[1]} --recheck N" in line


def test_a_forged_foreign_audit_does_not_repeat(base, by_hand, tasks, tmp_path, whole):
    document = whole[0].model_copy(update={"generation": None, "own_answers": ()})
    task = document.tasks[0]
    model = task.models[PRUNED]
    forged = model.outcomes.model_copy(update={"correct": task.base_outcomes.correct})
    models = compare_models(task.base_outcomes, {PRUNED: forged}, document.seed)
    tasks_ = adjusted([task.model_copy(update={"models": models})])
    said = foreign_verdict(document.base, document.pruned, tasks_, None, ())
    publish(tmp_path, document.model_copy(update={"tasks": tasks_, "overall": overall(tasks_), "verdict": said}))
    assert verify(tmp_path).problems == ()
    found = audit(by_hand, out=tmp_path, base=str(base), include_path=[tasks], recheck=40)
    turned = sum(a != b for a, b in zip(model.outcomes.correct, forged.correct, strict=True))
    assert len(found.problems) == turned == 80 - found.same_decisions > 0
    assert all("does not repeat for the candidate model" in problem for problem in found.problems)


def test_the_card_is_renewed_and_what_a_person_wrote_around_it_stays(base, by_hand, tasks, tmp_path, whole):
    out = shutil.copytree(whole[1], tmp_path / "audit")
    card, ours = out / "card.md", (out / "card.md").read_bytes()
    above, below = b"---\nlicense:  mit # mine\n---\r\n# My model\n\n", b"\r\n\tThe end.  "
    card.write_bytes(above + ours.replace(b"Both models answered", b"All models answered") + below)
    assert verify(out).problems == ("card.md: not what audit.json gives",)
    assert done("card", out).stdout == f"written: {card}\n"
    assert card.read_bytes() == above + ours + below
    assert verify(out).problems == ()
    card.write_bytes(below)  # one without our part
    done("card", out)
    assert card.read_bytes() == ours.rstrip(b"\n") + b"\n" + below
    run(by_hand, base, tasks, out)
    assert card.read_bytes().endswith(b"-->\n" + below)
    assert verify(out).problems == ()
    card.write_text(re.sub(r"(audit.json . .sha256:)\w{4}", r"\g<1>0000", card.read_text(encoding="utf-8")))
    assert "audit.json is not the one that card.md names; put it back" in refused("card", out)


def test_push_of_a_foreign_audit_says_so_in_one_line(whole):
    assert "is not an exported checkpoint" in refused("push", whole[1], "me/model")
    assert "audited" in done("verify", whole[1]).stdout


def test_a_tuned_copy_keeps_its_layers_and_may_win(base, tasks, tmp_path):
    copy = changed(base, tmp_path / "tuned", tuned)
    found = run(copy, base, tasks, tmp_path / "audit")
    assert f"{found.base.parameters:,} of {found.base.parameters:,} parameters, 6 of 6 layers" in found.verdict
    assert found.pruned.fingerprint != found.base.fingerprint
    assert found.bytes_before == found.bytes_after
    own = run(base, base, tasks, tmp_path / "same")
    assert own.tasks[0].models[PRUNED].outcomes.correct == own.tasks[0].base_outcomes.correct
    assert own.tasks[0].base_outcomes == found.tasks[0].base_outcomes
    assert own.overall[PRUNED].difference == 0 != found.overall[PRUNED].flips.right_to_wrong


def test_a_deeper_model_is_just_a_model(base, tasks, tmp_path):
    copy = changed(base, tmp_path / "deeper", deeper)
    text = tmp_path / "text.txt"
    text.write_text("an ice cap and a tin can on a big map, " * 30)
    found = run(copy, base, tasks, tmp_path / "audit", generation=True, speed=True, text=text)
    assert found.pruned.layers == 7
    assert f" parameters (base: {found.base.parameters:,}), 7 layers (base: 6); accuracy" in found.verdict
    assert found.speed.layers_kept == pytest.approx(7 / 6)
    assert found.bytes_after > found.bytes_before
    assert "| layers | 6 | 7 | +16.7 % |" in (tmp_path / "audit" / "card.md").read_text(encoding="utf-8")
    assert verify(tmp_path / "audit").problems == ()


def test_a_padded_vocabulary_is_read_on_the_tokens_that_both_have(base, tasks, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a wet dog under a sun hat, " * 40)
    found = run(changed(base, tmp_path / "padded", wider), base, tasks, tmp_path / "audit", text=text)
    assert found.text.kl == pytest.approx(0, abs=1e-6)
    assert found.text.nats == pytest.approx(found.text.base_nats, abs=1e-6)


def test_an_adapter_is_merged_in_memory_and_audited_as_its_merged_twin(base, tasks, tmp_path):
    folder, twin = adapter(base, tmp_path)
    before, base_before = hashes(folder), hashes(base)
    found, whole = (run(one, base, tasks, tmp_path / f"{one.name}-audit", generation=True) for one in (folder, twin))
    assert hashes(folder) == before
    assert hashes(base) == base_before
    assert found.tasks == whole.tasks
    assert found.tasks[0].models[PRUNED].outcomes != found.tasks[0].base_outcomes  # the adapter did something
    assert found.generation == whole.generation
    assert found.own_answers == whole.own_answers
    assert (found.adapter, whole.adapter) == ("LORA", None)
    assert '"adapter"' not in whole.canonical_json()
    assert found.pruned.id == "adapter"
    assert found.pruned.fingerprint not in (found.base.fingerprint, whole.pruned.fingerprint)
    assert found.pruned.parameters == found.base.parameters
    for name in ("card.md", "report.html"):
        assert "adapter (LORA)" in (tmp_path / "adapter-audit" / name).read_text(encoding="utf-8")
    assert verify(tmp_path / "adapter-audit").problems == ()


def test_an_adapter_that_does_not_fit_is_refused(base, by_hand, tasks, tmp_path):
    folder, _ = adapter(base, tmp_path)
    with pytest.raises(ModelError, match="adapter does not go into byhand: 4 of its tensors have no place there"):
        run(folder, by_hand, tasks, tmp_path / "audit")
    settings = json.loads((folder / "adapter_config.json").read_text())
    other = shutil.copytree(folder, tmp_path / "other")
    for changes, said in (
        ({"target_modules": ["no_such_module"]}, "does not go into base: "),
        ({"target_modules": ["q_proj", "v_proj", "down_proj"]}, "are missing, "),
        ({"layer_replication": [[0, 3], [2, 6]]}, "repeats layers of its base"),
        ({"peft_type": None}, "names no peft_type"),
    ):
        (other / "adapter_config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(ModelError, match=re.escape(said)):
            run(other, base, tasks, tmp_path / "audit")
    (other / "adapter_model.safetensors").rename(other / "adapter_model.bin")
    (other / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="pickles are never read"):
        run(other, base, tasks, tmp_path / "audit")
    with pytest.raises(ModelError, match="offloaded"):
        run(folder, base, tasks, tmp_path / "audit", offload="disk")
    assert not (tmp_path / "audit").exists()


def other_tokenizer(base, change):
    """The base's tokenizer after ``change`` was done to its JSON."""
    from tokenizers import Tokenizer

    fast = PreTrainedTokenizerFast.from_pretrained(base)
    content = json.loads(fast.backend_tokenizer.to_str())
    change(content)
    made = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="</s>")


def test_another_tokenizer_is_refused_in_one_line_before_anything_is_measured(base, tasks, tmp_path):
    def swapped(content):
        words = content["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]

    def merging(content):
        content["model"]["vocab"]["oo"] = 258
        content["model"]["merges"] = [["o", "o"]]

    def split(content):
        content["pre_tokenizer"]["add_prefix_space"] = True

    for name, change, said in (
        ("swapped", swapped, "4 entries of the vocabularies differ"),
        ("merging", merging, "1 entries of the vocabularies differ"),
        ("split", split, "they cut text differently"),
    ):
        copy = changed(base, tmp_path / name, lambda model: None, other_tokenizer(base, change))
        args = [copy, "--base", base, "-o", tmp_path / "audit", "--tasks", "toy", "--include-path", tasks]
        line = refused("audit", *args)
        assert f"{name} has another tokenizer than the base base" in line
        assert said in line
    assert not (tmp_path / "audit").exists()


def test_other_special_tokens_are_no_other_tokenizer_unless_they_change_an_item(base, tasks, tmp_path):
    fast = PreTrainedTokenizerFast.from_pretrained(base)
    fast.pad_token = "<s>"
    found = run(changed(base, tmp_path / "pad", lambda model: None, fast), base, tasks, tmp_path / "audit")
    assert found.overall[PRUNED].difference == 0
    fast = PreTrainedTokenizerFast.from_pretrained(base)
    fast.add_tokens(["toy"])  # a word of every question becomes one token
    grown = changed(base, tmp_path / "grown", wider, fast)
    with pytest.raises(DocumentError, match="base and the candidate differ on an item of 'toy'"):
        run(grown, base, tasks, tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_compared_plan_runs_on_the_same_items_and_what_it_has_seen_is_left_out(base, by_hand, tasks, tmp_path, whole):
    every = whole[0].tasks[0]
    marks = every.data.fingerprints[:7]
    data = TaskData(
        task="toy", split="train", items=7, fingerprints=marks, num_fewshot=0, metric="acc", chance=0.25
    )  # fmt: skip
    plan = samples.plan(model=tiny.reference(base), removal=(3,), order=(3,), ranking=(), data=(data,))
    found = run(by_hand, base, tasks, tmp_path / "audit", compare={"ours": plan})
    task = found.tasks[0]
    assert (task.excluded, task.data.items) == (7, 33)
    assert task.models["ours"].outcomes.correct == every.models[PRUNED].outcomes.correct[7:]
    assert task.models[PRUNED].outcomes.correct == every.models[PRUNED].outcomes.correct[7:]
    report = (tmp_path / "audit" / "report.html").read_text(encoding="utf-8")
    assert "7 items of toy that a compared plan had seen" in report
    other = samples.plan(model=tiny.reference(by_hand), removal=(3,), order=(3,), ranking=(), data=())
    with pytest.raises(DocumentError, match="is for another model"):
        run(by_hand, base, tasks, tmp_path / "none", compare={"other": other})


def test_our_own_export_with_its_base_is_audited_as_without(base, tasks, tmp_path):
    first, second = (tiny.exported(base, tmp_path / name / "smaller") for name in ("a", "b"))
    assert not is_foreign(first)
    own = audit(first, ["toy"], include_path=[tasks], generation=False)
    named = audit(second, ["toy"], include_path=[tasks], generation=False, base=str(base))
    assert own.sha256() == named.sha256()
    assert Plan.load(first / "layerprune" / "plan.json").sha256() == own.plan_sha256
    with pytest.raises(UsageError, match="its audit goes into it; leave out -o"):
        audit(first, ["toy"], out=tmp_path / "out", include_path=[tasks], base=str(base))
    assert not (tmp_path / "out").exists()


def test_what_is_missing_or_in_the_way_takes_one_line_and_writes_nothing(base, by_hand, tasks, tmp_path):
    toy = ["--tasks", "toy", "--include-path", tasks]
    out = tmp_path / "audit"
    assert "or audit any other model beside its base: --base MODEL -o DIR" in refused("audit", by_hand, *toy)
    assert "its base has to be named: --base MODEL" in refused("audit", by_hand, "-o", out, *toy)
    assert "give -o DIR for audit.json" in refused("audit", by_hand, "--base", base, *toy)
    assert "tasks have to be named" in refused("audit", by_hand, "--base", base, "-o", out)
    assert "no-such-folder" in refused("audit", tmp_path / "no-such-folder", "--base", base, "-o", out, *toy)
    assert "no-such-base" in refused("audit", by_hand, "--base", tmp_path / "no-such-base", "-o", out, *toy)
    (tmp_path / "empty").mkdir()
    assert "has neither model.safetensors" in refused("audit", tmp_path / "empty", "--base", base, "-o", out, *toy)
    assert not out.exists()
    model = shutil.copytree(base, tmp_path / "model")
    before = hashes(by_hand), hashes(model)
    assert "it is a model's folder" in refused("audit", by_hand, "--base", base, "-o", by_hand, *toy)
    assert "lies inside the folder" in refused("audit", by_hand, "--base", base, "-o", by_hand / "audit", *toy)
    assert "it is a model's folder" in refused("audit", by_hand, "--base", base, "-o", model, *toy)
    (out / "audit.json").mkdir(parents=True)
    assert "is a folder, and a file of that name" in refused("audit", by_hand, "--base", base, "-o", out, *toy)
    assert (hashes(by_hand), hashes(model)) == before


def test_the_command_prints_the_table_the_verdict_and_where_it_was_written(base, by_hand, tasks, tmp_path):
    out = tmp_path / "audit"
    toy = ["--tasks", "toy", "--include-path", tasks, "--no-generation"]
    said = done("audit", by_hand, "--base", base, "-o", out, *toy).stdout
    assert "candidate" in said
    assert Audit.load(out / "audit.json").verdict in " ".join(said.split())
    assert f"{out / 'audit.json'}, {out / 'card.md'}, {out / 'report.html'}" in " ".join(said.split())


def test_a_base_at_chance_has_no_change_to_speak_of(base, by_hand, tmp_path):
    noise = tiny.eval_set(base, tmp_path / "tasks", "noise", test=20, train=2, known=0.0)
    found = audit(by_hand, ["noise"], out=tmp_path / "out", base=str(base), include_path=[noise], generation=False)
    assert "5 of 6 layers; the change is not known: the base model is not above chance on noise" in found.verdict


def test_a_document_names_plan_receipt_and_removal_or_none_of_them(whole):
    fields = json.loads(whole[0].canonical_json())
    for changes, said in (
        ({"plan_sha256": "1" * 64}, "are given together"),
        ({"heal_sha256": "1" * 64}, "belong to a checkpoint with a plan"),
    ):
        with pytest.raises(DocumentError, match=said):
            Audit.parse(fields | changes, "audit.json")
    ours = fields | {"plan_sha256": "1" * 64, "receipt_sha256": "2" * 64, "removal": [3]}
    assert not Audit.parse(ours, "audit.json").foreign
    with pytest.raises(DocumentError, match="adapter belongs to"):
        Audit.parse(ours | {"adapter": "LORA"}, "audit.json")
