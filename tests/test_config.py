"""Reading a configuration: what wins, what is refused, and in which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hope_train.config.load import apply_override, dump_yaml, field_docs, load_config, merge, parse_yaml, validate
from hope_train.config.model import ModelConfig
from hope_train.config.tree import RunConfig
from hope_train.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
MODEL = "model: {cms: {levels: [{width: 8}]}}\n"
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(text: str, name: str = "c.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def refusal(path: Path | str, *overrides: str) -> str:
    """The one line with which a configuration is refused."""
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


class TestPrecedence:
    """Defaults < base < file < overrides, in their order."""

    def test_each_layer_lies_over_the_one_before(self, write: Write) -> None:
        write(MODEL + "name: low\ntrain: {tokens: 5, log_every: 3, nan_patience: 7}\n", "base.yaml")
        path = write("base: base.yaml\ntrain: {tokens: 6, log_every: 4}\n")
        config = load_config(path, ["train.tokens=7", "train.tokens=8"])
        assert config.name == "low"
        assert (config.train.nan_patience, config.train.log_every, config.train.tokens) == (7, 4, 8)
        assert config.train.context_length == 512

    def test_base_is_found_beside_the_file_that_names_it(self, write: Write, tmp_path: Path) -> None:
        (tmp_path / "sub").mkdir()
        write(MODEL + "name: deep\n", "sub/b.yaml")
        write("base: b.yaml\n", "sub/a.yaml")
        assert load_config(write("base: sub/a.yaml\n")).name == "deep"

    def test_a_list_is_replaced_whole_and_its_entries_by_number(self, write: Write) -> None:
        write("model: {cms: {levels: [{width: 8}, {width: 16, period: 4}]}}\n", "base.yaml")
        path = write("base: base.yaml\n")
        levels = load_config(path, ["model.cms.levels.1.width=32"]).model.cms.levels
        assert [(level.width, level.period) for level in levels] == [(8, 1), (32, 4)]
        assert len(load_config(path, ["model.cms.levels=[{width: 9}]"]).model.cms.levels) == 1

    def test_an_override_may_make_a_section(self, write: Write) -> None:
        assert load_config(write(MODEL), ["optimizer.schedule.kind=wsd"]).optimizer.schedule.kind == "wsd"

    def test_an_override_s_value_may_hold_an_equals_sign(self, write: Write) -> None:
        assert load_config(write(MODEL), ["data.tokenizer=a=b.model"]).data.tokenizer == "a=b.model"

    def test_nothing_means_null(self, write: Write) -> None:
        assert load_config(write(MODEL), ["train.clip_norm="]).train.clip_norm is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3),
        ("1e6", 1e6),
        ("-2.5E+3", -2500.0),
        (".5e1", 5.0),
        ("100_000", 100000),
        ("1.5", 1.5),
        ("e3", "e3"),
        ("1e", "1e"),
        ("[1e3, x]", [1000.0, "x"]),
        ("null", None),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: object) -> None:
    assert parse_yaml(text) == value
    assert type(parse_yaml(text)) is type(value)


def test_a_count_may_be_written_with_an_exponent(write: Write) -> None:
    config = load_config(write(MODEL), ["train.tokens=100e9"])
    assert config.train.tokens == 100_000_000_000
    assert isinstance(config.train.tokens, int)


class TestRefusals:
    """One line that says what to change."""

    @pytest.mark.parametrize(
        ("overrides", "words"),
        [
            (["train.tokns=5"], ["`train.tokns`", "did you mean `train.tokens`?"]),
            (["lr=1"], ["`lr`", "did you mean `optimizer.lr`?"]),
            (["model.chunk_size=8"], ["did you mean `model.memory.chunk_size`?"]),
            (["model.cms.levels.0.widht=8"], ["did you mean `model.cms.levels.0.width`?"]),
            (["zzzz=1"], ["`zzzz`", "known here: name, dir, seed, model"]),
            (["train.tokens=abc"], ["`train.tokens`", "'abc'"]),
            (["train.tokens=1.5"], ["`train.tokens`", "1.5"]),
            (["train.tokens=0"], ["`train.tokens`", "greater than or equal to 1", "0"]),
            (["train.tokens=true"], ["`train.tokens`", "a number"]),
            (["seed=99999999999999999999999"], ["`seed`", "less than 9223372036854775808"]),
            (["optimizer.lr=1e300"], ["`optimizer.lr`", "1000000"]),
            (["model.cms.levels.0.period=99999999999999999999"], ["period`", "less than 9223372036854775808"]),
            (["train.threads=100000"], ["`train.threads`", "1024"]),
            (["optimizer.lr=.inf"], ["`optimizer.lr`", "finite"]),
            (["model.memory.eta_bias=.nan"], ["`model.memory.eta_bias`", "finite"]),
            (["model.d_model=10", "model.n_heads=3"], ["d_model=10", "n_heads=3"]),
            (["model.memory.chunk_size=48"], ["chunk_size=48", "generator_chunk_size=64"]),
            (["train.batch_tokens=1000"], ["batch_tokens=1000", "512*4=2048"]),
            (["model.arch=hop"], ["`model.arch`", "'hope'", "'hop'"]),
            (["train=5"], ["`train`", "section"]),
            (["train="], ["`train`", "section"]),
            (["model.cms.levels=3"], ["`model.cms.levels`", "list"]),
            (["name=7"], ["`name`", "quotes", "7"]),
            (["name=a b"], ["`name`", "a b"]),
            (["data.sources=[{path: a, hub: b}]"], ["`data.sources.0`", "exactly one of path, hub, builtin"]),
            (["data.sources.0.path=a"], ["data.sources", "set it whole"]),
            (["model.cms.levels.1.width=8"], ["model.cms.levels", "1 entries"]),
            (["train.tokens"], ["'train.tokens'", "key=value"]),
            (["=1"], ["'=1'", "key=value"]),
            (["name={"], ["'name={'", "not valid YAML"]),
            (["name.first=x"], ["name", "not a section"]),
            (["base=x.yaml"], ["unknown key `base`"]),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else None,
    )
    def test_overrides(self, write: Write, overrides: list[str], words: list[str]) -> None:
        message = refusal(write(MODEL + "name: there\n"), *overrides)
        assert [word for word in words if word not in message] == [], message

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            ("", ["no `model` section"]),
            ("[1, 2]", ["mapping", "list"]),
            ("a: [1\n", ["not valid YAML: while parsing a flow sequence line 1, column 4"]),
            (MODEL + "name: a\nname: b\n", ["`name` is there twice", "line 3"]),
            (MODEL + "train: {tokens: 1, tokens: 2}\n", ["`tokens` is there twice"]),
            (MODEL + "1: 2\n", ["`1`"]),
            ("a: !!python/name:os.system x\n", ["not valid YAML"]),
            ("base: nowhere.yaml\n", ["nowhere.yaml"]),
            ("base: c.yaml\n", ["circle"]),
            ("model: {}\n", ["cms.levels"]),
            ("model: {arch: transformer_pp}\n", ["mlp_width"]),
        ],
    )
    def test_files(self, write: Write, text: str, words: list[str]) -> None:
        message = refusal(write(text))
        assert [word for word in words if word not in message] == [], message

    def test_every_problem_is_named_at_once(self, write: Write) -> None:
        message = refusal(write(MODEL), "train.tokens=0", "optimizer.lr=-1", "nme=x")
        assert all(word in message for word in ("train.tokens", "optimizer.lr", "did you mean `name`"))

    def test_a_missing_file_names_its_neighbour(self, write: Write, tmp_path: Path) -> None:
        write(MODEL, "hope_tiny.yaml")
        assert "did you mean" in refusal(tmp_path / "hope_tinny.yaml")
        assert "hope_tiny.yaml" in refusal(tmp_path / "hope_tinny.yaml")
        assert "no configuration file" in refusal(tmp_path)

    def test_a_file_that_is_no_text(self, tmp_path: Path) -> None:
        path = tmp_path / "c.yaml"
        path.write_bytes(b"\xff\xfe\x00")
        assert "cannot be read" in refusal(path)

    def test_a_circle_of_bases(self, write: Write) -> None:
        write("base: b.yaml\n", "a.yaml")
        write("base: a.yaml\n", "b.yaml")
        assert "circle" in refusal(write("base: a.yaml\n"))


class TestTree:
    """The typed tree."""

    def test_what_is_printed_reads_back_equal(self, write: Write) -> None:
        config = load_config(
            write(MODEL + "name: again\n"),
            ["data.sources=[{path: 'tëxt ☃'}]", "optimizer.lr=1e-3", "train.clip_norm=null"],
        )
        again = load_config(write(dump_yaml(config), "again.yaml"))
        assert again == config
        assert dump_yaml(again) == dump_yaml(config)

    def test_it_cannot_be_changed(self, write: Write) -> None:
        config = load_config(write(MODEL))
        with pytest.raises(ValueError, match="frozen"):
            config.train.tokens = 5  # type: ignore[misc]

    def test_the_name_is_in_the_run_directory(self, write: Write) -> None:
        assert load_config(write(MODEL), ["name=a1", "dir=out/{name}/x"]).run_dir == "out/a1/x"

    def test_nested_periods_are_proper_multiples(self) -> None:
        tree: dict[str, Any] = {"cms": {"variant": "nested", "levels": [{"width": 4, "period": p} for p in (1, 4, 6)]}}
        with pytest.raises(UserError, match="proper multiple"):
            validate(ModelConfig, tree)

    def test_steps_are_rounded_up(self, write: Write) -> None:
        config = load_config(write(MODEL), ["train.tokens=4097", "train.batch_tokens=4096", "train.micro_batch_size=8"])
        assert config.train.total_steps == 2

    def test_every_field_has_words_of_its_own(self) -> None:
        rows = list(field_docs(RunConfig))
        keys = [key for key, *_ in rows]
        assert len(keys) == len(set(keys)) > 60
        assert "model.cms.levels.N.period" in keys
        assert "data.sources.N.path" in keys
        assert [key for key, _, _, doc in rows if not doc] == []

    def test_documentation_states_ranges(self) -> None:
        kinds = {key: kind for key, kind, *_ in field_docs(RunConfig)}
        assert kinds["data.validation_fraction"] == "float, >= 0.0, < 1.0"
        assert kinds["train.clip_norm"] == "float | None, > 0.0"


TREES = st.recursive(
    st.none() | st.integers() | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
MAPPINGS = st.dictionaries(st.sampled_from("abc"), TREES, max_size=3)


@given(MAPPINGS, MAPPINGS, MAPPINGS)
def test_merging_keeps_all_keys_and_leaves_its_arguments_alone(
    first: dict[str, Any], second: dict[str, Any], third: dict[str, Any]
) -> None:
    before = yaml.safe_dump([first, second])
    assert merge(first, {}) == first
    assert merge({}, first) == first
    assert merge(first, first) == first
    merged = merge(first, second)
    assert all(key in merged for key in (*first, *second))
    assert yaml.safe_dump([first, second]) == before
    # What lies on top is there unchanged, except where a mapping lies over a mapping.
    for key, value in third.items():
        if not isinstance(value, dict):
            assert merge(merged, third)[key] == value


@given(
    st.lists(st.text("abcxyz_", min_size=1, max_size=4), min_size=1, max_size=4),
    st.none() | st.booleans() | st.integers() | st.text("abc", min_size=1) | st.lists(st.integers()),
)
def test_an_override_sets_exactly_its_key(path: list[str], value: object) -> None:
    tree: dict[str, Any] = {"other": {"kept": 1}}
    apply_override(tree, f"{'.'.join(path)}={json.dumps(value)}")
    assert tree.pop("other") == {"kept": 1}
    node: Any = tree
    for part in path:
        assert list(node) == [part]
        node = node[part]
    assert node == value


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configurations_that_come_with_the_project_are_valid(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert config.train.total_steps >= 1
