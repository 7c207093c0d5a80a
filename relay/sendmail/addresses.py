"""The addresses in a recipient field, or on a command line: `root`, `you@example.org, "Her" <her@example.org>`, groups, comments.

Only cuts lists into addresses (RFC 5322 section 3.4) and keeps out what could end an SMTP command; whether one of them is good is for
the relay to say. Pure, and without `re`: this is loaded each time somebody sends a mail.
"""


class AddressError(ValueError):
    """The text is no list of addresses; the message says why."""


def parse_list(text: str) -> list[str]:
    """The addresses in `text`, in their order, without the null address. Raises AddressError."""
    found = [address for part in _parts(text) if (address := _address(part))]
    return [address for address in found if address != "<>"]


def parse_one(text: str) -> str:
    """The one address in `text`, or `""` for none and for the null address `<>`. Raises AddressError."""
    found = parse_list(text)
    if len(found) > 1:
        raise AddressError(f"{text!r} is more than one address")
    return found[0] if found else ""


# What a part is made of: words and quoted strings as written, blanks, and the content of <>, which comes as a tuple.
_Part = list[str | tuple[str]]


def _parts(text: str) -> list[_Part]:
    """Cut at commas and semicolons, take away comments, and the names of groups."""
    parts: list[_Part] = [[]]
    place = 0
    while place < len(text):
        character = text[place]
        if character == "(":
            place = _after_comment(text, place)
            parts[-1].append(" ")
            continue
        if character == '"':
            end = _after_quote(text, place)
            parts[-1].append(text[place:end])
            place = end
            continue
        if character == "<":
            end = _after_angle(text, place)
            parts[-1].append((text[place + 1 : end - 1],))
            place = end
            continue
        if character == "[":  # a domain literal, which may have colons
            end = text.find("]", place) + 1 or len(text)
            parts[-1].append(text[place:end])
            place = end
            continue
        if character in ",;":
            parts.append([])
        elif character == ":":
            parts[-1].clear()
        elif character in " \t\r\n":
            parts[-1].append(" ")
        else:
            parts[-1].append(character)
        place += 1
    return parts


def _address(part: _Part) -> str:
    angled = [item[0].strip() for item in part if isinstance(item, tuple)]
    if len(angled) > 1:
        raise AddressError(f"a comma is missing between <{angled[0]}> and <{angled[1]}>")
    if angled:
        return _checked(angled[0]) or "<>"
    items = [item for item in part if isinstance(item, str)]
    words = [_bare(items)] if any('"' in item for item in items) else "".join(items).split(" ")
    joined = ""
    for word in filter(None, words):
        if joined and not (joined[-1] in "@." or word[0] in "@."):
            raise AddressError(f"{' '.join(filter(None, words))!r} is not an address")
        joined += word
    return _checked(joined)


def _bare(items: list[str]) -> str:
    """An address with a quoted local part, whose blanks are its own; blanks around it go."""
    while items and items[0] == " ":
        del items[0]
    while items and items[-1] == " ":
        del items[-1]
    if " " in items:
        raise AddressError(f"{''.join(items)!r} is not an address")
    return "".join(items)


def _checked(address: str) -> str:
    """An address cannot leave its place in a command: no control characters, and `<`, `>` and blanks only in quotes."""
    quoted = escaped = False
    for character in address:
        if character < " " or character == "\x7f":
            raise AddressError("an address has a control character")
        if escaped:
            escaped = False
        elif quoted and character == "\\":
            escaped = True
        elif character == '"':
            quoted = not quoted
        elif not quoted and character in "<> ":
            raise AddressError(f"{address!r} is not an address")
    if quoted:
        raise AddressError(f"{address!r} has a quote that does not end")
    return address


def _after_comment(text: str, place: int) -> int:
    depth = 0
    while place < len(text):
        character = text[place]
        if character == "\\":
            place += 1
        elif character == "(":
            depth += 1
        elif character == ")":
            depth -= 1
            if not depth:
                return place + 1
        place += 1
    raise AddressError("a comment does not end")


def _after_quote(text: str, place: int) -> int:
    place += 1
    while place < len(text):
        if text[place] == "\\":
            place += 1
        elif text[place] == '"':
            return place + 1
        place += 1
    raise AddressError("a quoted name does not end")


def _after_angle(text: str, place: int) -> int:
    place += 1
    while place < len(text):
        if text[place] == '"':
            place = _after_quote(text, place)
            continue
        if text[place] == ">":
            return place + 1
        if text[place] == "<":
            break
        place += 1
    raise AddressError("an address has no closing >")
