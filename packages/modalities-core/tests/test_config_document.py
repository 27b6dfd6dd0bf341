"""Reading YAML: the dialect, positions, extends, overrides, and everything that is refused."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from modalities_core.config.document import Document, dump, load, parse
from modalities_core.config.positions import Position
from modalities_core.errors import ConfigError


def read(text: str) -> Document:
    return parse(text, "c.yaml", Path("/"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("6E+3", 6000.0),
        ("1.", 1.0),
        (".5", 0.5),
        ("-3", -3),
        ("0x1F", 31),
        ("0o17", 15),
        ("010", 10),
        (".inf", float("inf")),
        ("-.Inf", float("-inf")),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("off", "off"),
        ("NO", "NO"),
        ("1_000", "1_000"),
        ("12:30:45", "12:30:45"),
        ("2026-11-23", "2026-11-23"),
        ("~", None),
        ("", None),
        ("null", None),
        ("'1e-4'", "1e-4"),
        ('"true"', "true"),
        ("1e5x", "1e5x"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = read(f"a: {text}").tree["a"]
    assert found == value
    assert type(found) is type(value)


def test_positions_are_those_of_the_keys() -> None:
    document = read("a: 1\nb:\n  - x\n  - y: 2\n")
    assert document.position(("a",)) == Position("c.yaml", 1)
    assert document.position(("b", 1, "y")) == Position("c.yaml", 4)
    assert document.position(("b", 1, "y", "missing")) == Position("c.yaml", 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2\n", r"a: the key stands twice, first in line 1 \(c.yaml:2\)"),
        ("a:\n\tb: 1\n", r"tab.*c.yaml:2"),
        ("a: [1, 2\nb: 3\n", r"c.yaml:2"),
        ("a: !!python/object/apply:os.system [ls]\n", r"tag `!!python/object/apply:os.system` is refused"),
        ("a: !custom 3\n", r"tag `!custom` is refused"),
        ("base: &b {x: 1}\nc:\n  <<: *b\n", r"merge keys are not supported; use `extends`"),
        ("[1, 2]: 3\n", r"a key must be text"),
        ("- 1\n", r"must be a mapping"),
        ("a: {b: ${c}}\n", r"a reference needs quotes"),
        ("", r"is empty"),
        ("a: 1\n---\nb: 2\n", r"c.yaml:2"),
        ("a: " + "[" * 40 + "]" * 40, r"deeper than 32 levels"),
        ("x: " + "y" * (1 << 20), r"larger than 1 MiB"),
    ],
)
def test_refused_text(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(text)


def test_an_alias_bomb_is_refused_quickly() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(ConfigError, match="more than 100000 values"):
        read("\n".join(lines))


def test_all_duplicates_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        read("a: 1\nb: {c: 1, c: 2}\na: 3\n")
    assert "b.c: the key stands twice" in str(caught.value)
    assert "a: the key stands twice" in str(caught.value)


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_extends_merges_mappings_and_replaces_other_components(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", "version: 1\nopt: {component: o.a, lr: 1, eps: 2}\nmodel: {component: m.a, n: 1}\n")
    top = write(tmp_path, "top.yaml", "extends: base.yaml\nopt: {lr: 5}\nmodel: {component: m.b, k: 2}\n")
    document = load(top)
    assert document.tree["opt"] == {"component": "o.a", "lr": 5, "eps": 2}
    assert document.tree["model"] == {"component": "m.b", "k": 2}
    assert document.position(("opt", "lr")) == Position(str(top), 2)
    assert document.position(("opt", "eps")) == Position(str(tmp_path / "base.yaml"), 2)


def test_later_bases_win_over_earlier_ones(tmp_path: Path) -> None:
    write(tmp_path, "one.yaml", "a: 1\nb: 1\n")
    write(tmp_path, "two.yaml", "b: 2\nc: 2\n")
    top = write(tmp_path, "top.yaml", "extends: [one.yaml, two.yaml]\nc: 3\n")
    assert {key: load(top).tree[key] for key in "abc"} == {"a": 1, "b": 2, "c": 3}


def test_extends_in_a_circle_and_missing_files(tmp_path: Path) -> None:
    a = write(tmp_path, "a.yaml", "extends: b.yaml\n")
    write(tmp_path, "b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"a.yaml -> b.yaml -> a.yaml"):
        load(a)
    with pytest.raises(ConfigError, match=r"no such configuration file: .*aa.yaml; did you mean `a.yaml`"):
        load(tmp_path / "aa.yaml")


def test_overrides_set_existing_values_and_component_arguments(tmp_path: Path) -> None:
    file = write(tmp_path, "c.yaml", "s: {n: 1}\nopt: {component: o.a}\nlist: [{component: x.y, every: 1}]\n")
    document = load(file, ["s.n=1e-3", "opt.eps=2", "list.0.every=7", "s={n: [1, two]}"])
    assert document.tree["s"] == {"n": [1, "two"]}
    assert document.tree["opt"]["eps"] == 2
    assert document.tree["list"][0]["every"] == 7
    assert "override opt.eps=2" in str(document.position(("opt", "eps")))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("s.m=1", r"there is no `s.m`; did you mean `s.n`"),
        ("opt.x.y=1", r"there is no `opt.x.y`"),
        ("list.3.every=1", r"there is no `list.3.every`"),
        ("s.n", r"not of the form path=value"),
        ("s.n=[1", r"override s.n=\[1"),
        ("other=3", r"there is no `other`"),
    ],
)
def test_refused_overrides(tmp_path: Path, override: str, message: str) -> None:
    file = write(tmp_path, "c.yaml", "s: {n: 1}\nopt: {component: o.a}\nlist: [{component: x.y, every: 1}]\n")
    with pytest.raises(ConfigError, match=message):
        load(file, [override])


def test_a_dumped_document_reads_back_equal_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path, "base.yaml", "a: {x: '${b}', y: 'true'}\n")
    file = write(tmp_path, "c.yaml", "extends: base.yaml\nb: 1e-4\n")
    document = load(file, ["b=3.0"])
    again = load(write(tmp_path / "sub", "d.yaml", document.dump()))
    assert again.folder == document.folder
    assert again.tree == {"a": {"x": "${b}", "y": "true"}, "b": 3.0, "relative_to": str(tmp_path)}


# PyYAML itself does not round-trip control characters and the exotic line ends.
text = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\u2028\u2029\ufeff"))
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(text, plain, min_size=1, max_size=4))
@example({"a": ["0E0", "1e5", "0o7", "true", "2026-11-23", "010", ".nan"]})
def test_whatever_is_written_is_read_back(tree: dict[str, object]) -> None:
    if "<<" in str(tree):
        return
    assert read(dump(tree)).tree == tree
