"""Say in plain words where a file is no YAML, and what was probably meant.

The parser knows only where it stopped. Most of the time the cause is a value on that line that begins with a character YAML keeps
for itself, or a `: ` inside one. Nothing of the line is repeated: it may hold a secret. Pure.
"""

import re
from dataclasses import dataclass
from typing import Final

Mark = tuple[int, int]  # line and column, from 0

_VALUE = re.compile(r"(?:^\s+|[:,\[{]\s+|\[|-\s+)([*@%!&`])")
_VALUE_LAST = re.compile(r"(?:^|:\s+|-\s+)([\[{\"'|>])")
_ENDS_IN_FLOW = re.compile(r"[^,\]}#]*")
_ENDS_IN_BLOCK = re.compile(r"(?:(?! #).)*")
_WORDS: Final = {
    "found incompatible YAML document": "remove this line: a configuration needs no directives",
    "found unknown directive name": "remove this line: a configuration needs no directives",
    "found unexpected end of stream": "the quote does not end",
    "found unexpected document indicator": "the quote does not end",
    "found unknown escape character": 'a \\ begins an escape inside "…": write \\\\, or use single quotes',
    "found a tab character that violates indentation": "tabs cannot indent: use spaces",
    "found a tab character where an indentation space is expected": "tabs cannot indent: use spaces",
    "could not find expected ':'": "a key without a colon, or text that should be quoted or indented",
    "did not find expected '-' indicator": "every item of this list must begin with - in the same column",
    "did not find expected ',' or ']'": "the list in [ ] does not end",
    "did not find expected ',' or '}'": "the mapping in { } does not end",
    "did not find expected key": "a key was expected here: look at the indentation and the quotes",
    "block sequence entries are not allowed in this context": "a list cannot begin here: put it on the next line, indented",
    "mapping keys are not allowed in this context": "quote the value: ? is special in YAML",
    "did not find expected node content": "a value was expected here: quote one that begins with a special character",
}


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong, where, and how many characters of the line may be blanked to read on (0: reading ends here)."""

    place: Mark
    message: str
    length: int = 0


def explain(lines: list[str], problem: str, *, place: Mark, context: Mark | None) -> Fault:
    """Turn the parser's complaint at `place`, about something that began at `context`, into words."""
    line = lines[place[0]] if place[0] < len(lines) else ""
    for match in _VALUE.finditer(line):
        # The parser stops at the character, or at the one behind it, or behind the name that it took for an anchor's.
        if match.start(1) in (place[1], place[1] - 1) or (place[0], match.start(1)) == context:
            return _reserved(line, place[0], match)
    if "\t" in line[: place[1] + 1] and not line[: place[1]].strip():
        return Fault(place, "tabs cannot indent: use spaces")
    if problem == "mapping values are not allowed in this context":
        if re.search(r":\s", line[: place[1]]):
            return Fault(place, "quote the value: it has a colon and a blank in it")
        return Fault(place, "the indentation does not fit the lines above")
    for at in (place, context) if "did not" in problem or "could not" in problem else (context,):
        if at and at[0] < len(lines) and (found := _VALUE_LAST.search(lines[at[0]])) and found.start(1) <= at[1]:
            words = _WORDS.get(problem, "")
            if at == context and "does not end" in words:
                return Fault(at, f"{words}; quote the value if it begins with {found[1]} as text")
            if found[1] in "\"'":
                words = f"quote the whole value: it goes on behind the closing {found[1]}"
            else:
                words = f"quote the value: it begins with {found[1]}, which is special in YAML"
            return Fault((at[0], found.start(1)), words)
    return Fault(context if context and "quote" in _WORDS.get(problem, "") else place, _WORDS.get(problem, problem))


def _reserved(line: str, number: int, match: re.Match[str]) -> Fault:
    start = match.start(1)
    before = line[:start]
    end = (_ENDS_IN_FLOW if before.count("[") + before.count("{") else _ENDS_IN_BLOCK).match(line, start)
    length = len(end[0].rstrip()) if end else 1
    return Fault((number, start), f"quote the value: it begins with {match[1]}, which is special in YAML", length)
