"""Line ends and dots of content (RFC 5321 sections 2.3.8 and 4.5.2). Pure; works on whole lines.

What is stored has CRLF line ends only and no transparency dots. Dots are taken off once, at intake, and put on at each sending.
"""

import re
from io import IncrementalNewlineDecoder

# Looked for at the first CR of a run only: from each CR of a long one, the way to its end would be quadratic.
_CRS = re.compile(rb"(?<!\r)\r+\n")
_DOT_LINE = re.compile(rb"^\.(?=[^\r])", re.MULTILINE)


def normalize(octets: bytes) -> bytes:
    """Make every line end CRLF: a bare LF, and any run of CR before an LF, become one CRLF; any other bare CR a space.

    `octets` must not end between a CR and its LF. What is already right comes back as the same object.
    """
    if is_canonical(octets.decode("latin-1")):
        return octets
    octets = octets.replace(b"\r\n", b"\n")
    if b"\r" in octets:
        octets = _CRS.sub(b"\n", octets).replace(b"\r", b" ")
    return octets.replace(b"\n", b"\r\n")


def is_canonical(text: str) -> bool:
    """Whether CRLF is the only line end in `text`, octets read as Latin-1, and CR and LF stand nowhere else."""
    seen = IncrementalNewlineDecoder(None, translate=False)  # looks once, in C: three times as fast as counting CR, LF and CRLF
    seen.decode(text, final=True)
    return seen.newlines in (None, "\r\n")


def has_dot_line(octets: bytes) -> bool:
    """Whether a line begins with a dot. Begins at the start of a line; CRLF only."""
    return octets[:1] == b"." or b"\r\n." in octets


def unstuff(octets: bytes) -> bytes:
    """Take the transparency dot off each line that begins with one and has more octets. Begins at the start of a line; CRLF only.

    A line of a single dot is not the end of the content here (that was found before), so its dot is content and stays.
    """
    return _DOT_LINE.sub(b"", octets)


def stuff(octets: bytes) -> bytes:
    """Put a dot before each line that begins with one. Begins at the start of a line; CRLF only."""
    if b"\r\n." in octets:
        octets = octets.replace(b"\r\n.", b"\r\n..")
    return b"." + octets if octets[:1] == b"." else octets
