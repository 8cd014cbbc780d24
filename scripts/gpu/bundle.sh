#!/usr/bin/env bash
# bash scripts/gpu/bundle.sh [IMAGES.npz]
# Everything that a machine with PyTorch and without a network needs, in build/gpu, at most 60 MB:
# our wheel, the wheels of what it lacks, these scripts, and the images that images.py packed.
# There: source build/gpu/enter.sh, then the commands that it prints.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh" "[dev]"
python=.venv/bin/python
bundle=build/gpu
there="${THERE:-3.12}" # version of Python on that machine
rm -rf "$bundle"
mkdir -p "$bundle/wheels" "$bundle/scripts"

"$python" -m build --wheel --outdir "$bundle/wheels" . >/dev/null
# The versions that are installed, and so tested, here.
versions() {
    "$python" -c "import sys; from importlib.metadata import version
print(*(f'{name}=={version(name)}' for name in sys.argv[1:]))" "$@"
}
# antlr4 is published as source alone.
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$bundle/wheels" \
    $(versions antlr4-python3-runtime)
platforms=()
for glibc in 17 24 27 28 31 34; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$there" \
    --implementation cp --platform manylinux2014_x86_64 "${platforms[@]}" --dest "$bundle/wheels" \
    $(versions hydra-core omegaconf torchattacks lightning-fabric pyautoattack pydantic \
        pydantic-core annotated-types typing-inspection typing-extensions)
"$python" scripts/gpu/slim.py "$bundle"/wheels/pyautoattack-*.whl examples
cp scripts/gpu/*.py "$bundle/scripts/"
cp scripts/gpu/enter.sh "$bundle/"
if [ $# -gt 0 ]; then
    cp "$1" "$bundle/images.npz"
fi
ls -l "$bundle/wheels"
size=$(du -sm "$bundle" | cut -f1)
echo "$bundle: $size MB"
if [ "$size" -gt 60 ]; then
    echo "more than 60 MB" >&2
    exit 1
fi
