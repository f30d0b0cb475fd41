"""Tokenizers from local folders: which one is found, read as its files say, and what is said where there is none."""

import io
import json

import pytest

from musubi_tuner.config.errors import UserError
from musubi_tuner.nn.text.tokenizers import find_folder, load_t5_tokenizer

PLACES = ("google/umt5-xxl", "tokenizer", ".")


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    """A sentencepiece model with byte fallback, of a few sentences."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red seven moving left", "a blue one", "two green eights", "zero"] * 20),
        model_writer=model,
        model_type="unigram",
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    folder = tmp_path_factory.mktemp("spiece")
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(scope="module")
def saved(spiece, tmp_path_factory):
    """The same as `tokenizer.json` alone."""
    folder = tmp_path_factory.mktemp("json")
    text = load_t5_tokenizer(spiece).backend_tokenizer.to_str()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    return folder


def find(named, beside):
    return find_folder(named, "t5_tokenizer", beside, PLACES, "someone/nothing-of-this-name")


def test_both_files_give_sentencepiece_s_own_tokens(spiece, saved):
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(spiece / "spiece.model"))
    for text in ("a red seven", "two ones moving left", ""):
        expected = [*model.encode(text), 1]
        assert load_t5_tokenizer(spiece)(text).input_ids == expected
        assert load_t5_tokenizer(saved)(text).input_ids == expected


def test_padding_is_on_the_right_and_masked(saved):
    batch = load_t5_tokenizer(saved)(["a red seven", "a"], padding="longest", return_tensors="pt")
    short = int(batch.attention_mask[1].sum())
    assert batch.attention_mask[1, :short].all()
    assert not batch.attention_mask[1, short:].any()
    assert (batch.input_ids[1, short:] == 0).all()


def test_the_first_usual_place_beside_the_checkpoint_wins(saved, tmp_path):
    checkpoint = tmp_path / "t5.safetensors"
    for place in ("tokenizer", "google/umt5-xxl"):
        folder = tmp_path / place
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text((saved / "tokenizer.json").read_text(encoding="utf-8"), encoding="utf-8")
    assert find(None, checkpoint) == tmp_path / "google" / "umt5-xxl"
    assert find(str(tmp_path / "tokenizer"), checkpoint) == tmp_path / "tokenizer"
    assert find(str(tmp_path / "tokenizer" / "tokenizer.json"), checkpoint) == tmp_path / "tokenizer"


def test_a_missing_tokenizer_is_answered_with_what_to_put_where(tmp_path):
    told = (
        r"put tokenizer.json or spiece.model of someone/nothing-of-this-name in .*google/umt5-xxl, or name its folder"
    )
    with pytest.raises(UserError, match=told):
        find(None, tmp_path / "t5.safetensors")
    with pytest.raises(UserError, match=r"--t5_tokenizer .*: there is no tokenizer.json or spiece.model in it"):
        find(str(tmp_path), tmp_path / "t5.safetensors")


def test_files_of_another_kind_are_refused(saved, tmp_path):
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read"):
        load_t5_tokenizer(tmp_path)
    content = json.loads((saved / "tokenizer.json").read_text(encoding="utf-8"))
    content["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="not one </s>: it is not a T5 tokenizer"):
        load_t5_tokenizer(tmp_path)
