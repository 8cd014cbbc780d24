#!/usr/bin/env bash
# From nothing to an honest number: install, train with and without PGD adversarial training,
# attack both with AutoAttack, show the table and write it as a page. Three to five minutes on two
# idle cores after the install; killed, it goes on where it was.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh" ""
advbench=.venv/bin/advbench

"$advbench" train recipe=standard hydra.run.dir=outputs/demo/standard
"$advbench" train recipe=pgd_at hydra.run.dir=outputs/demo/pgd_at
for run in standard pgd_at; do
    "$advbench" eval "run=outputs/demo/$run" protocol=autoattack n=200 \
        "hydra.run.dir=outputs/demo/$run-autoattack"
done
"$advbench" report outputs/demo
"$advbench" report outputs/demo --html outputs/demo/report.html
