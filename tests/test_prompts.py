"""The prompt grammar: every rule of it, the examples of docs/prompts.md, and that no text can break it."""

import ast
import csv
import logging
import random
import re
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.models.tokenizer import ClipTokenizer
from sfumato.prompts import grammar
from sfumato.prompts.choices import MAX_WILDCARDS, choose
from sfumato.prompts.chunks import Chunk, Place, chunks, even, rows
from sfumato.prompts.emphasis import BREAK, Piece, emphasis
from sfumato.prompts.networks import Hypernet, Lora, Other, extract
from sfumato.prompts.prompt import Part, parse, plan, split_and
from sfumato.prompts.styles import Style, apply_styles, find_styles, read_styles, strip_comments, write_styles
from sfumato.prompts.timeline import timeline
from sfumato.prompts.weighting import WEIGHTINGS, join, pad_to, weigh

PAGE = Path(__file__).parents[1] / "docs" / "prompts.md"
SOUP = st.text(alphabet="ab ,.:|()[]{}\\<>#_$123-+=\nANDé", max_size=60)
WORDS = st.lists(st.sampled_from(["BREAK", "AND", "[a:b:3]", "(a:1.2)", "[a|", ":.5]", "<lora:x:1>", "{a|b}", "__x__"]))
GARBAGE = st.one_of(st.text(max_size=60), SOUP, WORDS.map(" ".join), WORDS.map("".join))


class Numbers:
    """A tokenizer whose words are numbers: the text "7 7 8" has the ids 7, 7, 8; a comma is 9."""

    start, end = 1, 2

    def encode(self, text):
        return [9 if word == "," else int(word) for word in text.split()]


class Letters:
    """A tokenizer whose tokens are characters."""

    start, end = 0, 1

    def encode(self, text):
        return [ord(letter) for letter in text]


LETTERS = Letters()


def pieces(*texts):
    return [BREAK if text is BREAK else Piece(text, 1.0) for text in texts]


# docs/prompts.md


def networks(text):
    bare, found = extract(text)
    return bare, list(found)


EXAMPLES = {
    "emphasis": (emphasis, {"BREAK": BREAK}),
    "timeline": (timeline, {}),
    "and": (split_and, {}),
    "networks": (networks, {"Lora": Lora, "Hypernet": Hypernet, "Other": Other}),
    "comments": (strip_comments, {}),
    "choices": (lambda text: choose(text, random.Random(0)), {}),
}


def page_examples():
    for kind, number, body in re.findall(r"^```(\w+) ?(\d*)\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        for line in body.splitlines():
            text, _, answer = line.partition(" -> ")
            yield kind, number, text.rstrip(), answer


@pytest.mark.parametrize(("kind", "number", "text", "answer"), page_examples())
def test_example_of_the_page(kind, number, text, answer):
    function, names = EXAMPLES[kind]
    expected = eval(answer, {"__builtins__": {}}, names)  # our own page
    assert function(text, *([int(number)] if number else [])) == expected


def test_the_page_has_examples_of_every_kind():
    assert {kind for kind, *_ in page_examples()} == set(EXAMPLES)


# Schedules


def alternating(*texts, steps=10):
    return [(step, texts[(step - 1) % len(texts)]) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [b:3 ]", [(3, "a "), (10, "a b")]),
        ("a [b:\n3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("a [[b]:2]", [(2, "a "), (10, "a [b]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("(a [b:.5]:1.2)", [(5, "(a :1.2)"), (10, "(a b:1.2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("a [{b|d{:.5] c", [(10, "a [{b|d{:.5] c")]),
        ("((a][:b:c [d:3]", [(3, "((a][:b:c "), (10, "((a][:b:c d")]),
        ("[a|(b:1.1)]", alternating("a", "(b:1.1)")),
        ("[fe|]male", alternating("female", "male")),
        ("[fe|||]male", alternating("female", "male", "male", "male")),
        ("[|]", alternating("")),
        ("[[a|b]|c]", alternating("a", "c")),
        ("[a|[b:c:3]]", alternating("a", "b", "a", "c", "a", "c", "a", "c", "a", "c")),
        ("[a::3]", [(3, "a"), (10, "")]),
        ("[::3]", [(3, ""), (10, "")]),
        ("[:3]", [(3, ""), (10, "")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:1.]", [(10, "a")]),
        ("[a:b:1]", [(1, "a"), (10, "b")]),
        ("[a:b:99]", [(10, "a")]),
        ("[a:b:1e1]", [(10, "a")]),
        ("[a:b:+2]", [(2, "a"), (10, "b")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-1]", [(10, "b")]),
        ("[a:b:.05]", [(10, "b")]),  # 0.5 of a step: none
        ("[a:b:1e999]", [(10, "a")]),
        ("[a:b]", [(10, "[a:b]")]),
        ("[a:b:c:3]", [(10, "[a:b:c:3]")]),
        ("[a:b:x]", [(10, "[a:b:x]")]),
        ("[a:b|c:3]", [(10, "[a:b|c:3]")]),
        ("[(a:b:c):3]", [(10, "[(a:b:c):3]")]),
        ("[a(:3]", [(10, "[a(:3]")]),
        ("(a:b:c [d:3])", [(3, "(a:b:c )"), (10, "(a:b:c d)")]),
        ("[x:[a:3]:c:5]", [(3, "[x::c:5]"), (10, "[x:a:c:5]")]),
        ("[a:3]]", [(3, "]"), (10, "a]")]),
        ("[[a:3]", [(3, "["), (10, "[a")]),
        ("(a [b:3])) c", [(3, "(a )) c"), (10, "(a b)) c")]),
        ("(a:b:3) [c:1]", [(1, "(a:b:3) "), (10, "(a:b:3) c")]),
        ("a | b [c:3]", [(10, "a | b [c:3]")]),
        ("(a|b) [c:3]", [(10, "(a|b) [c:3]")]),
        ("[a|b", [(10, "[a|b")]),
        ("[b:3] \\", [(10, "[b:3] \\")]),
        ("[b:3] \\\n", [(10, "[b:3] \\\n")]),
        (r"a \[b:3\]", [(10, r"a \[b:3\]")]),
        (r"[a\:\|\]b:3]", [(3, ""), (10, r"a\:\|\]b")]),
        ("[]()", [(10, "[]()")]),
    ],
)
def test_schedules(text, entries):
    assert timeline(text, 10) == entries


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("a [b:.5] c", [(8, "a b c")]),
        ("a [b:1.5] c", [(4, "a  c"), (8, "a b c")]),
        ("a [b:10] c", [(8, "a b c")]),
        ("a [b:12] c", [(2, "a  c"), (8, "a b c")]),
        ("a [b:2.5] c", [(8, "a  c")]),
        ("[a|b]", alternating("a", "b", steps=8)),
    ],
)
def test_hires_pass_counts_on_from_the_first(text, entries):
    assert timeline(text, 8, hires=True, base_steps=10) == entries


@pytest.mark.parametrize(
    ("text", "entries"),
    [
        ("[a:b:.5]", [(5, "a"), (10, "b")]),
        ("[a:b:1.5]", [(1, "a"), (10, "b")]),  # a step, though it has a point
        ("[a:b:1.0]", [(1, "a"), (10, "b")]),
        ("[a:b:3]", [(3, "a"), (10, "b")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:-1]", [(10, "b")]),
    ],
)
def test_old_timelines(text, entries):
    assert timeline(text, 10, old=True) == entries
    assert timeline(text, 99, old=True, hires=True, base_steps=10) == entries  # no timeline of its own


@pytest.mark.parametrize("options", [{"steps": 0}, {"steps": 5, "hires": True}])
def test_wrong_options_are_errors(options):
    with pytest.raises(ValueError, match="steps="):
        timeline("[a:b:3]", **options)


def test_a_tree_holds_what_was_read():
    tree = grammar.parse("x [a:b:3] [c|d]")
    kinds = [type(node) for node in grammar.walk(tree)]
    assert Counter(kinds) == {grammar.Scheduled: 1, grammar.Alternate: 1}
    assert grammar.parse("no (schedule) here") == "no (schedule) here"


# AND


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [("", 1.0)]),
        ("a cat ", [("a cat", 1.0)]),
        ("a cat:1.2", [("a cat", 1.2)]),
        ("a :1.AND b : .5 AND c:-2", [("a", 1.0), (" b", 0.5), (" c", -2.0)]),
        ("a\nb :2\n", [("a\nb", 2.0)]),
        ("a:1:2", [("a:1", 2.0)]),
        ("a:+2", [("a", 2.0)]),
        ("a:b", [("a:b", 1.0)]),
        ("a:1e5", [("a:1e5", 1.0)]),
        (":2", [("", 2.0)]),
        ("BAND ANDY and AND", [("BAND ANDY and", 1.0), ("", 1.0)]),
        ("a:" + "9" * 400, [("a:" + "9" * 400, 1.0)]),
    ],
)
def test_split_and(text, parts):
    assert split_and(text) == parts


# Emphasis


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", [("", 1.0)]),
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        ("[un(balanced", [("un", 1 / 1.1), ("balanced", 1.1 * (1 / 1.1))]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        (r"a\\b\:c\|d\n", [(r"a\b:c|dn", 1.0)]),
        ("a\\", [("a", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        ("a) b] c:1.2)", [("a) b] c:1.2)", 1.0)]),
        ("[a:1.5]", [("a:1.5", 1 / 1.1)]),
        ("(a: -.5 )", [("a", -0.5)]),
        ("(a:+2.)", [("a", 2.0)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("(a:)", [("a:", 1.1)]),
        (r"(a\:1.5)", [("a", 1.5)]),  # the backslash protects nothing here
        ("(a:" + "9" * 400 + ")", [("a:" + "9" * 400, 1.1)]),
        ("(a:0)", [("a", 0.0)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
                (", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1),
            ],
        ),
    ],
)  # fmt: skip
def test_emphasis(text, expected):
    assert emphasis(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a BREAK b", pieces("a", BREAK, "b")),
        ("a\n BREAK \nBREAK b", pieces("a", BREAK, BREAK, "b")),
        ("BREAK", pieces(BREAK)),
        ("BREAKER xBREAK break", pieces("BREAKER xBREAK break")),
        ("a,BREAK:b", pieces("a,", BREAK, ":b")),
        ("(a BREAK b:1.5)", [Piece("a", 1.5), BREAK, Piece("b", 1.5)]),
        ("(a)BREAK(b)", [Piece("a", 1.1), BREAK, Piece("b", 1.1)]),
    ],
)
def test_break_is_a_mark_of_its_own(text, expected):
    assert emphasis(text) == expected


# Chunks


def test_there_is_always_a_chunk():
    assert chunks(emphasis(""), Numbers()) == [Chunk()]
    assert chunks([], Numbers()) == [Chunk()]


def test_break_ends_a_chunk_also_an_empty_one():
    got = chunks(pieces(BREAK, "3 4", BREAK, BREAK, "5", BREAK), Numbers())
    assert [chunk.ids for chunk in got] == [(), (3, 4), (), (5,)]


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("3 " * 75, [75]),
        ("3 " * 76, [75, 1]),
        ("3 " * 54 + ", " + "3 " * 30, [75, 10]),  # 21 tokens from the comma to the end: too far back
        ("3 " * 55 + ", " + "3 " * 30, [56, 30]),
        ("3 " * 74 + ", " + "3", [75, 1]),
        ("3 " * 75 + ", " + "3 " * 80, [75, 75, 6]),  # a comma that begins a chunk is not remembered
        ("3 " * 60 + ", 3 , " + "3 " * 80, [63, 75, 5]),
        ("3 " * 60 + ", " + "3 " * 14, [75]),  # not one word more: nothing moves
    ],
)
def test_a_full_chunk_ends_after_a_near_comma(text, lengths):
    assert [len(chunk.ids) for chunk in chunks(pieces(text), Numbers())] == lengths


def test_weights_move_with_their_words():
    text = [Piece("3 " * 60 + ",", 1.0), Piece("4 " * 10, 1.5), Piece("5 " * 10, 0.5)]
    first, second = chunks(text, Numbers())
    assert first.ids == (3,) * 60 + (9,) and set(first.weights) == {1.0}
    assert second.ids == (4,) * 10 + (5,) * 10 and second.weights == (1.5,) * 10 + (0.5,) * 10


@pytest.mark.parametrize(("backtrack", "lengths"), [(0, [75, 10]), (20, [75, 10]), (30, [51, 34])])
def test_backtrack(backtrack, lengths):
    got = chunks(pieces("3 " * 50 + ", " + "3 " * 34), Numbers(), backtrack=backtrack)
    assert [len(chunk.ids) for chunk in got] == lengths


def test_embeddings_take_the_places_of_their_names():
    names = {"5": 2, "5 6": 3, "4": 1}
    (chunk,) = chunks([Piece("3 5 6 5", 1.0), Piece("5 4", 1.5)], Numbers(), embeddings=names)
    assert chunk.places == (Place(1, "5 6"), Place(4, "5"), Place(6, "5"), Place(8, "4"))
    assert chunk.ids == (3, 0, 0, 0, 0, 0, 0, 0, 0)
    assert chunk.weights == (1.0,) * 6 + (1.5,) * 3


def test_an_embedding_is_never_cut_and_moves_whole():
    first, second = chunks(pieces("3 " * 74 + "5 3"), Numbers(), embeddings={"5": 2})
    assert len(first.ids) == 74 and second.places == (Place(0, "5"),)
    first, second = chunks(pieces("3 " * 60 + ", 4 5 " + "3 " * 20), Numbers(), embeddings={"5": 2})
    assert len(first.ids) == 61 and first.places == () and second.places == (Place(1, "5"),)
    assert second.ids == (4, 0, 0, *(3,) * 20)


@pytest.mark.parametrize("options", [{"room": 0}, {"backtrack": -1}, {"embeddings": {"5": 76}}])
def test_chunks_refuse_wrong_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        chunks(pieces("3"), Numbers(), **options)


def test_rows_are_of_77():
    parts = chunks(pieces("3 4", BREAK, "5 " * 75), Numbers())
    ids, weights = rows([Chunk((3, 4), (1.5, 1.0)), parts[1]], Numbers(), pad=0)
    assert ids == [[1, 3, 4, 2] + [0] * 73, [1] + [5] * 75 + [2]]
    assert weights == [[1.0, 1.5] + [1.0] * 75, [1.0] * 77]
    assert rows([Chunk()], Numbers())[0] == [[1] + [2] * 76]


def test_even_fills_up_with_empty_chunks():
    one, two = [Chunk((3,), (1.0,))], [Chunk((4,), (1.0,)), Chunk((5,), (1.0,))]
    assert even([one, two]) == [[*one, Chunk()], two]
    assert even([]) == []


def test_the_real_tokenizer():
    tokenizer = ClipTokenizer()
    (chunk,) = chunks(emphasis("a (red:1.5) cat"), tokenizer)
    assert rows([chunk], tokenizer)[0] == [tokenizer.pad(tokenizer.encode("a red cat"))]
    assert chunk.weights == (1.0, 1.5, 1.0)
    (named,) = chunks(emphasis("by Style-Of, 1"), tokenizer, embeddings={"style-of": 4})
    assert named.places == (Place(1, "style-of"),) and named.ids[5] == tokenizer.encode(",")[0]
    assert [len(each.ids) for each in chunks(emphasis("cat, " * 40), tokenizer)] == [75, 5]


# Weighting


def some_states():
    generator = torch.Generator().manual_seed(0)
    z, empty = torch.randn(2, 5, 8, generator=generator) + 0.3, torch.randn(1, 5, 8, generator=generator)
    return z, torch.tensor([[1.0, 1.5, 1.5, 1.0, 1.0], [1.0, 0.5, -1.0, 0.0, 1.0]]), empty


def test_original_weights_and_keeps_each_row_s_mean():
    z, weights, _ = some_states()
    got = weigh(z, weights)
    torch.testing.assert_close(got.mean(dim=(1, 2)), z.mean(dim=(1, 2)))
    ratio = got / (z * weights[..., None])
    torch.testing.assert_close(ratio[0], ratio[0, 0, 0].expand(5, 8))
    torch.testing.assert_close(weigh(z[1:], weights[1:]), got[1:])  # alone as in a batch


def test_other_weightings():
    z, weights, empty = some_states()
    torch.testing.assert_close(weigh(z, weights, "no norm"), z * weights[..., None])
    comfy = weigh(z, weights, "comfy", empty)
    torch.testing.assert_close(comfy, torch.lerp(empty.expand_as(z), z, weights[..., None].expand_as(z)))
    assert torch.equal(comfy[0, 0], z[0, 0])
    assert torch.equal(weigh(z, weights, "comfy", empty[0]), comfy)
    for how in ("ignore", "none"):
        assert weigh(z, weights, how) is z
    for how in WEIGHTINGS:
        assert weigh(z, torch.ones(2, 5), how) is z
    assert weigh(z.bfloat16(), weights).dtype == torch.bfloat16
    assert weigh(torch.zeros(1, 5, 8), weights[:1]).isfinite().all()


def test_weigh_refuses_wrong_options():
    z, weights, _ = some_states()
    with pytest.raises(ValueError, match="weighting=perp: allowed are original"):
        weigh(z, weights, "perp")
    with pytest.raises(ValueError, match="empty prompt"):
        weigh(z, weights, "comfy")


def test_join_and_pad_to():
    z, _, empty = some_states()
    long = join(z, 2)
    assert long.shape == (1, 10, 8) and torch.equal(long[0, 5:], z[1])
    short, same = pad_to(z[:1], long)
    assert same is long and torch.equal(short[0, 5:], z[0, -1].expand(5, 8))
    _, filled = pad_to(long, z[:1], empty)
    assert torch.equal(filled[0, 5:], empty[0]) and torch.equal(filled[0, :5], z[0])
    with pytest.raises(ValueError, match="num_chunks=2"):
        join(torch.zeros(3, 5, 8), 2)
    with pytest.raises(ValueError, match="context=5"):
        pad_to(z, torch.zeros(2, 8, 8), empty)


# Extra networks


@pytest.mark.parametrize(
    ("tag", "network"),
    [
        ("<lora:x>", Lora("x")),
        ("<lora:x:.5>", Lora("x", 0.5, 0.5)),
        ("<lora:x:0.5:0.7>", Lora("x", 0.5, 0.7)),
        ("<lora:x:-1:0.7:8>", Lora("x", -1.0, 0.7, 8)),
        ("<lora:x:te=.5>", Lora("x", 0.5, 0.5)),
        ("<lora:x:unet=.5>", Lora("x", 1.0, 0.5)),
        ("<lora:x:.2:te=.5:.7:dyn=4>", Lora("x", 0.5, 0.7, 4)),
        ("<lora:a=b:1:lbw=1,0:1:2:z>", Lora("a=b", 1.0, 1.0, 2, ("z", "lbw=1,0"))),
        ("<lyco:x:.5>", Lora("x", 0.5, 0.5)),
        ("<hypernet:x>", Hypernet("x")),
        ("<hypernet:x:0.3:y>", Hypernet("x", 0.3, ("y",))),
        ("<foo:a:b=1>", Other("foo", ("a", "b=1"))),
    ],
)
def test_networks(tag, network):
    assert extract(f"a {tag} b") == ("a  b", (network,))


@pytest.mark.parametrize(
    "tag", ["<lora:x:0,8>", "<lora:x:nan>", "<lora:x:1:1:2.5>", "<lora::1>", "<hypernet: :1>", "<hypernet:x:y>"]
)
def test_a_tag_that_cannot_be_read_stays_and_is_named(tag, caplog):
    with caplog.at_level(logging.WARNING):
        assert extract(f"a {tag}<lora:y>") == (f"a {tag}", (Lora("y"),))
    assert tag in caplog.text


@pytest.mark.parametrize("text", ["<lora>", "a < b : c > d", "<lora:>", "< lora:x>", "<lora:x", "1<2>3"])
def test_what_is_no_tag(text):
    assert extract(text) == (text, ())


# Styles and comments


def test_styles_file_is_read_and_written(tmp_path):
    path = tmp_path / "styles.csv"
    styles = [Style("ink", 'ink, "{prompt}"\nline 2', "colour"), Style("plain, really", "ünï", "")]
    write_styles(path, styles)
    assert read_styles(path) == {style.name: style for style in styles}
    assert path.read_bytes().startswith(b"\xef\xbb\xbfname,prompt,negative_prompt\r\n")
    with path.open(encoding="utf-8-sig", newline="") as file:
        assert [row["negative_prompt"] for row in csv.DictReader(file)] == ["colour", ""]
    assert [file.name for file in tmp_path.iterdir()] == ["styles.csv"]


def test_old_and_odd_styles_files(tmp_path):
    path = tmp_path / "styles.csv"
    path.write_text("name,text\na, old text\n# b,comment\n,nameless\na,newer\nshort\n")
    assert read_styles(path) == {"a": Style("a", "newer"), "short": Style("short")}
    path.write_text("")
    assert read_styles(path) == {}
    path.write_text("title,words\na,b\n")
    with pytest.raises(ValueError, match="must name the columns name, prompt"):
        read_styles(path)
    path.write_bytes(b"name,prompt\na,\xff\xfe\n")
    with pytest.raises(ValueError, match="not a CSV file of UTF-8"):
        read_styles(path)


def test_unknown_style_is_one_line_with_the_nearest():
    styles = {name: Style(name) for name in ("watercolour", "ink", "oil")}
    assert find_styles(["ink", "oil"], styles) == [Style("ink"), Style("oil")]
    with pytest.raises(ValueError, match=r"^styles=watercolor: no such style; did you mean watercolour\?$"):
        find_styles(["ink", "watercolor"], styles)
    with pytest.raises(ValueError, match="there are 3 styles"):
        find_styles(["zzz"], styles)


@pytest.mark.parametrize(
    ("text", "additions", "result"),
    [
        ("cat", ["ink"], "cat, ink"),
        ("cat", ["ink, {prompt}, {prompt}!", "oil"], "ink, cat, cat!, oil"),
        ("", ["ink"], "ink"),
        ("cat", ["", " "], "cat"),
        ("cat # or dog", ["ink # black"], "cat, ink"),
    ],
)
def test_styles(text, additions, result):
    assert apply_styles(text, additions) == result


@pytest.mark.parametrize(
    ("text", "result"),
    [("a #b\nc", "a \nc"), ("#a\nb", "b"), ("a\n#b\n#c\nd", "a\nd"), ("a#", "a"), ("a\n #b", "a\n ")],
)
def test_comments(text, result):
    assert strip_comments(text) == result


# Choices


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "animals").mkdir()
    (tmp_path / "colours.txt").write_text("# three\nred\n\n  green  \n{blue|blue}\n")
    (tmp_path / "animals" / "cats.txt").write_text("lion\n")
    (tmp_path / "animals" / "dogs.txt").write_text("wolf\n")
    (tmp_path / "any.txt").write_text("__animals/cats__\n")
    (tmp_path / "loop.txt").write_text("x __loop__ __loop__\n")
    (tmp_path / "hidden_loop.txt").write_text("{1$$__hidden_loop__}\n")
    return tmp_path


def drawn(text, wildcards=None, num=300):
    return Counter(choose(text, random.Random(seed), wildcards) for seed in range(num))


@pytest.mark.parametrize(
    ("text", "results"),
    [
        ("{a|b|c}", {"a", "b", "c"}),
        ("{a|}x", {"ax", "x"}),
        ("{a{1|2}|b}", {"a1", "a2", "b"}),
        ("{2$$a|b|c}", {"a, b", "a, c", "b, a", "b, c", "c, a", "c, b"}),
        ("{2$$ and $$a|b}", {"a and b", "b and a"}),
        ("{2$$$$a|b}", {"ab", "ba"}),
        ("{1-2$$a|b}", {"a", "b", "a, b", "b, a"}),
        ("{-1$$a|b}", {"a", "b"}),
        ("{2-$$a|b}", {"a, b", "b, a"}),
        ("{5$$a|b}", {"a, b", "b, a"}),
        ("{0-1$$a}", {"", "a"}),
        ("{0::a|b}", {"b"}),
        ("{0::a|0::b}", {"a", "b"}),
        (r"\{a|b\} {c\|d|e}", {r"\{a|b\} c\|d", r"\{a|b\} e"}),
        ("{a}", {"{a}"}),
        ("a|b {c", {"a|b {c"}),
        ("{a|b", {"{a|b"}),
        ("{{a|b}|c", {"{a|c", "{b|c"}),
        ("a|b}", {"a|b}"}),
    ],
)
def test_choices(text, results):
    assert set(drawn(text)) == results


def test_choices_are_as_frequent_as_their_weights():
    counts = drawn("{3::a|b}", num=4000)
    assert 0.72 < counts["a"] / 4000 < 0.78
    assert min(drawn("{a|b|c|d}", num=4000).values()) > 850
    first = Counter(text[0] for text in drawn("{2$$8::a|1::b|1::c}", num=1000).elements())
    assert 0.76 < first["a"] / 1000 < 0.84


def test_same_seed_same_choice():
    text = "{a|b|c} {2$$1|2|3|4} {x|y}"
    assert choose(text, random.Random(3)) == choose(text, random.Random(3)) == "b 2, 1 y"


@pytest.mark.parametrize(
    ("text", "results"),
    [
        ("a __colours__ cat", {"a red cat", "a green cat", "a blue cat"}),
        ("__animals/cats__", {"lion"}),
        ("__animals/*__", {"lion", "wolf"}),
        ("__any__", {"lion"}),
        ("{2$$__animals/*__}", {"lion, wolf", "wolf, lion"}),
        ("{__any__|b}", {"lion", "b"}),
        ("{__any__}", {"{lion}"}),
        ("__nothing__ ____ __init", {"__nothing__ ____ __init"}),
        ("__../secret__ __/etc/hosts__", {"__../secret__ __/etc/hosts__"}),
    ],
)
def test_wildcards(folder, text, results):
    (folder.parent / "secret.txt").write_text("secret\n")
    assert set(drawn(text, folder, 60)) == results


def test_missing_and_endless_wildcards_are_named(folder, caplog):
    with caplog.at_level(logging.WARNING):
        choose("__nothing__ __nothing__", random.Random(0), folder)
        assert caplog.text.count("__nothing__") == 1
        endless = choose("__loop__", random.Random(0), folder)
        assert endless.count("x") == MAX_WILDCARDS and "__loop__" in caplog.text
        assert choose("__hidden_loop__", random.Random(0), folder) == "__hidden_loop__"
    with pytest.raises(ValueError, match="wildcards=.*no such folder"):
        choose("a", random.Random(0), folder / "missing")


# A whole prompt


def test_the_order_of_reading(folder):
    style = Style("s", "{{prompt}|{prompt}} AND [x:__any__:2] # note", "bad {prompt}")
    prompt = parse("a <lora:y:.5> # b", 4, styles=[style], rng=random.Random(0), wildcards=folder)
    assert prompt.text == "a <lora:y:.5> AND [x:lion:2]"
    assert prompt.parts == (Part(1.0, ((4, "a"),)), Part(1.0, ((2, " x"), (4, " lion"))))
    assert prompt.networks == (Lora("y", 0.5, 0.5),) and prompt.steps == 4
    assert parse(prompt.text, 4) == prompt
    negative = parse("a AND <lora:y>:2", 4, negative=True, styles=[style])
    assert negative.parts == (Part(1.0, ((4, "bad a AND <lora:y>:2"),)),) and negative.networks == ()


def test_comments_and_choices_and_hires_in_parse():
    assert parse("[a:b:1] # c", 4).text == "[a:b:1] "
    assert parse("{a|b}", 4).parts == (Part(1.0, ((4, "{a|b}"),)),)
    assert parse("[a:b:1.5]", 4, hires=True, base_steps=9).parts == (Part(1.0, ((2, "a"), (4, "b"))),)
    assert parse("[a:b:1.0]", 4, old=True).parts == (Part(1.0, ((1, "a"), (4, "b"))),)


def test_the_text_at_a_step():
    (part,) = parse("[a:b:3]", 10).parts
    assert [part.at(step) for step in (0, 1, 3, 4, 10, 11)] == ["a", "a", "a", "b", "b", "b"]


def test_plan_names_each_text_once():
    positive, negative = parse("[a:b:2] AND c", 4), parse("[c|a]", 4, negative=True)
    got = plan([*positive.parts, *negative.parts], 4)
    assert [[got.texts[i] for i in row] for row in got.rows] == [
        ["a", " c", "c"], ["a", " c", "a"], ["b", " c", "c"], ["b", " c", "a"],
    ]  # fmt: skip
    assert sorted(got.texts) == [" c", "a", "b", "c"]
    assert plan([], 2).rows == ((), ())


def test_plan_can_count_as_a1111_does():
    (part,) = parse("[a:b:2]", 4).parts
    assert [plan([part], 4, first=first).rows.count((0,)) for first in (1, 0)] == [2, 3]


# Nothing breaks it


@given(GARBAGE)
@settings(max_examples=600, deadline=None)
def test_no_text_is_an_error(text):
    prompt = parse(text, 7, styles=[Style("s", "{prompt}" + text)], rng=random.Random(0))
    parse(text, 7, negative=True, hires=True, base_steps=3)
    for part in prompt.parts:
        untils = [until for until, _ in part.timeline]
        assert untils == sorted(set(untils)) and untils[-1] == 7 and untils[0] >= 1
        for _, words in part.timeline:
            got = chunks(emphasis(words), LETTERS)
            assert got and all(len(chunk.ids) == len(chunk.weights) <= 75 for chunk in got)


@given(st.text(alphabet=st.characters(exclude_characters="\\()[]{}:|#<>_$"), max_size=200))
@settings(max_examples=300, deadline=None)
def test_plain_text_is_left_as_it_is(text):
    text = text.replace("AND", "and").replace("BREAK", "break")
    (part,) = parse(text, 5, rng=random.Random(0)).parts
    assert part == Part(1.0, ((5, text.rstrip()),))
    assert emphasis(text) == [Piece(text, 1.0)]


@given(GARBAGE)
@settings(max_examples=300, deadline=None)
def test_emphasis_takes_away_brackets_and_nothing_else(text):
    words = "".join("BREAK" if piece is BREAK else piece.text for piece in emphasis(text))
    assert [letter for letter in words if letter.isalpha()] == [letter for letter in text if letter.isalpha()]


UNITS = [
    *"()[]{}|:\\<# \n", "[a:", "[a|", "(a", "[a:b:3]", "[a|b]", "(a [b) c] ", "{a|", "{a|b}", "<a:", "<lora:a:1>",
    "BREAK ", "AND ", ": ", "__a__", "_", "a,", "a:1 ", "1.", "{2$$a|b}", "日本 ", "([a:b:.5]:1.2) ",
]  # fmt: skip


@pytest.mark.parametrize("unit", UNITS)
def test_ten_thousand_characters_take_less_than_a_second(unit):
    text = (unit * 10_000)[:10_000]
    start = time.process_time()
    prompt = parse(text, 30, rng=random.Random(0))
    got = plan(prompt.parts, 30)
    chunks(emphasis(got.texts[0]), LETTERS)
    assert time.process_time() - start < 1


@pytest.mark.parametrize("depth", [500, 3000])
def test_deep_nesting(depth):
    assert timeline("[" * depth + "a" + ":2]" * depth, 4) == [(2, ""), (4, "a")]
    assert timeline("[" * depth + "a" + "|b]" * depth, 2) == [(1, "a"), (2, "b")]
    assert timeline("(" * depth + "[a:2]" + ")" * depth, 4)[0] == (2, "(" * depth + ")" * depth)
    assert emphasis("(" * 500 + "a" + ")" * 500)[0].weight == pytest.approx(1.1**500)
    assert emphasis("(" * 9000 + "a")[0].weight == emphasis("(" * 9 + "a" + f":{10**29})" * 9)[0].weight == 1e30
    assert choose("{" * depth + "a" + "|a}" * depth, random.Random(0)) == "a"


def test_a_plain_prompt_is_read_in_less_than_a_millisecond():
    texts = [f"a photo of a cat on a mat, highly detailed, number {number}" for number in range(200)]
    start = time.process_time()
    for text in texts:
        emphasis(parse(text, 20).parts[0].at(1))
    assert (time.process_time() - start) / len(texts) < 1e-3


def test_a_scheduled_prompt_is_parsed_once():
    before = grammar.parse.cache_info().hits
    text = "a [cat:dog:.37] nobody wrote before"
    assert [timeline(text, steps)[0][0] for steps in (10, 100)] == [3, 37]
    assert grammar.parse.cache_info().hits == before + 1
    first = timeline(text, 10)
    first.clear()
    assert timeline(text, 10) != []  # a caller's list is the caller's own


def test_the_library_knows_no_network():
    package = Path(grammar.__file__).parent
    for path in package.glob("*.py"):
        names = {
            (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
        }
        assert not any(name.startswith("sfumato") and "prompts" not in name for name in names), path
        assert ("torch" in names) == (path.name == "weighting.py"), path
