#!/usr/bin/env bash
# Tests lattejax in lmms-eval 0.7.3 itself, which brings a protobuf and a PyTorch of its own: in an environment of its
# own (3 GB with PyTorch for CPUs), which is made once. CI has a stand-in of its interface instead.
#
#   tests/harness/run_in_lmms_eval.sh [environment]
set -euo pipefail
cd "$(dirname "$0")/../.."

environment=${1:-.venv-lmms-eval}
if [ ! -e "$environment/complete" ]; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install torch==2.13.0 torchvision lmms-eval==0.7.3 -r requirements.txt \
        pytest beartype diffusers==0.42.1
    touch "$environment/complete"
fi
"$environment/bin/pip" install --quiet --no-deps --force-reinstall .
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=
"$environment/bin/python" -P -m pytest -o addopts= --import-mode=importlib -p no:cacheprovider --noconftest \
    tests/harness/in_lmms_eval.py "${@:2}"
