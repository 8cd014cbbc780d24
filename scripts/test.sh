#!/usr/bin/env bash
# The tests, beside the type checker; before them the formatter and the linter.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "[dev]"
bin=.venv/bin

"$bin/ruff" format --check .
"$bin/ruff" check .
types="$(mktemp)"
trap 'rm -f "$types"' EXIT
"$bin/pyright" >"$types" 2>&1 &
checker=$!
status=0
"$bin/pytest" -n "${TEST_PROCESSES:-2}" --dist worksteal "$@" || status=$?
wait "$checker" || status=$?
cat "$types"
exit "$status"
