import json
import re

import pytest
import yaml

import audit_samples as samples
from layerprune.errors import DocumentError
from layerprune.report.card import BEGIN, END, read_card, write_card


def front_matter(path):
    return yaml.safe_load(path.read_text(encoding="utf-8").split("---\n")[1])


def test_an_unaudited_card_says_so_and_its_metadata_reads_on_the_hub(tmp_path):
    from huggingface_hub import ModelCard

    path = write_card(samples.exported(tmp_path))
    text = path.read_text(encoding="utf-8")
    assert "**Not audited.**" in text
    assert "layers 3 and 11" in text
    assert "Some-135M, 2 of 30 layers removed" in text
    card = ModelCard.load(path)
    assert card.data.base_model == "some-org/Some-135M"
    assert card.data.to_dict()["base_model_relation"] == "finetune"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["layerprune", "layer-pruning", "pruned"]
    assert card.data.eval_results is None


def test_a_model_of_stock_code_needs_no_trust(tmp_path):
    text = write_card(samples.exported(tmp_path)).read_text(encoding="utf-8")
    assert "Stock transformers, no custom code" in text
    assert "trust_remote_code" not in text


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("config.json", {"AutoModelForCausalLM": "org/code--modeling_own.Own"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_own.Own", None]}),
    ],
)
def test_own_code_is_named_and_the_example_trusts_it(tmp_path, file, named):
    folder = samples.exported(tmp_path)
    (folder / file).write_text(json.dumps({"auto_map": named}))
    text = write_card(folder).read_text(encoding="utf-8")
    assert "no custom code" not in text
    assert "It runs its base model's own code (`" in text
    assert text.count('"path/or/repo/of/this/model", trust_remote_code=True)') == 2
    assert ("A name with `--` is code in another repository." in text) == ("--" in str(named))


def test_writing_twice_changes_nothing(tmp_path):
    first = write_card(samples.exported(tmp_path)).read_bytes()
    assert write_card(tmp_path).read_bytes() == first


def test_licence_and_language_come_from_the_base_and_stay(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(
        "---\nlicense: other\nlicense_name: some-licence\nlicense_link: LICENSE\nlanguage: [en]\n"
        "datasets: [x]\n---\nBase."
    )
    out = samples.exported(tmp_path / "out")
    (out / "LICENSE").write_text("terms")
    write_card(out, base)
    found = front_matter(write_card(out))  # once more, as the audit does, without the base at hand
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "some-licence", "LICENSE")
    assert found["language"] == ["en"]
    assert "datasets" not in found  # the pruned model was not trained on anything
    assert "that of the base (`other`); see [LICENSE](LICENSE)" in (out / "README.md").read_text()


@pytest.mark.parametrize("language", ["no", "[en, no]", "[en]", "en"])
def test_norwegian_stays_a_language(tmp_path, language):
    """To YAML 1.1 a bare no is false."""
    from huggingface_hub import ModelCard

    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text(f"---\nlanguage: {language}\n---\nBase.")
    write_card(samples.exported(tmp_path / "out"), base)
    wanted = yaml.load(language, yaml.BaseLoader)
    assert ModelCard.load(tmp_path / "out" / "README.md").data.language == wanted
    assert front_matter(write_card(tmp_path / "out"))["language"] == wanted


def test_without_a_licence_the_card_asks_to_look_it_up(tmp_path):
    assert "No licence was found" in write_card(samples.exported(tmp_path)).read_text()


def test_a_local_base_is_named_without_the_place_it_lies_in(tmp_path):
    local = samples.plan(model=samples.model_ref(id="/home/someone/models/my-base", revision=None))
    path = write_card(samples.exported(tmp_path, local))
    assert "someone" not in path.read_text()
    assert "my-base, 2 of 30 layers removed" in path.read_text()
    assert not {"base_model", "base_model_relation"} & set(front_matter(path))


def test_what_people_wrote_outside_the_marks_is_kept(tmp_path):
    path = write_card(samples.exported(tmp_path))
    text = path.read_text(encoding="utf-8")
    text = text.replace(BEGIN, "My own introduction.\n\n" + BEGIN) + "\nMy own closing words.\n"
    text = text.replace("---\n", "---\nthumbnail: cat.png\n", 1)
    path.write_text(text.replace("Not audited", "Changed by hand inside the marks"), encoding="utf-8")
    write_card(tmp_path)
    renewed = path.read_text(encoding="utf-8")
    assert "My own introduction." in renewed.split(BEGIN)[0]
    assert renewed.split(END)[1].strip() == "My own closing words."
    assert "Changed by hand" not in renewed
    assert front_matter(path)["thumbnail"] == "cat.png"


def test_a_card_of_another_making_is_kept_below(tmp_path):
    samples.exported(tmp_path)
    (tmp_path / "README.md").write_text("# Written before\n")
    text = write_card(tmp_path).read_text()
    assert text.index("Not audited") < text.index("# Written before")


def test_metadata_that_is_not_yaml_is_an_error_and_the_card_stays(tmp_path):
    samples.exported(tmp_path)
    broken = "---\nlicense: [\n---\ntext"
    (tmp_path / "README.md").write_text(broken)
    with pytest.raises(DocumentError, match="not YAML"):
        write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == broken


def test_a_card_that_is_not_utf_8_is_an_error_and_the_card_stays(tmp_path):
    samples.exported(tmp_path)
    (tmp_path / "README.md").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(DocumentError, match=r"README\.md cannot be read, a card is text in UTF-8: 'utf-8' codec"):
        write_card(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == "Größe".encode("latin-1")


def test_missing_documents_are_named(tmp_path):
    with pytest.raises(DocumentError, match=r"plan\.json does not exist"):
        write_card(tmp_path)


def test_table_rows_have_as_many_cells_as_their_heads(tmp_path):
    rows = [line for line in write_card(samples.exported(tmp_path)).read_text().splitlines() if line.startswith("|")]
    assert len(rows) >= 10
    head = 0
    for row, following in zip(rows, [*rows[1:], ""], strict=True):
        cells = len(re.findall(r"(?<!\\)\|", row))
        if re.match(r"\|[-:|]+\|$", following):
            head = cells
        assert cells == head, row


def test_a_file_without_metadata_is_all_text(tmp_path):
    (tmp_path / "README.md").write_text("no front matter\n---\nlater rule")
    assert read_card(tmp_path / "README.md") == ({}, "no front matter\n---\nlater rule")
