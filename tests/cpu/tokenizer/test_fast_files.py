"""tokenizer.json and what lies beside it: what is read, and what is refused."""

import json

import pytest
from tokenizers import AddedToken, decoders, models, processors
from tokenizers import Tokenizer as Backend

from nybble.errors import CheckpointError, RequestError
from nybble.tokenizer import has_tokenizer, load_tokenizer
from nybble.tokenizer.fast import JsonTokenizer


def test_padding_and_what_stands_behind_a_text_are_no_prefix(tmp_path):
    backend = Backend(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    ends = [(name, backend.token_to_id(name)) for name in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ends
    )
    backend.enable_padding(length=16, pad_id=ends[1][1], pad_token="</s>")
    backend.enable_truncation(2)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).prompt_prefix_ids == (ends[0][1],)


def test_added_words_are_vocabulary_and_added_tags_swallow_space(small_folder, tmp_path):
    backend = Backend.from_file(str(small_folder / "tokenizer.json"))
    backend.add_tokens([AddedToken("nybble", normalized=False, special=False)])
    backend.add_special_tokens([AddedToken("<|end|>", rstrip=True, lstrip=True, normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer, text = load_tokenizer(tmp_path), "a nybble b <|end|> \n c<|end|>"
    assert tokenizer.encode(text, "all") == backend.encode(text, add_special_tokens=False).ids
    assert backend.token_to_id("nybble") in tokenizer.encode(text)
    assert "nybble" not in tokenizer.special_tokens


def test_a_vocabulary_that_spells_a_control_token_is_refused(tmp_path):
    backend = Backend(models.BPE(vocab={"<": 0, "s": 1, "<s": 2}, merges=[("<", "s")]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s"])
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<s", "all") == [2]
    with pytest.raises(RequestError, match="spells a control token"):
        tokenizer.encode("<s")


def config_of(template):
    return json.dumps({"chat_template": template})


def copied(small_folder, tmp_path, config):
    (tmp_path / "tokenizer.json").symlink_to(small_folder / "tokenizer.json")
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_bytes(config.encode("latin-1"))
    return tmp_path


def test_where_the_template_comes_from(small_folder, tmp_path):
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    folder = copied(small_folder, tmp_path, config_of(named))
    chat = [{"role": "user", "content": "a"}]
    assert load_tokenizer(folder).render_chat(chat) == "d"
    (folder / "chat_template.jinja").write_text("file")
    assert load_tokenizer(folder).render_chat(chat) == "file"


def test_no_template_is_said_when_one_is_needed(small_folder, tmp_path):
    tokenizer = load_tokenizer(copied(small_folder, tmp_path, None))
    assert has_tokenizer(tmp_path)
    assert tokenizer.encode("hello")
    with pytest.raises(RequestError, match="no chat template"):
        tokenizer.apply_chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ("{", "no valid JSON"),
        ("[" * 100_000, "no valid JSON"),
        ("[]", "no JSON object"),
        ("\xff", "cannot be read"),
        (config_of(3), "chat_template"),
        (config_of([{"name": "other", "template": "x"}]), "default"),
        (json.dumps({"eos_token": ["a"]}), "eos_token"),
        (json.dumps({"bos_token": {"id": 3}}), "bos_token"),
    ],
)
def test_damaged_configurations_are_refused(small_folder, tmp_path, config, says):
    with pytest.raises(CheckpointError, match=says) as error:
        load_tokenizer(copied(small_folder, tmp_path, config))
    assert "tokenizer_config.json" in str(error.value)


def test_a_template_that_is_no_jinja_is_a_damaged_checkpoint(small_folder):
    broken = JsonTokenizer(small_folder / "tokenizer.json", "a\n{% if %}", {})
    with pytest.raises(CheckpointError, match="line 2"):
        broken.apply_chat([{"role": "user", "content": "a"}])


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{}", "no valid tokenizer"),
        (b"\xff{}", "cannot be read"),
        (b"version https://git-lfs.github.com/spec/v1\n", "no valid tokenizer"),
        (Backend(models.BPE()).to_str().encode(), "byte-level"),
    ],
)
def test_damaged_tokenizers_are_refused(tmp_path, data, says):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(CheckpointError, match=says) as error:
        load_tokenizer(tmp_path)
    assert "tokenizer.json" in str(error.value)


def test_a_folder_without_tokenizer_says_what_is_missing(tmp_path):
    assert not has_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"qwen.tiktoken nor tokenizer.json"):
        load_tokenizer(tmp_path)


def test_an_extra_vocabulary_without_ranks_is_refused(small_folder, tmp_path):
    with pytest.raises(CheckpointError, match="leave it out"):
        load_tokenizer(small_folder, tmp_path / "extra.tiktoken")
