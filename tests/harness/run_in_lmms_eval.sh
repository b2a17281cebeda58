#!/usr/bin/env bash
# Tests lattejax in lmms-eval 0.7.3 itself, in an environment of its own, which is made once (3 GB with PyTorch for CPUs).
# lmms-eval needs filelock below 4, where lattejax asks for a later one, and a protobuf below ours; the rest agrees. CI
# has a stand-in of its interface instead.
#
#   tests/harness/run_in_lmms_eval.sh [environment]
set -euo pipefail
cd "$(dirname "$0")/../.."

environment=${1:-.venv-lmms-eval}
if [ ! -e "$environment/complete" ]; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install torch==2.13.0 torchvision lmms-eval==0.7.3 -r requirements.txt \
        pytest diffusers==0.42.1
    "$environment/bin/pip" install 'filelock>=3.30,<4'
    # A torchvision built for CUDA beside a PyTorch that is not cannot be imported; nothing here needs one.
    "$environment/bin/python" -c "import torchvision" || "$environment/bin/pip" uninstall --yes torchvision
    touch "$environment/complete"
fi
"$environment/bin/pip" install --quiet --no-deps --force-reinstall .
export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 JAX_PLATFORMS=cpu CUDA_VISIBLE_DEVICES=
"$environment/bin/python" -P -m pytest -o addopts= --import-mode=importlib -p no:cacheprovider --noconftest \
    tests/harness/in_lmms_eval.py "${@:2}"
