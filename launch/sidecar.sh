#!/usr/bin/env bash
# Sets up a virtual environment for one reward, since their packages clash, and
# serves it:
#   ./launch/sidecar.sh KIND [...]   setup, then the server (arguments: those of
#                                    `python -m xomni_jax.sidecar`)
#   ./launch/sidecar.sh KIND setup   make the environment only
#   ./launch/sidecar.sh KIND test    setup, then the tests of sidecars
# KIND: ocr (rapidocr), tesseract, paddleocr, got, hps, unified_reward or
# qwen_alignment; the application of that name in configs/sidecar.py, unless
# --app and --config name another.
# XOMNI_SIDECARS names the folder of the environments; PYTHON an interpreter.
# torch is PyPI's build for CUDA; for the CPU: PIP_INDEX_URL, or PIP_FIND_LINKS.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
pins=$here/launch/requirements-sidecar.txt

fail() {
  echo "sidecar.sh: error: $*" >&2
  exit 2
}

kind=${1:-help}
[ $# -gt 0 ] && shift
torch=(torch==2.14.1 torchvision==0.29.1)
loose='^$' # pins that the model's packages do not go with
case $kind in
  help | -h | --help)
    sed -n '2,12p' "${BASH_SOURCE[0]}" | cut -c3-
    exit
    ;;
  ocr) needs=(rapidocr==3.10.0 onnxruntime==1.32.0) ;;
  tesseract)
    needs=()
    command -v tesseract >/dev/null ||
      fail "there is no program tesseract; apt-get install tesseract-ocr" \
        "tesseract-ocr-chi-sim"
    ;;
  paddleocr)
    # On a GPU: paddlepaddle-gpu, from the index that PaddlePaddle names.
    needs=("${XOMNI_PADDLE:-paddlepaddle==3.3.1}" paddleocr==3.7.0)
    loose='^(numpy|PyYAML)=='
    ;;
  got) needs=("${torch[@]}" transformers==5.23.0) ;;
  hps) needs=("${torch[@]}" open_clip_torch==3.3.0) ;;
  unified_reward | qwen_alignment) needs=() ;;
  *) fail "no kind of reward is called $kind (see sidecar.sh help)" ;;
esac
venv=${XOMNI_SIDECARS:-$here/build/sidecars}/$kind

set_up() {
  # Done once for each state of the files that say what to install.
  local stamp=$venv/.xomni-setup sum
  sum=$(cat "$pins" "${BASH_SOURCE[0]}" <(echo "${needs[*]}") | sha256sum)
  [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$sum" ] && return
  local python=${PYTHON:-python3}
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    2>/dev/null || fail "$python is no Python 3.11 or newer; set PYTHON"
  echo "sidecar.sh: setting up $venv" >&2
  [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
  "$venv/bin/python" -m pip --disable-pip-version-check install -q \
    -r <(grep -Ev "$loose" "$pins") "${needs[@]}"
  echo "$sum" >"$stamp"
}

set_up
export PYTHONPATH=$here${PYTHONPATH:+:$PYTHONPATH}
case ${1:-} in
  setup) echo "sidecar.sh: $venv is ready" ;;
  test)
    shift
    "$venv/bin/python" -m pip --disable-pip-version-check install -q \
      pytest==9.2.0 psutil==7.2.2
    cd "$here"
    # The settings of all tests ask for the packages of training.
    exec "$venv/bin/python" -m pytest --noconftest -p no:cacheprovider \
      tests/e2e/test_sidecar_*.py "$@"
    ;;
  *)
    exec "$venv/bin/python" -m xomni_jax.sidecar \
      --config "$here/configs/sidecar.py" --app "$kind" "$@"
    ;;
esac
