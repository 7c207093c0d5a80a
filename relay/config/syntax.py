"""Say in plain words where a file is no YAML, and what was probably meant.

The parser knows only where it stopped. Most of the time the cause is a value on that line that begins with a character YAML keeps
for itself, or a `: ` inside one. Nothing of the line is repeated: it may hold a secret. Pure.
"""

import re
from dataclasses import dataclass
from typing import Final

from relay.config.scalars import NOT_FILLED_IN

Mark = tuple[int, int]  # line and column, from 0

#: What the parser counts as the end of a line.
LINE_BREAK: Final = re.compile("\r\n|[\r\n\x85\u2028\u2029]")
_VALUE = re.compile(r"(?:^\s+|[:,\[{]\s+|\[|-\s+)([*@%!&`])")
_UNSEEN = re.compile("(?:^ *|[:-] *)([\xa0\u2000-\u200b\u202f\u2060\u3000\ufeff])")
_DASH = re.compile(r"\s*(-)(?=[\w{])")
_CLOSED = re.compile(r"\{[^{}]*:\s[^{}]*\}$")
_KEY = re.compile(r":(?:\s|$)")
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
    "did not find expected <document start>": "a configuration begins with a key and a colon, such as upstreams:",
    "did not find expected key": "a key was expected here: look at the indentation and the quotes",
    "block sequence entries are not allowed in this context": "a list cannot begin here: put it on the next line, indented",
    "mapping keys are not allowed in this context": "quote the value: ? is special in YAML",
    "did not find expected node content": "a value was expected here: quote one that begins with a special character",
}

#: What began at the context is told, not where the parser noticed.
_BEGUN_THERE: Final = {"found unexpected end of stream", "found unexpected document indicator", "could not find expected ':'"}


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
    if problem in ("found unknown escape character", "did not find expected hexdecimal number"):
        return Fault(place, _WORDS["found unknown escape character"])
    if "\t" in line[: place[1] + 1] and not line[: place[1]].strip():
        return Fault(place, "tabs cannot indent: use spaces")
    for number in range(max(0, place[0] - 1), min(place[0] + 1, len(lines))):
        if unseen := _UNSEEN.search(lines[number]):
            return Fault((number, unseen.start(1)), f"U+{ord(unseen[1]):04X} is no blank, although it may look like one: replace it")
    if problem in ("mapping values are not allowed in this context", "did not find expected '-' indicator"):
        for number in (place[0], place[0] - 1) if place[0] else (0,):
            if number < len(lines) and (dash := _DASH.match(lines[number])):
                return Fault((number, dash.start(1)), "a blank is missing behind the -")
    if problem == "mapping values are not allowed in this context":
        if re.search(r":\s", line[: place[1]]):
            return Fault(place, "quote the value: it has a colon and a blank in it")
        return _without_colon(lines, place) or Fault(place, "the indentation does not fit the lines above")
    if fault := _in_flow(line, problem, place=place, context=context):
        return fault
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
    if problem == "did not find expected key" and (fault := _without_colon(lines, place)):
        return fault
    return Fault(context if context and problem in _BEGUN_THERE else place, _WORDS.get(problem, problem))


def blanked(text: str, fault: Fault) -> str:
    """The text with an empty string in the place of the value that could not be read."""
    start = 0
    for _ in range(fault.place[0]):
        found = LINE_BREAK.search(text, start)
        start = found.end() if found else len(text)
    start += fault.place[1]
    return text[:start] + "''".ljust(fault.length) + text[start + fault.length :]


def _without_colon(lines: list[str], place: Mark) -> Fault | None:
    """The line before, where that was to be a key and is none: what stands below it was read as if it were its value."""
    for number in range(place[0] - 1, -1, -1):
        text = lines[number].partition(" #")[0].strip()
        if text.startswith("- "):
            return None
        if text and not text.startswith("#"):
            start = len(lines[number]) - len(lines[number].lstrip())
            missing = "the colon is missing, or the blank behind it: write key: value"
            return None if _KEY.search(text) else Fault((number, start), missing)
    return None


def _in_flow(line: str, problem: str, *, place: Mark, context: Mark | None) -> Fault | None:
    """What ends a list in [ ] or a mapping in { } too early, when it begins in this line."""
    before, found = line[: place[1]].rstrip(), line[place[1] : place[1] + 1]
    if problem == "did not find expected node content" and found == ":":
        end = _ENDS_IN_FLOW.match(line, place[1])
        return Fault(place, "quote the value: it begins with :, which is special in YAML", len(end[0].rstrip()) if end else 1)
    if problem == "did not find expected key" and _CLOSED.search(before):
        return Fault(place, "quote the value with the } in it: the mapping ends there")
    if context is None or context[0] != place[0] or not problem.startswith("did not find expected ','") or not before:
        return None
    if before.endswith("$") and found == "{":
        return Fault((place[0], len(before) - 1), f"{NOT_FILLED_IN}: write what it stands for, or for a secret {{env: NAME}}")
    if before[-1] in "\"'":
        return Fault(place, f"quote the whole value: it goes on behind the closing {before[-1]}")
    return Fault(place, "quote the value: what stands here would end it")


def _reserved(line: str, number: int, match: re.Match[str]) -> Fault:
    start = match.start(1)
    before = line[:start]
    end = (_ENDS_IN_FLOW if before.count("[") + before.count("{") else _ENDS_IN_BLOCK).match(line, start)
    length = len(end[0].rstrip()) if end else 1
    return Fault((number, start), f"quote the value: it begins with {match[1]}, which is special in YAML", length)
