# Sfumato on a CPU.
#   docker build -t sfumato .
#   docker run --rm -v "$PWD/outputs:/home/sfumato/outputs" sfumato txt2img --prompt "a red apple"
# Pip's torch for Linux brings CUDA. Another index, such as that of torch's CPU builds: --build-arg TORCH_INDEX_URL=...
# Extras: --build-arg EXTRAS="[serve,hub]".
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS build
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY LICENSES LICENSES
COPY sfumato sfumato
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim
ARG TORCH_INDEX_URL=
ARG EXTRAS=
COPY --from=build /wheels /wheels
RUN if [ -n "$TORCH_INDEX_URL" ]; then pip install --no-cache-dir --index-url "$TORCH_INDEX_URL" torch; fi \
    && pip install --no-cache-dir "$(ls /wheels/*.whl)${EXTRAS}" \
    && rm -r /wheels \
    && useradd --create-home sfumato
USER sfumato
WORKDIR /home/sfumato
RUN mkdir outputs
ENV OMP_WAIT_POLICY=PASSIVE
ENTRYPOINT ["sfumato"]
CMD ["doctor"]
