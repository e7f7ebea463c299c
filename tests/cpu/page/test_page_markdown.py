"""The page's Markdown: beside markdown-it's, and whatever a model may write."""

from __future__ import annotations

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

# An element's children as [tag, attributes, ...children]; texts as they are.
TREE = """
  function tree(node) {
    node.normalize();
    if (node.nodeType === 3) return node.data;
    const attributes = Object.fromEntries([...node.attributes].map((a) => [a.name, a.value]));
    return [node.localName, attributes, ...[...node.childNodes].map(tree)];
  }
"""
# Renders texts one after another into one element, as a stream does.
RENDER = (
    """async texts => {
  const { markdownInto } = await import("/page/markdown.js");
  const codeBlock = (language, source) => {
    const pre = document.createElement("pre");
    pre.textContent = source;
    pre.title = language;
    return pre;
  };
  const node = document.createElement("div");
  const show = markdownInto(node, codeBlock);
  for (const text of texts) show(text);
  return tree(node).slice(2);"""
    + TREE
    + "}"
)
PARSE = (
    """html => {
  const page = new DOMParser().parseFromString(html, "text/html");
  return tree(page.body).slice(2);"""
    + TREE
    + "}"
)


@pytest.fixture(scope="module")
def page(browser, running_server):
    page = browser.new_page()
    page.goto(running_server.url)
    yield page
    page.close()


# -- beside another implementation -----------------------------------------------------------------


@pytest.fixture(scope="module")
def blank(browser):
    """A page without the policy, which forbids parsing HTML."""
    page = browser.new_page()
    yield page
    page.close()


def test_beside_markdown_it(page, blank, data):
    reference = MarkdownIt("commonmark", {"breaks": True, "html": False})
    reference.enable(["table", "strikethrough"])
    reference.add_render_rule("s_open", lambda *_: "<del>")
    reference.add_render_rule("s_close", lambda *_: "</del>")
    documents = (data / "markdown.txt").read_text().split("\n====\n")
    assert len(documents) > 30
    for document in documents:
        html = re.sub(r"(</?h)(\d)>", lower, reference.render(document))
        ours = plain(page.evaluate(RENDER, [document]))
        assert ours == plain(blank.evaluate(PARSE, html)), document


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ("2*3*4", [["p", "2*3*4"]]),
        ("**注意：**重要", [["p", ["strong", "注意："], "重要"]]),
        ("one<br>two", [["p", "one", ["br"], "two"]]),
        (
            "见 https://e.org/a。下一句",
            [["p", "见", ["a", "https://e.org/a", "https://e.org/a"], "。下一句"]],
        ),
        ("![a fox](https://e.org/fox.png)", [["p", ["a", "https://e.org/fox.png", "a fox"]]]),
        ("[x](javascript:alert(1))", [["p", "[x](javascript:alert(1))"]]),
        ("[x](/v1/models)", [["p", "[x](/v1/models)"]]),
        ("\\(x_1\\)", [["p", "\\(x_1\\)"]]),
        ("&lt;b&gt;", [["p", "&lt;b&gt;"]]),
    ],
)
def test_where_it_differs_on_purpose(page, document, expected):
    assert plain(page.evaluate(RENDER, [document])) == expected


def lower(heading):
    """The page has its own h1."""
    return f"{heading[1]}{min(int(heading[2]) + 1, 6)}>"


def plain(nodes):
    """What both must agree on: no classes, no blanks between blocks, loose lists as tight ones."""
    found = []
    for node in nodes:
        if isinstance(node, str):
            found += [" ".join(node.split())] if node.strip() else []
            continue
        tag, attributes, *children = node
        if tag == "div":
            found += plain(children)
        elif tag == "pre":
            found.append(["pre", "".join(texts(children)).rstrip("\n")])
        elif tag == "li":
            found.append(["li", *plain(tight(children))])
        else:
            found.append([tag, *attributes.get("href", "").split(), *plain(children)])
    return found


def tight(children):
    """An item's children, its first paragraph opened."""
    children = [child for child in children if not isinstance(child, str) or child.strip()]
    if children and children[0][0] == "p":
        return [*children[0][2:], *children[1:]]
    return children


# -- whatever a model may write --------------------------------------------------------------------

MARKS = ["*", "**", "_", "__", "~~", "`", "``", "```", "~~~", "#", ">", "|", "|---|", "[", "]("]
MARKS += [")", "!", "\\", "<br>", "<script>", "https://e.org/", "javascript:", "---", "***", "&lt;"]
BLANKS = ["\n", "\n\n", "    ", "\t", " ", "## ", "> ", "- ", "+ ", "1. ", "2) "]
WORDS = ["alpha", "beta", "gamma", "中文", "é", "𝔘"]
ALLOWED = {"h2", "h3", "h4", "h5", "h6", "p", "ul", "ol", "li", "blockquote", "pre", "code", "hr"}
ALLOWED |= {"br", "strong", "em", "del", "a", "div", "table", "thead", "tbody", "tr", "th", "td"}
DOCUMENTS = st.lists(st.sampled_from(MARKS + BLANKS + WORDS * 3), max_size=40).map("".join)
SETTINGS = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@SETTINGS
@given(document=DOCUMENTS)
def test_no_word_is_lost_and_no_element_made_up(page, document):
    nodes = page.evaluate(RENDER, [document])
    shown = "".join([*texts(nodes), *attribute(nodes, "href"), *attribute(nodes, "title")])
    for word in WORDS:
        assert shown.count(word) >= document.count(word)
    assert set(tags(nodes)) <= ALLOWED
    assert all(href.startswith("https://") for href in attribute(nodes, "href"))


@SETTINGS
@given(document=DOCUMENTS, cuts=st.lists(st.integers(0, 200), max_size=8))
def test_a_stream_ends_as_the_whole(page, document, cuts):
    prefixes = [document[:cut] for cut in sorted(cuts)]
    assert page.evaluate(RENDER, [*prefixes, document]) == page.evaluate(RENDER, [document])


@pytest.mark.parametrize(
    "piece",
    ["> ", "- ", "*", "**a ", "[", "[a](", "`", "```\n", "|a", "![", "_a", "a_", "<", "\\", "1. "],
)
def test_no_text_takes_long(page, piece):
    """Work in proportion to the length: a tenth of a million characters, not hours."""
    page.evaluate(f"async () => ({RENDER})([{piece!r}.repeat({100_000 // len(piece)})]).length")


def texts(nodes):
    for node in nodes:
        if isinstance(node, str):
            yield node
        else:
            yield from texts(node[2:])


def elements(nodes):
    for node in nodes:
        if not isinstance(node, str):
            yield node
            yield from elements(node[2:])


def tags(nodes):
    return [node[0] for node in elements(nodes)]


def attribute(nodes, name):
    return [node[1][name] for node in elements(nodes) if name in node[1]]
