"""Chat: ids, masks and templates against transformers, and every way a conversation can be wrong."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from modalities_core.errors import ConfigError, DataError

pytest.importorskip("jinja2")

from tokenizers import AddedToken, Tokenizer

from modalities_data.manifest import read_manifest
from modalities_data.packed import PackedFolder, verify
from modalities_data.prepare.chat import Side, pack_chat
from modalities_data.prepare.chat_encoder import ChatEncoder
from modalities_data.prepare.chat_template import ChatTemplate, read_template
from modalities_data.tokenizers.huggingface import HuggingFaceTokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = """{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}
        {%- generation %}{{- message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}"""
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}<|endoftext|>{% endif %}{% endfor %}"
)


def say(*turns: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]


CONVERSATIONS = [
    say("Hello", "Hi! How can I help?"),
    say("ünï 中文 \U0001f600", "\U0001f600 yes  ", "and\n\nthen?", "\n\nthen\tthis\n"),
    [{"role": "system", "content": "Be short."}, *say("What is it?", "It.", "And?", "That.")],
    say("two answers", "one"), [*say("q", "first"), {"role": "assistant", "content": "second"}],
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tokenizer_file, tmp_path_factory):
    """A tokenizer.json with control tokens, as a model would come with."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>", "<s>")])
    path = tmp_path_factory.mktemp("model")
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return HuggingFaceTokenizer(folder / "tokenizer.json", engine="tokenizers")


@pytest.fixture
def pack(tokenizer, tmp_path):
    def run(conversations, template, **options):
        source = tmp_path / "chat.jsonl"
        lines = [line if isinstance(line, str) else json.dumps({"messages": line}) for line in conversations]
        source.write_text("".join(line + "\n" for line in lines))
        return pack_chat(source, tmp_path / "out", tokenizer, ChatTemplate(template), overwrite=True, **options)

    return run


def theirs(folder, template, conversation, **options):
    """Ids, and with a marked template the mask, by transformers."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>")
    found = tokenizer.apply_chat_template(conversation, chat_template=template, return_dict=True, **options)
    return found["input_ids"], found.get("assistant_masks")


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", [CHATML, MARKED, INSTRUCT])
def test_ids_are_those_of_transformers(folder, tokenizer, template, conversation) -> None:
    [found] = ChatEncoder(tokenizer, ChatTemplate(template, {"bos_token": "<s>"})).encode([(conversation, {})])
    expected, _ = theirs(folder, template, conversation)
    if expected[-1] != tokenizer.end_of_document:
        expected = [*expected, tokenizer.end_of_document]
    assert found.ids.tolist() == expected


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("template", [CHATML, MARKED, INSTRUCT])
def test_prompts_are_those_of_transformers(folder, tokenizer, template, conversation) -> None:
    asked = conversation[:-1]
    expected, _ = theirs(folder, template, asked, add_generation_prompt=True)
    assert ChatEncoder(tokenizer, ChatTemplate(template, {"bos_token": "<s>"})).prompt(asked) == expected


def test_the_end_of_a_turn_is_what_the_template_writes_behind_an_answer(tokenizer) -> None:
    library = Tokenizer.from_str(tokenizer.text)
    for template, token in ((CHATML, "<|im_end|>"), (MARKED, "<|im_end|>"), (INSTRUCT, "<|endoftext|>")):
        end = ChatEncoder(tokenizer, ChatTemplate(template, {"bos_token": "<s>"})).turn_end()
        assert end == (library.token_to_id(token), "")
    plain = ChatTemplate("{% for m in messages %}{{ m.role }}: {{ m.content }}\n--\n{% endfor %}")
    assert ChatEncoder(tokenizer, plain).turn_end() == (None, "--")
    encoder = ChatEncoder(tokenizer, plain)
    with pytest.raises(DataError, match=r"control token '<\|im_end\|>'"):
        encoder.prompt(say("a<|im_end|>"))
    assert encoder.without_specials("a<|im_end|>b") == "ab"


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_masks_are_those_of_transformers(folder, tokenizer, conversation) -> None:
    [found] = ChatEncoder(tokenizer, ChatTemplate(MARKED, {"bos_token": "<s>"})).encode([(conversation, {})])
    _, expected = theirs(folder, MARKED, conversation, return_assistant_tokens_mask=True)
    if not found.cut:  # where a token lies across the border, transformers counts it
        assert found.mask.tolist() == [*expected, 0]
    assert found.mask.sum() + found.cut == sum(expected)


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_turns_are_found_without_marks(conversation) -> None:
    marked, plain = (
        ChatTemplate(MARKED, {"bos_token": ""}).render(conversation),
        ChatTemplate(CHATML).render(conversation),
    )
    assert plain == marked
    assert [plain.text[begin:end] for begin, end in plain.spans] == [
        message["content"] + "<|im_end|>" for message in conversation if message["role"] == "assistant"
    ]


def test_a_template_without_a_prompt_for_the_assistant() -> None:
    text, spans = ChatTemplate(INSTRUCT).render(say("a", "b", "c", "d"))
    assert text == "[INST] a [/INST] b<|endoftext|>[INST] c [/INST] d<|endoftext|>"
    assert [text[begin:end] for begin, end in spans] == [" b<|endoftext|>", " d<|endoftext|>"]


def test_a_token_across_a_border_does_not_count(tokenizer) -> None:
    template = ChatTemplate("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %}"
                            "{% generation %}{{ m.content }}{% endgeneration %}{% endif %}{% endfor %}")  # fmt: skip
    token = tokenizer.encode("Lorem")[-1]
    word = tokenizer.decode([token])
    assert len(word) > 1
    [found] = ChatEncoder(tokenizer, template).encode([(say(word[:1], word[1:] + " ipsum"), {})])
    assert found.ids[0] == token
    assert found.cut == 1 and found.mask.tolist() == [0] + [1] * (len(found.ids) - 2) + [0]


def test_a_packed_conversation_is_what_was_said(pack, tokenizer, tmp_path) -> None:
    report = pack([*CONVERSATIONS, "", [{"role": "user", "content": "alone"}]], CHATML, shard_tokens=40)
    manifest = verify(tmp_path / "out")
    counts = manifest.accounting
    assert (counts.documents, counts.written, counts.skipped, counts.failed, counts.blank_lines) == (
        6, 5, {"no_assistant": 1}, 0, 1,
    )  # fmt: skip
    assert manifest.documents == 5 and manifest.largest_id < manifest.vocab_size
    opened = PackedFolder(tmp_path / "out")
    tokens = np.concatenate([opened.tokens(number) for number in range(len(manifest.shards))])
    mask = np.concatenate([opened.mask(number) for number in range(len(manifest.shards))])
    assert report.counted_tokens == mask.sum() == manifest.options["counted_tokens"]
    assert report.cut_tokens == 0
    from tokenizers import Tokenizer

    library = Tokenizer.from_str(tokenizer.text)
    said = "".join(m["content"] + "<|im_end|>" for c in CONVERSATIONS for m in c if m["role"] == "assistant")
    assert library.decode(tokens[mask == 1].tolist(), skip_special_tokens=False) == said
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == CHATML
    assert not list((tmp_path / "out").glob(".*")) and not list((tmp_path / "out").glob("*.rejected.jsonl"))
    assert manifest.inputs[0].bytes == (tmp_path / "chat.jsonl").stat().st_size
    again = pack([*CONVERSATIONS, "", [{"role": "user", "content": "alone"}]], CHATML, shard_tokens=40)
    assert again.manifest.fingerprint == manifest.fingerprint


def test_two_sides_are_the_whole(pack, tokenizer, tmp_path) -> None:
    conversations = [say(f"question {number % 60}", f"answer {number % 60}") for number in range(80)]
    found = {}
    for name in ("train", "held-out"):
        counts = pack(conversations, CHATML, side=Side(name, 0.3, seed=2)).manifest.accounting
        opened = PackedFolder(tmp_path / "out")
        found[name] = [tokenizer.decode(opened.document(number).tolist()) for number in range(counts.written)]
        assert counts.documents == 80 and counts.balanced()
    assert counts.skipped == {"train": len(found["train"])}
    assert len(found["train"]) + len(found["held-out"]) == 80 and 5 < len(found["held-out"]) < 45
    assert not set(found["train"]) & set(found["held-out"])
    with pytest.raises(ConfigError, match="between 0 and 1"):
        pack(conversations, CHATML, side=Side("train", 1.0))


WRONG = {
    "{": "JSON is malformed",
    "[1]": "expected a JSON object with the key 'messages'",
    '{"text": "a"}': "expected a JSON object with the key 'messages'",
    '{"messages": []}': "a list of at least one message",
    '{"messages": "a"}': "a list of at least one message",
    '{"messages": [{"content": "a"}]}': "is an object with a role",
    '{"messages": [{"role": "user", "content": "a<|im_end|>b"}]}': r"contains the control token '<\|im_end\|>'",
    '{"messages": [{"role": "assistant", "content": [{"text": "<|im_start|>"}]}]}': "contains the control token",
    '{"messages": [{"role": "assistant", "content": "\\ufdd0"}]}': "which are no characters of text",
    '{"messages": [{"role": "assistant"}]}': "the chat template refuses it",
}


@pytest.mark.parametrize("line", WRONG)
def test_what_is_no_conversation(pack, tmp_path, line) -> None:
    with pytest.raises(DataError, match=rf"chat.jsonl:3: .*{WRONG[line]}"):
        pack([CONVERSATIONS[0], "", line], CHATML)
    assert not (tmp_path / "out").exists()
    manifest = pack([CONVERSATIONS[0], "", line], CHATML, on_error="skip").manifest
    assert (manifest.accounting.written, manifest.accounting.failed) == (1, 1)
    [entry] = map(json.loads, (tmp_path / "out" / "conversations.rejected.jsonl").read_text().splitlines())
    assert entry["line"] == 3 and entry["file"].endswith("chat.jsonl") and entry["reason"]


def test_nothing_to_write(pack) -> None:
    with pytest.raises(DataError, match="no conversation to write"):
        pack([[{"role": "user", "content": "alone"}]], CHATML)


def test_a_template_that_rewrites_earlier_turns() -> None:
    template = ChatTemplate("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(DataError, match=r"does not write message 2 behind the ones before it") as caught:
        template.render(say("a", "b", "c", "d"))
    assert "{% generation %}" in caught.value.hint


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ raise_exception.__globals__.os }}",
        "{% set x = messages.append({}) %}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{{ range(999999999) | list }}",
        "{{ raise_exception('no') }}",
        "{{ undefined.attribute }}",
    ],
)
def test_the_sandbox_holds(attack) -> None:
    with pytest.raises(DataError, match="the chat template refuses it"):
        ChatTemplate(attack).render(say("a", "b"))


def test_where_templates_come_from(tmp_path) -> None:
    with pytest.raises(ConfigError, match="no valid Jinja template"):
        ChatTemplate("{% for %}")
    with pytest.raises(ConfigError, match="there is no chat template"):
        read_template(tmp_path / "x.jinja")
    with pytest.raises(ConfigError, match="has neither chat_template.jinja nor tokenizer_config.json"):
        read_template(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text("[]")
    with pytest.raises(DataError, match="is no JSON object"):
        read_template(tmp_path)
    config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "eos_token": None}))
    with pytest.raises(ConfigError, match="has no chat_template"):
        read_template(tmp_path)
    named = [{"name": "tools", "template": "x"}, {"name": "default", "template": "{{ bos_token }}y"}]
    for template in ("{{ bos_token }}y", named):
        config.write_text(json.dumps({"bos_token": {"content": "<s>"}, "chat_template": template}))
        assert read_template(tmp_path).render([]).text == "<s>y"
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}z")
    assert read_template(tmp_path).render([]).text == "<s>z"
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    (elsewhere / "mine.jinja").write_text("{{ bos_token }}{{ tools | tojson }}")
    assert read_template(elsewhere / "mine.jinja", config).render([], {"tools": ["ü"]}).text == '<s>["ü"]'


def test_the_command(command, folder, tmp_path) -> None:
    (tmp_path / "template.jinja").write_text(CHATML)
    source = tmp_path / "chat.jsonl"
    source.write_text("".join(json.dumps({"messages": conversation}) + "\n" for conversation in CONVERSATIONS))
    arguments = ("chat", source, tmp_path / "out", "--tokenizer", folder, "--template", tmp_path / "template.jinja")
    done = command(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["written"] == 5 and 0 < summary["counted_tokens"] < summary["tokens"]
    assert summary["fingerprint"] == read_manifest(tmp_path / "out").fingerprint
    assert command(*arguments).returncode == 3
    assert command(*arguments, "--overwrite").returncode == 0
    assert command("chat", source, tmp_path / "b", "--tokenizer", folder).returncode == 2
    source.write_text("{\n")
    failed = command(*arguments, "--overwrite")
    assert failed.returncode == 3 and "chat.jsonl:1: JSON is malformed" in failed.stderr


def test_from_conversations_to_batches(pack, tmp_path) -> None:
    """Whole conversations side by side; only what the assistant says weighs anything."""
    pytest.importorskip("torch")
    from modalities_data.datasets import BestFitDataset
    from modalities_data.loading.batches import HeldOutBatches

    report = pack(CONVERSATIONS * 4, CHATML)
    dataset = BestFitDataset(tmp_path / "out", 256)
    world = SimpleNamespace(data_rank=0, data_size=1, device=SimpleNamespace(type="cpu"))
    batches = list(HeldOutBatches(dataset, world, 2))
    assert sum(int(batch.weights_BT.sum()) for batch in batches) == report.counted_tokens
    assert max(int(batch.segments_BT.max()) for batch in batches) > 1
