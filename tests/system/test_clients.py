"""Real mail programs send through the real process to a scripted upstream: what they meant to say arrives octet by octet.

What may differ is ours: the fields that are put before the header, and CRLF for whatever line ends there were. Each program sends in
clear, and with a login after STARTTLS, under TLS from the beginning, and from this machine in clear.
"""

import asyncio
import json
import smtplib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.system.clients import BODY, OCTETS, RECIPIENTS, SENDER, Line, line_of, split_ours

Tool = Callable[[str], str]


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    async with line_of(tmp_path, senders="") as found:
        yield found


async def test_smtplib(line: Line) -> None:
    def send() -> None:
        with smtplib.SMTP(line.host, line.port, local_hostname="app.acme.example") as client:
            assert client.sendmail(SENDER, RECIPIENTS, OCTETS, mail_options=["BODY=8BITMIME"]) == {}
            assert client.sendmail(SENDER, RECIPIENTS[:1], BODY) == {}

    await asyncio.to_thread(send)
    transactions = {len(transaction.recipients): transaction for transaction in await line.arrived(2)}
    assert transactions[2].sender == SENDER and transactions[2].recipients == RECIPIENTS
    assert "BODY=8BITMIME" in transactions[2].parameters
    assert split_ours(transactions[2].content) == (["Received"], OCTETS)
    assert split_ours(transactions[1].content) == (["Received", "Message-ID", "Date"], b"\r\n" + BODY)
    assert b"Received: from app.acme.example ([127.0.0.1])\r\n\tby relay.example with ESMTP id " in transactions[2].content


@pytest.mark.parametrize("pipeline", [True, False])
async def test_swaks(line: Line, tool: Tool, tmp_path: Path, pipeline: bool) -> None:
    (tmp_path / "message").write_bytes(OCTETS.replace(b"\r\n", b"\n"))
    await line.run(
        tool("swaks"), "--server", line.host, "--port", str(line.port), "--from", SENDER, "--to", ",".join(RECIPIENTS),
        "--helo", "app.acme.example", "--data", f"@{tmp_path / 'message'}", *(["--pipeline"] if pipeline else []),
    )  # fmt: skip
    (transaction,) = await line.arrived()
    assert (transaction.sender, transaction.recipients) == (SENDER, RECIPIENTS)
    ours, theirs = split_ours(transaction.content)
    assert ours == ["Received"]
    assert theirs == OCTETS + b"\r\n"  # it puts an empty line before the final dot


async def test_curl(line: Line, tool: Tool, tmp_path: Path) -> None:
    (tmp_path / "message").write_bytes(OCTETS)
    recipients = [option for recipient in RECIPIENTS for option in ("--mail-rcpt", recipient)]
    await line.run(
        tool("curl"), "-sS", f"smtp://{line.host}:{line.port}/app", "--mail-from", SENDER, *recipients,
        "--upload-file", str(tmp_path / "message"),
    )  # fmt: skip
    (transaction,) = await line.arrived()
    assert (transaction.sender, transaction.recipients) == (SENDER, RECIPIENTS)
    assert split_ours(transaction.content) == (["Received"], OCTETS)


async def test_msmtp(line: Line, tool: Tool, tmp_path: Path) -> None:
    await line.run(
        tool("msmtp"), "--file=/dev/null", f"--host={line.host}", f"--port={line.port}", "--tls=off", "--auth=off", f"--from={SENDER}",
        *RECIPIENTS, stdin=OCTETS.replace(b"\r\n", b"\n"), HOME=str(tmp_path),
    )  # fmt: skip
    (transaction,) = await line.arrived()
    assert (transaction.sender, transaction.recipients) == (SENDER, RECIPIENTS)
    assert split_ours(transaction.content) == (["Received"], OCTETS)


NODEMAILER = """
const transport = require("nodemailer").createTransport({host: process.env.HOST, port: +process.env.PORT, name: "app",
  ...JSON.parse(process.env.OPTIONS)});
transport.sendMail({envelope: {from: process.env.SENDER, to: JSON.parse(process.env.RECIPIENTS)}, raw: require("fs").readFileSync(0)},
  (error, info) => { if (error) { console.error(error); process.exit(1); } console.log(info.response); transport.close(); });
"""


async def test_nodemailer(line: Line, tool: Tool) -> None:
    if not Path("/usr/share/nodejs/nodemailer").exists():
        tool("nodemailer, the Debian package node-nodemailer,")
    await line.run(
        tool("node"), "-e", NODEMAILER, stdin=OCTETS, NODE_PATH="/usr/share/nodejs", HOST=line.host, PORT=str(line.port), SENDER=SENDER,
        RECIPIENTS=json.dumps(RECIPIENTS), OPTIONS='{"ignoreTLS": true}',
    )  # fmt: skip
    (transaction,) = await line.arrived()
    assert (transaction.sender, transaction.recipients) == (SENDER, RECIPIENTS)
    assert split_ours(transaction.content) == (["Received"], OCTETS)


async def test_smtp_source(line: Line, tool: Tool) -> None:
    await line.run(
        tool("smtp-source"), "-s", "4", "-m", "20", "-l", "5000", "-r", "2", "-f", SENDER, "-t", "you@example.org",
        f"inet:{line.host}:{line.port}",
    )  # fmt: skip
    transactions = await line.arrived(20)
    for transaction in transactions:
        ours, theirs = split_ours(transaction.content)
        assert ours == ["Received"]
        assert (transaction.sender, len(transaction.recipients)) == (SENDER, 2)
        assert theirs.startswith(b"From: <app@acme.example>\r\n") and theirs.endswith(b"XXXXXXX\r\n")
        assert abs(len(theirs) - 5000) < 300
    assert len({transaction.content for transaction in transactions}) == 20


# -- with a login, and under TLS --------------------------------------------------------------------------------------------

USER, PASSWORD = "erp", "pa:ss w0rd="
LISTENERS = """
  - {{bind: "127.0.0.1:0", name: starttls, security: starttls, certificate: {certificate}, key: {key}, auth: required, require_tls: true}}
  - {{bind: "127.0.0.1:0", name: tls, security: tls, certificate: {certificate}, key: {key}, auth: required}}
  - {{bind: "127.0.0.1:0", name: clear, auth: required}}"""
WAYS = {"starttls": "ESMTPSA", "tls": "ESMTPSA", "clear": "ESMTPA"}


@pytest.fixture
async def closed(tmp_path: Path, tls: Authority) -> AsyncIterator[Line]:
    """A line that wants a login, one listener for each way."""
    files = tls.files()
    more = f"users: {{{USER}: {{password: '{PASSWORD}', senders: [acme.example]}}}}"
    async with line_of(tmp_path, listeners=LISTENERS.format(certificate=files.certificate, key=files.key), more=more) as found:
        yield found


async def arrived_by_every_way(line: Line) -> list[bytes]:
    """What each of the ways brought, without what is ours: in the order of WAYS."""
    transactions = await line.arrived(len(WAYS))
    accepted = {event["id"]: event for event in line.relay.events("accepted")}
    assert {event["listener"]: event["user"] for event in accepted.values()} == dict.fromkeys(WAYS, USER)
    found = {}
    for transaction in transactions:
        trace = transaction.content.partition(b"with ")[2].split(b" ", 3)
        way = accepted[trace[2].rstrip(b";\r\n").split(b"\r\n")[0].rstrip(b";").decode()]["listener"]
        assert trace[0].decode() == WAYS[way]
        assert (transaction.sender, transaction.recipients) == (SENDER, RECIPIENTS)
        found[way] = split_ours(transaction.content)[1]
    return [found[way] for way in WAYS]


async def test_smtplib_logs_in(closed: Line, tls: Authority) -> None:
    context = tls.client_context()

    def send(way: str) -> None:
        host, port = closed.relay.address(way)
        with smtplib.SMTP_SSL(host, port, context=context) if way == "tls" else smtplib.SMTP(host, port) as client:
            if way == "starttls":
                client.starttls(context=context)
            client.login(USER, PASSWORD)
            client.sendmail(SENDER, RECIPIENTS, OCTETS, mail_options=["BODY=8BITMIME"])

    for way in WAYS:
        await asyncio.to_thread(send, way)
    assert await arrived_by_every_way(closed) == [OCTETS] * 3


async def test_swaks_logs_in(closed: Line, tool: Tool, tls: Authority, tmp_path: Path) -> None:
    (tmp_path / "message").write_bytes(OCTETS)
    secure = {"starttls": ["--tls"], "tls": ["--tlsc"], "clear": []}
    for way, mechanism in zip(WAYS, ("PLAIN", "LOGIN", "PLAIN"), strict=True):
        host, port = closed.relay.address(way)
        await closed.run(
            tool("swaks"), "--server", host, "--port", str(port), "--from", SENDER, "--to", ",".join(RECIPIENTS), "--auth", mechanism,
            "--auth-user", USER, "--auth-password", PASSWORD, *secure[way], "--data", f"@{tmp_path / 'message'}",
            *(["--tls-verify", "--tls-ca-path", str(tls.ca_file)] if secure[way] else []),
        )  # fmt: skip
    assert await arrived_by_every_way(closed) == [OCTETS + b"\r\n"] * 3


async def test_curl_logs_in(closed: Line, tool: Tool, tls: Authority, tmp_path: Path) -> None:
    (tmp_path / "message").write_bytes(OCTETS)
    recipients = [option for recipient in RECIPIENTS for option in ("--mail-rcpt", recipient)]
    for way in WAYS:
        host, port = closed.relay.address(way)
        await closed.run(
            tool("curl"), "-sS", f"{'smtps' if way == 'tls' else 'smtp'}://{host}:{port}/app", "--cacert", str(tls.ca_file),
            "--user", f"{USER}:{PASSWORD}", *(["--ssl-reqd"] if way == "starttls" else []), "--mail-from", SENDER, *recipients,
            "--upload-file", str(tmp_path / "message"),
        )  # fmt: skip
    assert await arrived_by_every_way(closed) == [OCTETS] * 3


async def test_msmtp_logs_in(closed: Line, tool: Tool, tls: Authority, tmp_path: Path) -> None:
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    secure = {"starttls": ["--tls=on", "--tls-starttls=on"], "tls": ["--tls=on", "--tls-starttls=off"], "clear": ["--tls=off"]}
    for way, mechanism in zip(WAYS, ("on", "login", "plain"), strict=True):
        host, port = closed.relay.address(way)
        await closed.run(
            tool("msmtp"), "--file=/dev/null", f"--host={host}", f"--port={port}", *secure[way], f"--tls-trust-file={tls.ca_file}",
            f"--auth={mechanism}", f"--user={USER}", f"--passwordeval=cat {tmp_path / 'password'}", f"--from={SENDER}", *RECIPIENTS,
            stdin=OCTETS.replace(b"\r\n", b"\n"), HOME=str(tmp_path),
        )  # fmt: skip
    assert await arrived_by_every_way(closed) == [OCTETS] * 3


async def test_nodemailer_logs_in(closed: Line, tool: Tool, tls: Authority) -> None:
    if not Path("/usr/share/nodejs/nodemailer").exists():
        tool("nodemailer, the Debian package node-nodemailer,")
    secure = {"starttls": {"requireTLS": True}, "tls": {"secure": True}, "clear": {"ignoreTLS": True}}
    for way in WAYS:
        host, port = closed.relay.address(way)
        options = {"auth": {"user": USER, "pass": PASSWORD}, **secure[way]}
        await closed.run(
            tool("node"), "-e", NODEMAILER, stdin=OCTETS, NODE_PATH="/usr/share/nodejs", HOST=host, PORT=str(port), SENDER=SENDER,
            RECIPIENTS=json.dumps(RECIPIENTS), OPTIONS=json.dumps(options), NODE_EXTRA_CA_CERTS=str(tls.ca_file),
        )  # fmt: skip
    assert await arrived_by_every_way(closed) == [OCTETS] * 3


# Apache Commons Email over Jakarta Mail, in a script: a runtime has no compiler.
JAVA = """
for (String way : System.getenv("WAYS").split(",")) {
    email = new org.apache.commons.mail.SimpleEmail();
    email.setCharset("utf-8");
    email.setHostName("localhost");
    port = System.getenv("PORT_" + way);
    email.setSmtpPort(Integer.parseInt(port));
    email.setSslSmtpPort(port);
    email.setStartTLSRequired(way.equals("starttls"));
    email.setSSLOnConnect(way.equals("tls"));
    email.setSSLCheckServerIdentity(true);
    email.setAuthentication(System.getenv("LOGIN"), System.getenv("PASSWORD"));
    email.setFrom(System.getenv("SENDER"), "Jörg");
    email.addTo("you@example.org");
    email.addBcc("her@example.org");
    email.setSubject("Grüße");
    email.setMsg("one\\n.\\n..two\\nGrüße\\n");
    email.send();
}
"""
JARS = [f"/usr/share/java/{name}.jar" for name in ("bsh", "commons-email", "javax.mail", "javax.activation")]


async def test_java_logs_in(closed: Line, tool: Tool, tls: Authority, tmp_path: Path) -> None:
    for jar in JARS:
        if not Path(jar).exists():
            tool(f"{jar}, of the Debian packages bsh and libcommons-email-java,")
    store = tmp_path / "trusted.p12"
    trust = ["-keystore", str(store), "-storepass", "changeit"]
    await closed.run(tool("keytool"), "-importcert", "-noprompt", "-alias", "ca", "-file", str(tls.ca_file), *trust)
    (tmp_path / "send.bsh").write_text(JAVA, encoding="utf-8")
    said = await closed.run(
        tool("java"), f"-Djavax.net.ssl.trustStore={store}", "-Djavax.net.ssl.trustStorePassword=changeit", "-Dfile.encoding=UTF-8", "-cp",
        ":".join(JARS), "bsh.Interpreter", str(tmp_path / "send.bsh"), WAYS=",".join(WAYS), LOGIN=USER, PASSWORD=PASSWORD, SENDER=SENDER,
        **{f"PORT_{way}": str(closed.relay.address(way)[1]) for way in WAYS},
    )  # fmt: skip
    assert "exception" not in said, said
    for content in await arrived_by_every_way(closed):
        assert b"\r\nSubject: =?UTF-8?Q?Gr=C3=BC=C3=9Fe?=\r\n" in content and b"her@example.org" not in content
        assert content.endswith(b"\r\n\r\none\r\n.\r\n..two\r\nGr=C3=BC=C3=9Fe\r\n")
