"""sendmail's command line, as scripts have written it for forty years."""

import pytest

from relay.sendmail.options import Options, UsageError, parse


def different(options: Options) -> dict[str, object]:
    """What is not as it is without any argument."""
    plain = vars(Options())
    return {key: value for key, value in vars(options).items() if value != plain[key]}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {}),
        ("you@example.org her", {"recipients": ["you@example.org", "her"]}),
        ("-t", {"from_header": True}),
        ("-t -i", {"from_header": True, "dot_ends": False}),
        ("-ti you", {"from_header": True, "dot_ends": False, "recipients": ["you"]}),
        ("-oi you", {"dot_ends": False, "recipients": ["you"]}),
        ("-o i you", {"dot_ends": False, "recipients": ["you"]}),
        ("-f me@acme.example you", {"sender": "me@acme.example", "recipients": ["you"]}),
        ("-fme@acme.example you", {"sender": "me@acme.example", "recipients": ["you"]}),
        ("-rme -tif other", {"sender": "other", "from_header": True, "dot_ends": False}),
        ("-f <> you", {"sender": "<>", "recipients": ["you"]}),
        ("-FCronDaemon -i -B8BITMIME -oem root", {"full_name": "CronDaemon", "dot_ends": False, "recipients": ["root"]}),  # Debian's cron
        ("-i -B8BITMIME -odi -oem -oi root", {"dot_ends": False, "recipients": ["root"]}),
        (
            "-odb -odq -o7 -o8 -om -oAfile -em -h 20 -L tag -C /etc/x.cf -Am -Ac -G -U -m -n -x -p esmtp -O Opt=1 you",
            {"recipients": ["you"]},
        ),
        ("-N success,Failure you", {"notify": "SUCCESS,FAILURE", "recipients": ["you"]}),
        ("-N never you", {"notify": "NEVER", "recipients": ["you"]}),
        ("-R hdrs -V id+1= you", {"ret": "HDRS", "envid": "id+2B1+3D", "recipients": ["you"]}),
        ("-v -bm you", {"verbose": True, "recipients": ["you"]}),
        ("-bs", {"mode": "smtp"}),
        ("-bp", {"mode": "queue"}),
        ("-bi", {"mode": "nothing"}),
        ("-bh", {"mode": "nothing"}),
        ("-I", {"mode": "nothing"}),
        ("-q", {"mode": "nothing"}),
        ("-q15m", {"mode": "nothing"}),
        ("-qIABC", {"mode": "nothing"}),
        ("--help", {"mode": "help"}),
        ("-i -- -t you", {"dot_ends": False, "recipients": ["-t", "you"]}),
        ("you -t -f me", {"recipients": ["you", "-t", "-f", "me"]}),
    ],
)
def test_it_is_read_as_postfix_reads_it(words: str, expected: dict[str, object]) -> None:
    assert different(parse("sendmail", words.split())) == expected


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("-Z", "unknown option -Z"),
        ("-tZ", "unknown option -Z"),
        ("-d0.1", "unknown option -d"),
        ("--read-envelope-from", "unknown option --"),
        ("-f", "-f needs a value"),
        ("-t -F", "-F needs a value"),
        ("-bd", "`relay serve`"),
        ("-bv you", "`relay explain`"),
        ("-bt", "-bt is not supported"),
        ("-B9", "7BIT or 8BITMIME"),
        ("-X/tmp/log you", "-X/ is not supported"),
        ("-XV you", "-XV is not supported"),
        ("-qZ", "-qZ"),
        ("-bs -t", "-t is for sending mail"),
    ],
)
def test_what_postfix_refuses_is_refused(words: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse("sendmail", words.split())
    assert reason in str(caught.value)


@pytest.mark.parametrize("words", ["-N sometimes", "-N never,success", "-N ,", "-R some", "-V " + "=" * 40, "-V a\tb", "-V é"])
def test_a_malformed_wish_is_told_and_left_out(words: str) -> None:
    options = parse("sendmail", [*words.split(" "), "you"])
    assert (options.notify, options.ret, options.envid, options.recipients) == ("", "", "", ["you"])
    assert len(options.warnings) == 1 and "is ignored" in options.warnings[0]


@pytest.mark.parametrize(("name", "mode"), [("mailq", "queue"), ("newaliases", "nothing"), ("sendmail", "deliver")])
def test_its_other_names_are_modes(name: str, mode: str) -> None:
    assert parse(name, []).mode == mode
