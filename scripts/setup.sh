# Sourced by the other scripts: a virtual environment in .venv with advbench and the extras in $1.
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
stamp=".venv/.installed-$(echo "$1" | tr -d '[],')"
if [ ! -e "$stamp" ] || [ pyproject.toml -nt "$stamp" ]; then
    echo "installing advbench$1 into .venv: minutes, and gigabytes where PyTorch is not cached"
    .venv/bin/python -m pip install --quiet --editable ".$1"
    touch "$stamp"
fi
# Small operations wait for each other's threads; on busy machines spinning there costs a hundredfold.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
