"""relay: forwards mail from old apps through their tenants' own upstreams, durably and fail-closed."""

__version__ = "0.1.0"
