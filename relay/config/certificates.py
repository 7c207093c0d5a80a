"""What OpenSSL has against the certificates and keys that a configuration names.

Asked for by `relay check` alone: it costs 20 ms and more, and a relay that starts meets the same faults where it uses the files.
"""

from collections.abc import Iterator

from relay.config.findings import Problem
from relay.config.machine import pair_fault, trust_fault
from relay.config.model import Config


def problems(config: Config) -> Iterator[Problem]:
    """Each file is asked about once, for the first that names it."""
    upstreams = [*reversed(config.upstreams.items())]
    for path, name in {item.ca_file: name for name, item in upstreams}.items():
        if path is not None and (fault := trust_fault(path)):
            yield Problem(("upstreams", name, "ca_file"), fault)
    for (path, key), name in {(item.client_certificate, item.client_key): name for name, item in upstreams}.items():
        if path is not None and (fault := pair_fault(path, key, called="client_key")):
            yield Problem(("upstreams", name, "client_certificate"), fault)
    for place, listener in enumerate(config.listeners):
        if listener.certificate is not None and (fault := pair_fault(listener.certificate, listener.key)):
            yield Problem(("listeners", place, "certificate"), fault)
