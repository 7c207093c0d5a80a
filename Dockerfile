FROM python:3.13-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY relay ./relay
RUN python -m venv /opt/relay \
    && /opt/relay/bin/pip install --no-cache-dir --disable-pip-version-check ./

FROM python:3.13-slim
# A fixed number, so that the owner of a mounted volume can be set from outside.
RUN groupadd --system --gid 2525 relay \
    && useradd --system --uid 2525 --gid relay --no-create-home --home-dir /var/lib/relay --shell /usr/sbin/nologin relay \
    && install --directory --owner=relay --group=relay --mode=0700 /var/lib/relay
COPY --from=build /opt/relay /opt/relay
ENV PATH=/opt/relay/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    STATE_DIRECTORY=/var/lib/relay
USER relay
WORKDIR /var/lib/relay
VOLUME /var/lib/relay
EXPOSE 2525
STOPSIGNAL SIGTERM
ENTRYPOINT ["relay"]
CMD ["serve"]
