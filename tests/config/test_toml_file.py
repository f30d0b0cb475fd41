"""Lines of keys in option files: against hand-counted texts, and against the parser's own keys on random files."""

import json
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from musubi_tuner.config.toml_file import key_lines, read_entries

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TRICKY = '''# a = 1
a = """
[not.a.section]
b = "x"
""" # c = 2
"quoted key" = 'lit # eral'  # d = 4
  list = [  # comment ] with bracket
    "]", 'x',
    { y = 1 },
  ]
dotted . "k.k" = """a\\"""b"""

[ table . 'sub' ]
e = {"x" = "}", z = 1}
[[many]]
f = 1
[[many]]
f = 2
[many.inner]
g = '' # empty
h = """"quoted"""""
i = 3
'''


def test_keys_are_found_at_their_lines_through_strings_comments_and_brackets():
    assert key_lines(TRICKY) == {
        ("a",): 2,
        ("quoted key",): 6,
        ("list",): 7,
        ("dotted", "k.k"): 11,
        ("table", "sub", "e"): 14,
        ("many", "0", "f"): 16,
        ("many", "1", "f"): 18,
        ("many", "1", "inner", "g"): 20,
        ("many", "1", "inner", "h"): 21,
        ("many", "1", "inner", "i"): 22,
    }
    tomllib.loads(TRICKY)


def test_entries_carry_value_line_and_section(tmp_path):
    path = tmp_path / "x.toml"
    path.write_bytes(b"\xef\xbb\xbf" + TRICKY.replace("\n", "\r\n").encode())
    found = {(e.section, e.key): (e.value, e.line) for e in read_entries(path)}
    assert found[("many.1.inner", "i")] == (3, 22)
    assert found[("table.sub.e", "z")] == (1, 14)
    assert found[("dotted", "k.k")] == ('a"""b', 11)
    assert found[("", "list")] == (["]", "x", {"y": 1}], 7)


names = st.text("abc-_ .#\"'=[]é", min_size=1, max_size=6)
scalars = st.one_of(st.integers(-99, 99), st.booleans(), st.text("ab\"'\\#[]{}=\n ", max_size=12))
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3), max_leaves=4)
sections = st.dictionaries(names, st.dictionaries(names, values, max_size=4), max_size=4)


@settings(max_examples=200, deadline=None)
@given(sections, st.booleans())
def test_every_key_of_a_random_file_is_found_where_it_was_written(tables, multiline):
    lines, where = [], {}
    for section, rows in tables.items():
        lines.append(f"[{json.dumps(section)}]  # {section!r}")
        for key, value in rows.items():
            where[(section, key)] = sum(line.count("\n") + 1 for line in lines) + 1
            text = json.dumps(value)
            if multiline and isinstance(value, list):
                text = text.replace("[", "[ # [\n", 1)
            lines.append(f"{json.dumps(key)} = {text}")
    text = "\n".join(lines)
    assert tomllib.loads(text) == tables
    assert key_lines(text) == where
