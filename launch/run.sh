#!/usr/bin/env bash
# Sets up what is needed and runs one verb:
#   ./launch/run.sh setup       make .venv: packages of CPUs, or of a TPU VM
#   ./launch/run.sh lint        setup, then ruff and the check of imports
#   ./launch/run.sh test [...]  the same, and the tests (arguments: pytest's)
#   ./launch/run.sh train [...] setup, then `xomni train ...`, again and again
#                               while it stops saved since it was preempted
#   ./launch/run.sh demo [...]  setup, then a page about every part of the model
#   ./launch/run.sh recipe      setup, then the tiny model that ships, from nothing
#   ./launch/run.sh eval [...]  setup, Tesseract where apt has it, `xomni eval ...`
#   ./launch/run.sh VERB [...]  setup, then `xomni VERB ...`
# XOMNI_VENV names another virtual environment; PYTHON another interpreter.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=${XOMNI_VENV:-$here/.venv}
[[ $venv = /* ]] || venv=$PWD/$venv
pins=$here/launch/requirements-cpu.txt

fail() {
  echo "run.sh: error: $*" >&2
  exit 2
}

set_up() {
  # Done once for each state of the files that say what to install.
  local stamp=$venv/.xomni-setup sum
  sum=$(cat "$here/setup.py" "$pins" "${BASH_SOURCE[0]}" | sha256sum)
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$sum" ] && return
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    2>/dev/null || fail "$python is no Python 3.11 or newer; set PYTHON"
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python has no venv module; apt-get install python3-venv"
  echo "run.sh: setting up $venv" >&2
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  local pip=("$venv/bin/python" -m pip --disable-pip-version-check install -q)
  # The local version "+cpu" keeps pip from PyPI's CUDA build of several GB.
  # That index may be out of reach, and a wheel may be at hand: ask it once.
  local torch said
  torch=$(grep '^torch==' "$pins")
  said=$("${pip[@]}" --no-deps --retries 0 --timeout 20 \
    --extra-index-url https://download.pytorch.org/whl/cpu "$torch" 2>&1) ||
    fail "no CPU build of torch to be had ($torch; pip: ${said##*$'\n'}); put" \
      "its wheel where pip looks, for example with PIP_FIND_LINKS"
  "${pip[@]}" -r "$pins"
  "${pip[@]}" --no-deps --no-build-isolation -e "$here"
  echo "$sum" >"$stamp"
}

# libtpu is installed for compiling without a TPU; where there is none, JAX
# must not look for one: that stalls for half a minute.
no_tpu() { ! compgen -G '/dev/accel*' >/dev/null && ! compgen -G '/dev/vfio/[0-9]*' >/dev/null; }

lint() {
  cd "$here"
  "$venv/bin/ruff" check .
  "$venv/bin/ruff" format --check .
  "$venv/bin/lint-imports"
}

# A preempted run saves and exits with 143. What tells this script to stop is
# passed on, and then nothing is started again; told twice, it kills.
train() {
  local child="" told="" status started quick=0
  stop() {
    local signal=TERM
    [ -n "$told" ] && signal=KILL
    told=yes
    [ -z "$child" ] || kill -"$signal" "$child" 2>/dev/null || true
  }
  trap stop TERM INT
  while true; do
    started=$SECONDS
    "$venv/bin/python" -m xomni_jax train "$@" &
    child=$!
    [ -z "$told" ] || kill -TERM "$child"
    # `wait` also ends when a signal comes; the last one has the exit status.
    while kill -0 "$child" 2>/dev/null; do wait "$child" || true; done
    status=0
    wait "$child" || status=$?
    [ "$status" = 143 ] && [ -z "$told" ] || exit "$status"
    quick=$((SECONDS - started < 60 ? quick + 1 : 0))
    if [ "$quick" -ge 5 ]; then
      echo "run.sh: preempted five times in less than a minute each; giving up" >&2
      exit "$status"
    fi
    echo "run.sh: training was preempted (exit status 143); starting it again" >&2
  done
}

# The judge of measurements is a program of its own. Where it can't be had,
# they go on without it, and its column says "absent".
judge() {
  tesseract --list-langs 2>/dev/null | grep -qx chi_sim && return
  local apt=(env DEBIAN_FRONTEND=noninteractive apt-get -y -qq)
  [ "$(id -u)" = 0 ] || apt=(sudo -n "${apt[@]}")
  local get=("${apt[@]}" install tesseract-ocr tesseract-ocr-chi-sim)
  echo "run.sh: installing tesseract-ocr" >&2
  "${get[@]}" >/dev/null 2>&1 ||
    { "${apt[@]}" update && "${get[@]}"; } >/dev/null 2>&1 ||
    echo "run.sh: apt has no tesseract-ocr, or no Chinese (chi_sim) for it;" \
      "measuring with what there is" >&2
}

verb=${1:-help}
[ $# -gt 0 ] && shift
case $verb in
  help | -h | --help)
    sed -n '2,12p' "${BASH_SOURCE[0]}" | cut -c3-
    exit
    ;;
esac
# Tests, and the libtpu that plans want, are for CPUs.
no_tpu || [[ $verb = lint || $verb = test ]] || pins=$here/requirements-tpu.txt
set_up
if no_tpu && [ -z "${JAX_PLATFORMS:-}" ] && ! command -v nvidia-smi >/dev/null; then
  export JAX_PLATFORMS=cpu
fi
case $verb in
  setup) echo "run.sh: $venv is ready" ;;
  lint) lint ;;
  train) train "$@" ;;
  test)
    lint
    # By file: the tests of a file share what they compiled.
    exec "$venv/bin/python" -m pytest -n auto --maxprocesses 4 \
      --dist loadfile --no-loadscope-reorder "$@"
    ;;
  eval)
    case ${1:-} in best-of-n | cfg) judge ;; esac
    exec "$venv/bin/python" -m xomni_jax eval "$@"
    ;;
  *) exec "$venv/bin/python" -m xomni_jax "$verb" "$@" ;;
esac
