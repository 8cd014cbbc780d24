# Sourced on the machine with the GPU: installs what the bundle brought, unpacks the images.
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [ ! -d "$here/site" ]; then
    python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$here/site" \
        "$here"/wheels/*.whl || {
        version="$(python3 -c "import sys; print('{}.{}'.format(*sys.version_info))")"
        echo "for this Python: THERE=$version bash scripts/gpu/bundle.sh" >&2
        return 1
    }
fi
export PYTHONPATH="$here/site"
data=""
if [ -e "$here/images.npz" ]; then
    [ -e "$here/arrays.npz" ] ||
        python3 "$here/scripts/images.py" unpack "$here/images.npz" "$here/arrays.npz"
    data=" --data $here/arrays.npz"
fi
for name in check train evaluate defenses; do
    echo "python3 $here/scripts/$name.py$data --out \${OUT:-outputs/gpu}"
done
