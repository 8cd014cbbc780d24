#!/usr/bin/env bash
# The tests, with the formatter, the linter and the type checker before them.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" "[dev]"
bin=.venv/bin

"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/pyright"
"$bin/pytest" -n "${TEST_PROCESSES:-2}" "$@"
