#!/usr/bin/env bash
# The whole path on real images: search under attack, train the result with and without an adversary, evaluate both.
# BIN is the folder of the `rnas` command (default: the one on PATH); RUNS is where the runs go.
set -euo pipefail
cd "$(dirname "$0")/.."
RUNS=${RUNS:-runs/demo}
RNAS=${BIN:+$BIN/}rnas
started=$SECONDS

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
run() { printf '$ %s\n' "$*"; "$@"; }

rm -rf "$RUNS"/{search,robust,standard} "$RUNS"/evaluation.{json,png}
say "1/4  search a robust architecture: PGD examples for the weights and for the architecture"
run "$RNAS" search --config configs/demo_search.toml --run "$RUNS/search"
say "2/4  train the network it found against PGD"
run "$RNAS" train --config configs/demo_train.toml --genotype "$RUNS/search" --run "$RUNS/robust"
say "3/4  train the same network without an adversary, for comparison"
run "$RNAS" train --config configs/demo_train.toml --genotype "$RUNS/search" --recipe standard --run "$RUNS/standard"
say "4/4  evaluate both on the test images"
run "$RNAS" evaluate "$RUNS/robust" "$RUNS/standard" --output "$RUNS/evaluation.json"

say "done in $((SECONDS - started)) seconds"
cat <<EOT
  $RUNS/search/genotype.json     the architecture (genotype.txt: the classic text)
  $RUNS/search/cells.svg .png    a picture of its cells
  $RUNS/search/curves.png        losses, accuracies and entropy of the search
  $RUNS/search/metrics.jsonl     the same as numbers, one line an epoch
  $RUNS/search/config.json       the resolved configuration, every default written out
  $RUNS/search/checkpoint.pt     what --resume goes on from
  $RUNS/robust/model.pt          the trained network
  $RUNS/evaluation.json .png     the table above
EOT
