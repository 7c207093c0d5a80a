"""Laws of the mail modules, over whatever hypothesis thinks of."""

import email
import email.policy
import re

from hypothesis import example, given, settings
from hypothesis import strategies as st

from relay.config.model import Config
from relay.mail.address import AddressError, ParameterError, domain_of, folded, parse_parameters, parse_path
from relay.mail.bounce import About, Action, Notice, make_bounce
from relay.mail.envelope import Envelope, Facts, Origin, Recipient
from relay.mail.header import decode, fields, from_address, join, scan, separator, split, summary_of, unfold, value_of
from relay.mail.outcome import Phase, Status, outcome_of_reply
from relay.mail.reply import MalformedReply, Reply, parse_reply, printable
from relay.mail.rewrite import Rewrite, encoded_words, field_of, phrase_of, rewrite_header
from relay.routing import Router

quick = settings(max_examples=100, deadline=None)

TEXT = st.text(max_size=60)
WIRE = st.binary(max_size=60).map(lambda octets: octets.decode("ascii", "surrogateescape"))
PIECES = st.lists(
    st.sampled_from(["<", ">", "@", '"', "\\", ".", ",", ":", " ", "a", "b.c", "[", "127.0.0.1", "]", "ü", "\r\n", "\x00", "A=1"]),
    max_size=14,
)
ADDRESSES = st.one_of(WIRE, TEXT, PIECES.map("".join), PIECES.map(lambda pieces: f"<{''.join(pieces)}>"))

LINES = st.sampled_from(
    [
        b"From: a@b.c",
        b"from : x <d@e.f>",
        b"Subject: hi",
        b"SUBJECT:",
        b"Bcc: x",
        b" folded",
        b"\tfold\xfc",
        b"junk",
        b"",
        b"X-A: 1",
        b"To: \xc3\xbc",
        b"Reply-To: r@s.t",
        b"Subject: =?utf-8?b?w7w=?=",
        b"Return-Path: <>",
        b"Received: by x",
        b"From: a@b.c, d@e.f",
        b"From:",
        b": x",
    ]
)
BLOCKS = st.one_of(
    st.binary(max_size=200),
    st.lists(LINES, max_size=12).map(lambda lines: b"".join(line + b"\r\n" for line in lines if line)),
    st.lists(LINES, max_size=12).map(b"\n".join),
)
NAMES = st.sampled_from(["X-A", "Subject", "From", "Reply-To", "To", "x-b", "Bcc"])
VALUES = st.text(max_size=40)
RULES = st.builds(
    Rewrite,
    from_name=st.none() | VALUES,
    from_address=st.none() | st.sampled_from(["n@o.p", "ü@bücher.example"]),
    reply_to=st.none() | st.sampled_from(["original", "r@example.org"]),
    set_headers=st.lists(st.tuples(NAMES, VALUES), max_size=3).map(tuple),
    add_headers=st.lists(st.tuples(NAMES, VALUES), max_size=3).map(tuple),
    remove_headers=st.lists(NAMES, max_size=3).map(tuple),
    subject_prefix=st.none() | VALUES,
)


@quick
@given(ADDRESSES)
@example("<a@b.c>")
@example('<"\\""@b.c>')
def test_what_is_parsed_is_safe_in_a_command_line_and_parses_again(text: str) -> None:
    try:
        address, rest = parse_path(text)
    except AddressError:
        return
    line = f"MAIL FROM:<{address}>".encode()
    assert not re.search(rb"[\x00-\x1f\x7f]", line) and len(line) <= 10 + 256 + 1
    assert not re.search(r"[\s<>]", re.sub(r'"(?:[^"\\]|\\.)*"@', "@", address))
    assert parse_path(f"<{address}>") == (address, "")
    assert parse_path(f"<{address}> X=1") == (address, "X=1")
    assert folded(folded(address)) == folded(address)
    assert domain_of(address) == domain_of(folded(address))
    try:
        parameters = parse_parameters(rest)
    except ParameterError:
        return
    assert all(key == key.upper() and not re.search(r"[\x00-\x20\x7f]", key + value) for key, value in parameters.items())


@quick
@given(BLOCKS)
def test_cutting_content_loses_nothing(content: bytes) -> None:
    block, rest = split(content)
    assert block + rest == content
    assert join(fields(block)) == block
    assert join(fields(content)) == content
    assert split(block + separator(rest) + rest)[0] == block


@quick
@given(BLOCKS)
def test_reading_any_header_succeeds_and_is_printable(block: bytes) -> None:
    found = scan(block)
    summary = summary_of(found)
    for text in (summary.to, summary.cc, summary.subject):
        assert len(text) <= 200 and printable(text) == text
    author = from_address(found.get(b"from", ()))
    assert author == "" or (author.count("@") >= 1 and parse_path(f"<{author}>") == (author, ""))
    for part in fields(block):
        unfold(part.raw)


@quick
@given(BLOCKS)
def test_a_scan_reads_the_fields_that_a_rewrite_would_change(block: bytes) -> None:
    found = scan(block)
    names = {part.name.lower() for part in fields(block)}
    assert found.keys() == names & {b"received", b"message-id", b"date", b"from", b"sender", b"to", b"cc", b"subject"}
    for name, values in found.items():
        assert values == [part.raw.partition(b":")[2].removesuffix(b"\n") for part in fields(block) if part.name.lower() == name]


@quick
@given(BLOCKS, RULES)
def test_rewriting_touches_only_what_the_rules_name(block: bytes, rules: Rewrite) -> None:
    result = rewrite_header(block, rules)
    named = {"from", "reply-to", "subject", "bcc", "resent-bcc", "return-path"}
    named |= {name.lower() for name, _ in (*rules.set_headers, *rules.add_headers)} | {name.lower() for name in rules.remove_headers}

    def untouched(parts: bytes) -> list[bytes]:
        return [part.raw.rstrip(b"\r\n") for part in fields(parts) if part.name.lower().decode() not in named]

    assert untouched(result) == untouched(block)
    assert not any(part.name.lower() in (b"bcc", b"resent-bcc", b"return-path") for part in fields(result))
    if rules.from_address:
        assert [part.name.lower() for part in fields(result)].count(b"from") >= 1


@quick
@given(st.text())
def test_a_written_value_reads_back_in_one_field(value: str) -> None:
    raw = field_of("X-Name", value)
    assert raw.isascii() and len(fields(raw)) == 1 and raw.endswith(b"\r\n")
    assert max(map(len, raw.split(b"\r\n"))) <= 998
    if "=?" not in value:
        assert decode(value_of(raw)).split() == printable(value).split()


@quick
@given(st.text(min_size=1, alphabet=st.characters(exclude_categories=["Cs"])))
def test_encoded_words_read_back(text: str) -> None:
    words = encoded_words(text)
    assert all(len(word) <= 75 for word in words)
    assert decode("\r\n ".join(words).replace("\r\n", "").encode()) == text


@quick
@given(st.text(max_size=200))
def test_a_display_name_never_changes_the_address(name: str) -> None:
    value = phrase_of(name) + b" <a@b.c>"
    assert from_address([value]) == "a@b.c"
    parsed = email.message_from_bytes(b"From: " + value + b"\r\n\r\n", policy=email.policy.default)
    assert [found.addr_spec for found in parsed["From"].addresses] == ["a@b.c"]


@quick
@given(st.lists(st.binary(max_size=40), max_size=4), st.sampled_from(Phase))
def test_any_reply_is_read_or_refused_and_never_sent_by_accident(lines: list[bytes], phase: Phase) -> None:
    try:
        reply = parse_reply(lines)
    except MalformedReply:
        return
    assert 200 <= reply.code < 600 and printable(reply.text) == reply.text
    sent = outcome_of_reply(phase, reply).status is Status.SENT
    assert sent == (phase is Phase.FINAL and reply.positive)


BODIES = st.lists(st.binary(max_size=50).map(lambda line: re.sub(rb"[\r\n]", b"", line) + b"\r\n"), max_size=6).map(b"".join)


@quick
@given(
    st.text(max_size=300),
    st.text(max_size=100),
    BLOCKS,
    st.sampled_from(["", "FULL"]),
    st.sampled_from(Action),
    st.text(max_size=50),
    BODIES,
)
def test_a_bounce_is_sound_whatever_the_upstream_said(
    text: str, orcpt: str, header: bytes, ret: str, action: Action, given_up: str, rest: bytes
) -> None:  # fmt: skip
    outcome = outcome_of_reply(Phase.RCPT, Reply(550, "", printable(text)))
    recipient = Recipient("bob@example.org", notify="SUCCESS,FAILURE,DELAY", orcpt=orcpt)
    envelope = Envelope("a@b.c", (recipient,), envid=orcpt, ret=ret)
    header = b"".join(line.rstrip(b"\r\n").replace(b"\r", b" ") + b"\r\n" for line in header.splitlines(keepends=True))
    notices = [Notice(recipient, outcome, action)]
    about = About("0123456789abc", envelope, notices, header, 0.0, 9.0, "acme", text, b"\r\n" + rest, given_up)
    bounce = make_bounce(about, reporting_mta="relay.example.net", bounce_id="0123456789abd", now=1.0)
    assert bounce is not None and (bounce.content.isascii() or (ret and not rest.isascii()))
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)|\x00", bounce.content)
    assert max(map(len, bounce.content.split(b"\r\n"))) <= 998
    report = email.message_from_bytes(bounce.content, policy=email.policy.default)
    assert len(list(report.iter_parts())) == 3
    status = list(report.iter_parts())[1].get_payload()
    assert len(status) == 2 and status[1]["Action"] == action.value
    assert status[1]["Status"] in {Action.FAILED: ("5.0.0", "4.4.7"), Action.DELAYED: ("4.0.0",), Action.RELAYED: ("2.0.0",)}[action]


CONDITIONS = st.sampled_from(["*", "<>", "a.example", "*.a.example", "*.example", "u@a.example", "u+t@a.example", "b.example"])
SENDERS = st.sampled_from(["", "u@a.example", "U+t@A.example", "v@a.example", "u@s.a.example", "x@b.example", "root"])
ROUTES = st.fixed_dictionaries(
    {"sender": st.lists(CONDITIONS, min_size=1, max_size=3)},
    optional={
        "recipient": st.lists(CONDITIONS.filter(lambda condition: condition != "<>"), min_size=1, max_size=2),
        "client": st.sampled_from(["10.0.0.0/8", "::1"]),
        "listener": st.sampled_from(["l", "m"]),
    },
).flatmap(lambda route: st.sampled_from([{**route, "upstream": "x"}, {**route, "reject": "no"}]))


@quick
@given(st.lists(ROUTES, max_size=6), SENDERS, SENDERS.filter(bool), SENDERS, st.sampled_from(["10.1.1.1", "::1", ""]))
def test_the_index_finds_what_asking_every_route_finds(
    routes: list[dict[str, object]], sender: str, to: str, author: str, client: str
) -> None:
    config = Config.model_validate({"hostname": "relay.example.net", "upstreams": {"x": {"host": "x"}}, "routes": routes})
    router = Router(config)
    facts = Facts(sender, to, Origin(listener="l", client=client, header_from=folded(author)))
    route, known, verdicts = router.choose(*facts), router.foresee(sender, facts.origin), router.explain(facts)
    assert route is (verdicts[-1].route if verdicts and verdicts[-1].matched else None)
    if isinstance(known, str):
        assert route is None or route.reject
    else:
        assert known is None or route is known
